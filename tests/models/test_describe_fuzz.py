"""Whatever stands in the metadata: a description or a clear error, quickly."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pi2rt._errors import ModelFormatError
from pi2rt.formats import ModelFile, open_model_file
from pi2rt.models import ModelDescription, describe
from tests.support.families import FAMILIES
from tests.support.tiny_models import TinyModel, write_gguf, write_huggingface

_SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.sampled_from(
        ["", "yarn", "longrope", "llama3", "dynamic", "linear", "full_attention", "gelu", "\x00"]
    ),
)
_ROPE_KEYS = st.sampled_from(
    [
        "rope_type",
        "type",
        "factor",
        "rope_theta",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "long_factor",
        "short_factor",
        "attention_factor",
        "mscale",
        "partial_rotary_factor",
        "full_attention",
        "original_max_position_embeddings",
    ]
)
_VALUES = st.one_of(
    _SCALARS,
    st.lists(_SCALARS, max_size=8),
    st.dictionaries(_ROPE_KEYS, st.one_of(_SCALARS, st.lists(st.floats(0.1, 9), max_size=8)), max_size=6),
)
_GGUF_VALUES = st.one_of(
    _SCALARS.filter(lambda value: value is not None),
    st.lists(st.integers(0, 99), max_size=4).map(lambda values: np.array(values, np.int32)),
    st.lists(st.text(max_size=3), max_size=3),
)


_DIRECTORIES = [
    "llama-longrope-long",
    "qwen2-window",
    "gemma3-rope-parameters",
    "mixtral",
    "qwen2-moe-plain-layers",
]


@pytest.fixture(scope="module", params=_DIRECTORIES)
def directory(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModelFile]:
    path = write_huggingface(tmp_path_factory.mktemp("fuzz"), FAMILIES[request.param].model)
    with open_model_file(path) as file:
        yield file


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "mixtral", "qwen2_moe"])
def gguf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFile]:
    path: Path = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    with open_model_file(write_gguf(path, TinyModel(request.param))) as file:
        yield file


def _describe(file: ModelFile, changes: dict[str, Any]) -> None:
    original = file.metadata
    file.metadata = {**original, **changes}
    message = ""
    begin = time.thread_time()  # of this thread alone: other processes may take most of the machine
    try:
        assert isinstance(describe(file), ModelDescription)
    except ModelFormatError as error:
        message = str(error)
    finally:
        file.metadata = original
    assert time.thread_time() - begin < 2
    assert len(message) < 1000


_SETTINGS = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@_SETTINGS
@given(data=st.data())
def test_config_json(directory: ModelFile, data: st.DataObject) -> None:
    keys = [
        *directory.metadata,
        "rope_scaling",
        "rope_parameters",
        "layer_types",
        "text_config",
        "hidden_act_param",
        "num_local_experts",
    ]
    keys = [key for key in keys if key != "model_type"]
    _describe(directory, data.draw(st.dictionaries(st.sampled_from(keys), _VALUES, min_size=1, max_size=3)))


@_SETTINGS
@given(data=st.data())
def test_gguf_metadata(gguf: ModelFile, data: st.DataObject) -> None:
    prefix = f"{gguf.architecture}."
    keys = [key for key in gguf.metadata if key.startswith(prefix)]
    keys += [
        f"{prefix}rope.scaling.{key}" for key in ("type", "factor", "attn_factor", "original_context_length")
    ]
    keys += [
        f"{prefix}rope.scaling.yarn_{key}" for key in ("ext_factor", "beta_fast", "beta_slow", "attn_factor")
    ]
    keys += [f"{prefix}rope.dimension_count", f"{prefix}attention.sliding_window_pattern"]
    keys += [f"{prefix}hidden_activation", f"{prefix}vocab_size", "general.name"]
    keys += [f"{prefix}expert_{key}" for key in ("count", "gating_func", "weights_norm", "weights_scale")]
    changes = st.dictionaries(st.sampled_from(keys), _GGUF_VALUES, min_size=1, max_size=4)
    _describe(gguf, data.draw(changes))
