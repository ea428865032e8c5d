"""Numbers that a file may have for each layer, and numbers that it need not have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.formats import ModelFile, open_model_file
from pi2rt.models.checkpoint import Checkpoint
from tests.support.tiny_models import TinyModel, write_gguf


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFile]:
    path = tmp_path_factory.mktemp("checkpoint") / "m.gguf"
    with open_model_file(write_gguf(path, TinyModel(layers=4, heads=4, kv_heads=2, head_dim=16))) as opened:
        yield opened


def changed(file: ModelFile, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> Checkpoint:
    """``a__b`` is the key ``llama.a.b``; None leaves it out."""
    metadata = dict(file.metadata)
    for name, value in keys.items():
        key = f"llama.{name.replace('__', '.')}"
        metadata.pop(key, None)
        if value is not None:
            metadata[key] = value
    monkeypatch.setattr(file, "metadata", metadata)
    return Checkpoint(file)


def test_one_number_is_that_of_every_layer(file: ModelFile) -> None:
    c = Checkpoint(file)
    assert c.layer_heads == ((4, 2),) * 4
    assert c.layer_hidden == (c.hidden,) * 4


def test_hybrid_files_have_arrays_with_zeros(file: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    c = changed(
        file,
        monkeypatch,
        attention__head_count_kv=np.array([0, 2, 0, 4], np.int32),
        feed_forward_length=[64, 0, 0, 128],
    )
    assert c.layer_heads == ((0, 0), (4, 2), (0, 0), (4, 4))
    assert c.layer_hidden == (64, 0, 0, 128)
    assert c.n_heads == 4  # which stays one number
    with pytest.raises(UnsupportedModelError, match="a different value for each layer"):
        _ = c.n_kv_heads


def test_zeros_leave_one_number_of_the_layers_that_have_the_block(
    file: ModelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = changed(
        file,
        monkeypatch,
        attention__head_count=np.array([0, 4, 0, 4], np.int32),
        attention__head_count_kv=[0, 2, 0, 2],
        attention__key_length=None,
        attention__value_length=None,
        feed_forward_length=[0, 64, 64, 0],
    )
    assert (c.n_heads, c.n_kv_heads, c.head_dim, c.hidden) == (4, 2, 16, 64)
    assert c.layer_heads == ((0, 0), (4, 2)) * 2
    assert (c.heads_of(1), c.hidden_of(2)) == ((4, 2), 64)


def test_files_without_attention_open(file: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    c = changed(
        file,
        monkeypatch,
        attention__head_count=None,
        attention__head_count_kv=None,
        attention__key_length=None,
        attention__value_length=None,
        feed_forward_length=None,
    )
    assert c.dim > 0
    assert c.layer_heads == ((0, 0),) * 4
    assert c.layer_hidden == (0,) * 4
    with pytest.raises(ModelFormatError, match=r"llama\.attention\.head_count.*missing"):
        _ = c.n_heads


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"attention__head_count_kv": [2, 2, 1]}, "has 3 values for 4 layers"),
        ({"attention__head_count_kv": [0, 3, 2, 2]}, "4 query heads cannot share 3 key-value heads"),
        ({"attention__head_count_kv": [0, -1, 2, 2]}, "-1 is not an integer between 0 and"),
        ({"attention__head_count_kv": [0, 1.5, 2, 2]}, "1.5 is not an integer between 0 and"),
        ({"attention__head_count_kv": [0, True, 2, 2]}, "True is not an integer between 0 and"),
        ({"attention__head_count": ["x"] * 3 + [1]}, "'x' is not an integer between 0 and"),
    ],
)
def test_what_is_wrong_is_named(
    file: ModelFile, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], problem: str
) -> None:
    c = changed(file, monkeypatch, **keys)
    with pytest.raises(ModelFormatError, match=problem):
        _ = c.layer_heads
