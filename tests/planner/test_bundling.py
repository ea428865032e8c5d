"""Matrices that ``convert`` stores by neuron: which, where, and that every value is the source's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pi2rt import open_runtime
from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.cython_kernels.kernels import native
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.formats import open_model_file
from pi2rt.formats.pack import PackFile
from pi2rt.formats.quants import dequantize
from pi2rt.planner.pack import bundling
from pi2rt.planner.pack.convert import Broken, convert, verify
from tests.support.sparse_model import poke
from tests.support.tiny_models import TinyModel, write_gguf, write_huggingface

Floats = npt.NDArray[np.float32]

DRELU, REGLU, RELU2 = ({"hidden_act": name} for name in ("drelu", "relu", "relu2"))
MODELS = {
    "dReLU": TinyModel(seed=31, config=DRELU),
    "ReGLU": TinyModel(seed=32, dim=96, hidden=352, config=REGLU),
    "ReLU2, wide": TinyModel(seed=33, dim=1056, hidden=160, layers=1, heads=2, kv_heads=1, config=RELU2),
    "without gate": TinyModel(seed=34, hidden=224, gated=False, config=REGLU),
    "with biases": TinyModel("llama", seed=35, config=DRELU | {"mlp_bias": True}),
}


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    return tmp_path / "model.pi2"


def stored_by_neuron(file: PackFile) -> list[str]:
    return [info.name for info in file.tensors.values() if info.layout == "neurons"]


def check_values(pack: Path, source: Path) -> None:
    """Everything in bundles against the source, and the order of the file."""
    with PackFile(pack) as file, open_model_file(source) as original:

        def expected(name: str) -> Floats:
            info = original.tensors[name]
            assert (file.tensors[name].type, file.tensors[name].shape) == (info.type, info.shape)
            return dequantize(info.type, original.read(name), info.shape)

        for each in file.bundles.values():
            pages = np.empty(each.nbytes, np.uint8)
            file.read_bundles_into(each, 0, pages.data)
            rows, neurons = file.tensors[each.down].shape
            down = (file.tensors[each.down].type, pages, file.read(each.down), rows, neurons, each.layout)
            np.testing.assert_array_equal(native.unbundle_down(*down), expected(each.down))
            if each.up is not None:
                columns = file.tensors[each.up].shape[1]
                up = (file.tensors[each.up].type, pages, file.read(each.up), neurons, columns, each.layout)
                np.testing.assert_array_equal(native.unbundle_up(*up), expected(each.up))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("up", "down"), [("Q4_0", "Q4_0"), ("Q4_1", "Q4_1"), ("Q8_0", "Q8_0"), ("Q4_0", "Q8_0"), ("Q8_0", "Q4_1")]
)
def test_the_values_are_the_source_s(
    tmp_path: Path, pack: Path, name: str, up: str, down: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundling, "PIECE_BYTES", 9000)  # several pieces of each, the last of them short
    model = MODELS[name]
    types = {"ffn_up": up, "ffn_down": down}
    source = write_gguf(tmp_path / "m.gguf", model, weight_type="Q8_0", types=types)
    convert(source, pack)
    with PackFile(pack) as file:
        roles = ("up", "down") if model.gated else ("down",)
        expected = [f"blk.{i}.ffn_{role}.weight" for i in range(model.layers) for role in roles]
        assert stored_by_neuron(file) == expected
        assert {each.up is None for each in file.bundles.values()} == {not model.gated}
    check_values(pack, source)
    assert verify(pack) == ()


def test_they_lie_behind_their_layer(tmp_path: Path, pack: Path) -> None:
    convert(write_gguf(tmp_path / "m.gguf", MODELS["dReLU"], weight_type="Q4_0"), pack)
    with PackFile(pack) as file:
        layer = "attn_norm ffn_norm attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down ffn_down.weight.bundles"
        expected = ["token_embd", "output_norm", "output"]
        expected += [f"blk.{i}.{name}" for i in range(3) for name in layer.split()]
        found = [each.name.removesuffix(".weight") for each in file.sections]
        assert [name for name in found if name.startswith(("blk.", "token", "output"))] == expected
        assert all(each.offset % 4096 == 0 for each in file.bundles.values())


@pytest.mark.parametrize(
    ("model", "types"),
    [
        (TinyModel(), {}),  # SiLU: a neuron that is hardly active is not an inactive one
        (TinyModel("gemma3_text"), {}),
        (TinyModel(config=DRELU), {"ffn_up": "Q5_0"}),
        (TinyModel(config=DRELU), {"ffn_down": "F16"}),
        (TinyModel(config=REGLU, gated=False), {"ffn_down": "Q5_1"}),
    ],
)
def test_other_blocks_are_row_blocks(
    tmp_path: Path, pack: Path, model: TinyModel, types: dict[str, str]
) -> None:
    convert(write_gguf(tmp_path / "m.gguf", model, weight_type="Q8_0", types=types), pack)
    with PackFile(pack) as file:
        assert not file.bundles
        assert not stored_by_neuron(file)


def test_floats_are_row_blocks(tmp_path: Path, pack: Path) -> None:
    convert(write_huggingface(tmp_path / "source", TinyModel(config=DRELU), dtype="F16"), pack)
    with PackFile(pack) as file:
        assert not file.bundles


def test_each_layer_for_itself(tmp_path: Path, pack: Path) -> None:
    types = {"blk.1.ffn_up": "Q5_0"}
    source = write_gguf(tmp_path / "m.gguf", TinyModel(config=DRELU), weight_type="Q4_0", types=types)
    convert(source, pack)
    with PackFile(pack) as file:
        assert list(file.bundles) == ["blk.0.ffn_down.weight", "blk.2.ffn_down.weight"]
    check_values(pack, source)


def test_they_can_be_left_out(tmp_path: Path, pack: Path) -> None:
    convert(write_gguf(tmp_path / "m.gguf", TinyModel(config=DRELU), weight_type="Q4_0"), pack, bundles="off")
    with PackFile(pack) as file:
        assert not file.bundles
        assert {info.layout for info in file.tensors.values() if len(info.shape) == 2} == {"blocks16"}


def test_a_flipped_bit_is_found(tmp_path: Path, pack: Path) -> None:
    convert(write_gguf(tmp_path / "m.gguf", TinyModel(config=DRELU), weight_type="Q4_0"), pack)
    raw = pack.read_bytes()
    with PackFile(pack) as file:
        each, scales = file.bundles["blk.1.ffn_down.weight"], file.tensors["blk.1.ffn_up.weight"]
    for at in (each.offset, each.offset + each.nbytes // 2, each.offset + each.nbytes - 1):
        poke(pack, at, bytes([raw[at] ^ 0x10]))
        assert verify(pack) == (Broken("blk.1.ffn_down.weight.bundles", "its checksum does not match"),)
        poke(pack, at, raw[at : at + 1])
    poke(pack, scales.offset, bytes([raw[scales.offset] ^ 1]))
    assert verify(pack) == (Broken("blk.1.ffn_up.weight", "its checksum does not match"),)


@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q8_0"])
def test_what_is_not_finite_is_refused(
    tmp_path: Path, pack: Path, role: str, type_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundling, "PIECE_BYTES", 1000)
    source = write_gguf(tmp_path / "m.gguf", TinyModel(config=DRELU), weight_type=type_name)
    with open_model_file(source) as file:
        info = file.tensors[f"blk.1.ffn_{role}.weight"]
    poke(source, info.offset + 40 * info.nbytes // info.shape[0], np.array([np.nan], "<f2").tobytes())
    with pytest.raises(
        ModelFormatError, match=rf"tensor blk\.1\.ffn_{role}\.weight: row 40 holds NaN or infinity"
    ):
        convert(source, pack)
    assert not pack.exists()


def test_progress_counts_the_source_once(tmp_path: Path, pack: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", TinyModel(config=DRELU), weight_type="Q4_0")
    reports: list[tuple[int, int]] = []
    convert(source, pack, progress=lambda done, total: reports.append((done, total)))
    counts: Sequence[int] = [done for done, _ in reports]
    assert list(counts) == sorted(counts)
    assert reports[-1][0] == reports[-1][1]


async def test_an_executor_that_does_not_know_them_gets_none(tmp_path: Path, pack: Path) -> None:
    class Unaware(CpuExecutor):
        reads_bundles = False

    source = write_gguf(tmp_path / "m.gguf", TinyModel(config=DRELU), weight_type="Q4_0")
    convert(source, pack)
    with pytest.raises(UnsupportedModelError, match=r"model\.pi2: bundles: are there, .* with --bundles off"):
        async with open_runtime(pack, executor=Unaware):
            pass
    convert(source, pack, overwrite=True, bundles="off")
    async with open_runtime(pack, executor=Unaware, context=64) as runtime:
        assert np.isfinite(await runtime.logits([1, 2, 3])).all()


MEASURED = """
import sys
from pi2rt.planner.pack.convert import convert
from pi2rt.host.memory import peak_rss_bytes
convert(sys.argv[1], sys.argv[2])  # imports and first uses are no growth
before = peak_rss_bytes()
convert(sys.argv[3], sys.argv[4])
print(peak_rss_bytes() - before)
"""


def test_it_takes_the_memory_of_one_matrix(tmp_path: Path) -> None:
    config = {"hidden_act": "drelu"}
    small = write_gguf(tmp_path / "small.gguf", TinyModel(config=config), weight_type="Q4_0")
    large = TinyModel(dim=1024, hidden=16384, layers=1, heads=2, kv_heads=1, config=config)
    source = write_gguf(tmp_path / "large.gguf", large, weight_type="Q8_0", types={"ffn_gate": "F16"})
    matrix = 1024 * 16384 * 34 // 32
    assert os.stat(source).st_size > 3 * matrix
    run = subprocess.run(
        [sys.executable, "-P", "-c", MEASURED, small, tmp_path / "s.pi2", source, tmp_path / "l.pi2"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert int(run.stdout) < matrix + (16 << 20)
