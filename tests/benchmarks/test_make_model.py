"""The files that synthetic models are written to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import make_model
import numpy as np
import pytest
from synthetic_gguf import write_gguf
from synthetic_k_quants import write_model
from synthetic_model import SPECIALS, SyntheticModel
from synthetic_shape import K_QUANT_SHAPES, SHAPES, Shape

import pi2rt
from pi2rt.formats import TensorInfo, open_model_file
from pi2rt.formats.pack import PackFile
from pi2rt.models import describe
from pi2rt.planner.pack.convert import convert, convert_file, verify

SHAPE = Shape(128, 192, 2, 4, 2, 512, "drelu")


@pytest.fixture(scope="module")
def model() -> SyntheticModel:
    return SyntheticModel("tiny", SHAPE, seed=5)


@pytest.fixture(scope="module")
def written(model: SyntheticModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_gguf(model, path)
    return path


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    def equal(x: object, y: object) -> bool:
        if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
            return x.dtype == y.dtype and np.array_equal(x, y)
        return type(x) is type(y) and x == y

    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


def test_a_gguf_file_is_the_model(model: SyntheticModel, written: Path) -> None:
    with open_model_file(written) as file:
        assert same(file.metadata, model.metadata)
        assert list(file.tensors) == list(model.tensors)
        for name, info in file.tensors.items():
            expected = model.tensors[name]
            assert (info.type, info.shape, info.nbytes) == (expected.type, expected.shape, expected.nbytes)
            assert (file.read(name) == model.read(name)).all()
        assert describe(file) == describe(model)
    assert [path.name for path in written.parent.iterdir()] == ["tiny.gguf"]


def test_a_pack_is_the_same_with_and_without_a_gguf_file(
    model: SyntheticModel, written: Path, tmp_path: Path
) -> None:
    convert(written, tmp_path / "converted.pi2")
    convert_file(model, tmp_path / "direct.pi2")
    assert verify(tmp_path / "direct.pi2") == ()
    with PackFile(tmp_path / "converted.pi2") as converted, PackFile(tmp_path / "direct.pi2") as direct:
        assert same(direct.metadata, converted.metadata)
        assert list(direct.tensors) == list(converted.tensors)
        for name, info in direct.tensors.items():
            assert replace(info, path=Path()) == replace(
                converted.tensors[name], path=Path(), offset=info.offset
            )
            assert (direct.read(name) == converted.read(name)).all()
        assert (direct.source.name, direct.source.files) == ("synthetic-tiny", ())


async def test_the_runtime_generates(model: SyntheticModel, written: Path, tmp_path: Path) -> None:
    convert_file(model, tmp_path / "tiny.pi2")
    texts = []
    for path in written, tmp_path / "tiny.pi2":
        async with pi2rt.open_runtime(path) as runtime:
            assert runtime.model.name == "synthetic tiny"
            completion = await runtime.generate([1, 300, 301], max_tokens=40, temperature=1.0, seed=2)
        assert len(completion.tokens) == 40
        assert min(completion.tokens) >= SPECIALS
        texts.append(completion.text)
    assert texts[0] == texts[1]


def test_experts_are_written_as_llama_cpp_has_them(tmp_path: Path) -> None:
    model = SyntheticModel("mixture", replace(SHAPE, experts=4, experts_used=2))
    write_gguf(model, tmp_path / "mixture.gguf")
    reader = gguf.GGUFReader(tmp_path / "mixture.gguf")
    assert reader.fields["llama.expert_count"].contents() == 4
    assert reader.fields["llama.expert_used_count"].contents() == 2
    found = {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist()) for tensor in reader.tensors}
    assert found["blk.1.ffn_gate_inp.weight"] == ("F32", [128, 4])
    assert found["blk.1.ffn_gate_exps.weight"] == ("Q4_0", [128, 192, 4])
    assert found["blk.1.ffn_up_exps.weight"] == ("Q4_0", [128, 192, 4])
    assert found["blk.1.ffn_down_exps.weight"] == ("Q4_0", [192, 128, 4])
    assert "blk.1.ffn_gate.weight" not in found


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path: Path) -> None:
    class Failing(SyntheticModel):
        def read_into(self, tensor: TensorInfo, start: int, buffer: memoryview) -> None:
            if tensor.name == "blk.1.ffn_up.weight":
                raise KeyboardInterrupt
            super().read_into(tensor, start, buffer)

    with pytest.raises(KeyboardInterrupt):
        write_gguf(Failing("tiny", SHAPE), tmp_path / "tiny.gguf")
    assert list(tmp_path.iterdir()) == []


OPTIONS = ["--dim", "64", "--hidden", "96", "--layers", "1", "--heads", "2", "--vocab", "300"]


@pytest.mark.parametrize("suffix", [".gguf", ".pi2"])
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    path = tmp_path / f"tiny{suffix}"
    make_model.main(
        ["custom", str(path), *OPTIONS, "--activation", "relu", "--activity", "0.2", "--seed", "9"]
    )
    with open_model_file(path) as file:
        description = describe(file)
        assert file.metadata["synthetic.seed"] == 9
        assert file.metadata["llama.hidden_activation"] == "relu"
    assert (description.dim, description.vocab_size, len(description.layers)) == (64, 300, 1)
    assert capsys.readouterr().err.startswith(f"{path}: 0.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bamboo-7b", "model.bin"], "model.bin ends neither in .gguf nor in .pi2"),
        (["custom", "there.gguf"], "there.gguf is there already"),
        (["tinyllama-1.1b", "model.pi2"], "tinyllama-1.1b is Q4_K_M"),
        (["tinyllama-1.1b", "model.gguf", "--dim", "64"], "tinyllama-1.1b is Q4_K_M"),
        (["custom", "model.gguf", "--dim", "65"], "dim 65"),
        (["custom", "model.gguf", "--activity", "0"], "an activity of 0"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.gguf").touch()
    with pytest.raises(SystemExit):
        make_model.main(arguments)
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


def test_shapes_are_those_of_the_models_they_are_named_for() -> None:
    sizes = {}
    for name, shape in SHAPES.items():
        tensors = SyntheticModel(name, shape).tensors.values()
        sizes[name] = sum(info.nbytes for info in tensors) / 1e9
    assert sizes == {
        "bamboo-7b": pytest.approx(4.07, abs=0.01),
        "bamboo-small": pytest.approx(0.319, abs=0.001),
        "llama-13b": pytest.approx(7.32, abs=0.01),
        "turbosparse-mixtral-47b": pytest.approx(26.3, abs=0.1),
    }


def test_k_quants_stay_as_they_were(tmp_path: Path) -> None:
    shape = replace(
        K_QUANT_SHAPES["llama-0.5b"], dim=256, hidden=512, layers=2, heads=4, kv_heads=2, vocab=300
    )
    write_model(tmp_path / "model.gguf", shape, "tiny")
    with open_model_file(tmp_path / "model.gguf") as file:
        assert describe(file).name == "synthetic tiny"
        assert {info.type for info in file.tensors.values()} == {"Q4_K", "Q6_K", "F32"}
