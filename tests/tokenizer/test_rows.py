"""Models with more rows than their vocabulary has tokens: such ids spell nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pi2rt import _errors as errors
from pi2rt.formats import open_model_file
from pi2rt.tokenizer import Tokenizer, load_tokenizer
from tests.support.tiny_models import VOCAB_SIZE, TinyModel, write_gguf, write_huggingface

TOKENS = VOCAB_SIZE - 3  # all that merges do not make


def gguf(directory: Path) -> Path:
    """One whose vocabulary lacks the last 3 tokens, the special ones among them."""
    path = write_gguf(directory / "full.gguf", TinyModel())
    with open_model_file(path) as file:
        tokens = list(file.metadata["tokenizer.ggml.tokens"])[:TOKENS]
    short = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * TOKENS}
    none = dict.fromkeys(f"tokenizer.ggml.{key}" for key in ("bos_token_id", "eos_token_id", "add_bos_token"))
    return write_gguf(directory / "short.gguf", TinyModel(), metadata=short | none)


def huggingface(directory: Path) -> Path:
    """One that lacks them too, and whose config.json does not say how many rows there are."""
    path = write_huggingface(directory / "model", TinyModel())
    state = json.loads((path / "tokenizer.json").read_text())
    state["added_tokens"] = []
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {token: id_ for token, id_ in vocabulary.items() if id_ < TOKENS}
    (path / "tokenizer.json").write_text(json.dumps(state))
    (path / "tokenizer_config.json").unlink()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": None}))
    return path


@pytest.fixture(params=[gguf, huggingface], ids=["gguf", "huggingface"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    with open_model_file(request.param(tmp_path)) as file:
        return load_tokenizer(file)


def test_rows_beyond_the_vocabulary_spell_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the on", add_special=False)
    assert tokenizer.vocab_size == VOCAB_SIZE
    for id_ in (TOKENS, VOCAB_SIZE - 1):
        assert tokenizer.is_special(id_)
        assert tokenizer.token_bytes(id_) == b""
        for skip_special in (False, True):
            assert tokenizer.decode([*ids, id_, *ids], skip_special=skip_special) == "the onthe on"
        detokenizer = tokenizer.detokenizer()
        assert "".join(map(detokenizer.push, [id_, *ids, id_])) + detokenizer.flush() == "the on"
    with pytest.raises(errors.RequestError, match=f"token id {VOCAB_SIZE} is outside"):
        tokenizer.decode([VOCAB_SIZE])
