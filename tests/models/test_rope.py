"""Rotations from GGUF files: the same as from the config.json that a converter would have read.

That config.json is read rightly is proven by the golden logits (``test_families.py``).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.formats import open_model_file
from pi2rt.models import Attention, Rope, describe, rope_scaling
from tests.support.tiny_models import TinyModel, write_gguf, write_huggingface

Tensors = dict[str, np.ndarray]


def _ropes(path: Path, context: int | None = None) -> list[Rope]:
    with open_model_file(path) as file:
        blocks = [layer.blocks[0] for layer in describe(file, context).layers]
    return [block.rope for block in blocks if isinstance(block, Attention) and block.rope is not None]


def _gguf_rope(
    tmp_path: Path, metadata: dict[str, Any], extra: Tensors | None = None, context: int | None = None
) -> Rope:
    keys = {f"llama.rope.{key}": value for key, value in metadata.items()}
    path = write_gguf(tmp_path / "model.gguf", TinyModel(), metadata=keys, extra=extra)
    return _ropes(path, context)[0]


def _huggingface_rope(tmp_path: Path, config: dict[str, Any], context: int | None = None) -> Rope:
    write_huggingface(tmp_path / "hf", TinyModel(config=config))
    return _ropes(tmp_path / "hf", context)[0]


def _assert_same(gguf: Rope, huggingface: Rope) -> None:
    assert (gguf.style, huggingface.style) == ("interleaved", "halves")
    assert gguf.magnitude == pytest.approx(huggingface.magnitude, rel=1e-6)
    np.testing.assert_allclose(gguf.inverse_frequencies, huggingface.inverse_frequencies, rtol=1e-6)


def test_plain(tmp_path: Path) -> None:
    rope = _gguf_rope(tmp_path, {"freq_base": 100.0})
    np.testing.assert_allclose(rope.inverse_frequencies, [100 ** (-i / 8) for i in range(8)], rtol=1e-12)
    _assert_same(rope, _huggingface_rope(tmp_path, {"rope_theta": 100.0}))


def test_linear(tmp_path: Path) -> None:
    _assert_same(
        _gguf_rope(tmp_path, {"scaling.type": "linear", "scaling.factor": 2.0}),
        _huggingface_rope(tmp_path, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    )


def test_a_factor_counts_only_with_a_type_that_uses_it(tmp_path: Path) -> None:
    plain = _gguf_rope(tmp_path, {})
    assert _gguf_rope(tmp_path, {"scaling.type": "none", "scaling.factor": 2.0}) == plain


def test_yarn(tmp_path: Path) -> None:
    yarn: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    keys = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 32}
    _assert_same(_gguf_rope(tmp_path, keys), _huggingface_rope(tmp_path, {"rope_scaling": yarn}))
    keys |= {"scaling.yarn_beta_fast": 8.0, "scaling.yarn_beta_slow": 2.0, "scaling.yarn_attn_factor": 1.3}
    yarn |= {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3}
    _assert_same(_gguf_rope(tmp_path, keys), _huggingface_rope(tmp_path, {"rope_scaling": yarn}))


def test_yarn_without_extrapolation_is_linear(tmp_path: Path) -> None:
    keys = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.yarn_ext_factor": 0.0}
    rope = _gguf_rope(tmp_path, keys)
    linear = _gguf_rope(tmp_path, {"scaling.type": "linear", "scaling.factor": 4.0})
    np.testing.assert_allclose(rope.inverse_frequencies, linear.inverse_frequencies)


def test_llama3_comes_as_a_tensor_of_divisors(tmp_path: Path) -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    expected = _huggingface_rope(tmp_path, {"rope_scaling": llama3})
    divisors = rope_scaling.plain(16, 10000.0) / np.array(expected.inverse_frequencies)
    assert divisors.min() == 1
    assert divisors.max() == pytest.approx(8)
    assert ((divisors > 1.01) & (divisors < 7.99)).any()
    tensors = {"rope_freqs.weight": divisors.astype(np.float32)}
    _assert_same(_gguf_rope(tmp_path, {}, tensors), expected)


@pytest.mark.parametrize("context", [32, 33, None])
def test_longrope_takes_the_factors_of_the_context(tmp_path: Path, context: int | None) -> None:
    short, long = [1 + i / 10 for i in range(8)], [1.0 + i for i in range(8)]
    longrope = {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": 32,
    }
    tensors = {
        "rope_factors_short.weight": np.array(short, np.float32),
        "rope_factors_long.weight": np.array(long, np.float32),
    }
    magnitude = math.sqrt(1 + math.log(256 / 32) / math.log(32))
    keys = {
        "scaling.type": "longrope",
        "scaling.original_context_length": 32,
        "scaling.attn_factor": magnitude,
    }
    rope = _gguf_rope(tmp_path, keys, tensors, context)
    _assert_same(rope, _huggingface_rope(tmp_path, {"rope_scaling": longrope}, context))
    used = rope_scaling.plain(16, 10000.0) / np.array(rope.inverse_frequencies)
    np.testing.assert_allclose(used, short if context == 32 else long, rtol=1e-6)


def test_a_part_of_each_head(tmp_path: Path) -> None:
    rope = _gguf_rope(tmp_path, {"dimension_count": 8})
    assert len(rope.inverse_frequencies) == 4
    _assert_same(rope, _huggingface_rope(tmp_path, {"partial_rotary_factor": 0.5}))


def test_gemma3_rotates_local_layers_without_the_stretch(tmp_path: Path) -> None:
    keys = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    model = TinyModel("gemma3_text", layers=7, config={"rope_theta": 1e6})
    local, *_, everywhere, again = _ropes(write_gguf(tmp_path / "m.gguf", model, metadata=keys))
    np.testing.assert_allclose(local.inverse_frequencies, rope_scaling.plain(16, 1000.0))
    np.testing.assert_allclose(everywhere.inverse_frequencies, rope_scaling.plain(16, 1e6) / 8)
    assert again == local


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "spiral"}, "rope_scaling.rope_type: 'spiral' is not supported"),
        ({"rope_type": "linear"}, "rope_scaling.factor: missing"),
        ({"rope_type": "linear", "factor": -1}, "rope_scaling.factor: -1 is not a number above 0"),
        ({"rope_type": "linear", "factor": "two"}, "rope_scaling.factor: 'two' is not a number"),
        ({"rope_type": "linear", "factor": float("nan")}, "rope_scaling.factor: nan is not a number"),
        ({"rope_type": "linear", "factor": True}, "rope_scaling.factor: True is not a number"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1}, "between 2 and"),
        (
            {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]},
            "a list of 8 numbers expected",
        ),
        ({"rope_type": "longrope", "long_factor": [0.0] * 8}, "long_factor: 0.0 is not a number above 0"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "high_freq_factor: 4 is not above low_freq_factor 4",
        ),
        ({"rope_type": 7}, "rope_type: 7 is not a name"),
        ({"rope_type": "linear", "factor": 5e-324}, "frequencies that are not finite"),
        ([1, 2], r"rope_scaling: \[1, 2\] is not an object"),
    ],
)
def test_scalings_that_make_no_sense(tmp_path: Path, scaling: object, message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        _huggingface_rope(tmp_path, {"rope_scaling": scaling})


def test_gguf_scalings_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"llama.rope.scaling.type: 'spiral' is not supported"):
        _gguf_rope(tmp_path, {"scaling.type": "spiral"})
    with pytest.raises(ModelFormatError, match="'longrope' without the tensors"):
        _gguf_rope(tmp_path, {"scaling.type": "longrope"})
    with pytest.raises(ModelFormatError, match=r"rope_freqs.weight: F32 \(3,\); F32 \(8,\) expected"):
        _gguf_rope(tmp_path, {}, {"rope_freqs.weight": np.ones(3, np.float32)})
    with pytest.raises(ModelFormatError, match="factors must be finite and positive"):
        _gguf_rope(tmp_path, {}, {"rope_freqs.weight": np.zeros(8, np.float32)})
    with pytest.raises(ModelFormatError, match="dimension_count: 7 is odd"):
        _gguf_rope(tmp_path, {"dimension_count": 7})
