"""Token ids against llama.cpp's, on the real vocabulary."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pi2rt.formats import open_model_file
from pi2rt.tokenizer import Tokenizer, load_tokenizer
from pi2rt.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from tests.support.real_model import smollm2
from tests.tokenizer.files import byte_level_file, chain
from tests.tokenizer.texts import TEXTS

SPLITS = json.loads((Path(__file__).parent / "golden" / "splits.json").read_text())
GOLDEN = json.loads((Path(__file__).parent / "golden" / "smollm2.json").read_text())
# llama.cpp's own expressions end a word at a combining mark here; those in tokenizer.json do not
KNOWN = {(pre, text) for pre in ("tekken", "gpt-4o") for text in TEXTS if "\u094d" in text}


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    with open_model_file(smollm2()) as file:
        return dict(file.metadata)


@pytest.fixture(scope="module")
def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    return load_tokenizer(SimpleNamespace(path="smollm2.gguf", metadata=metadata))


@pytest.mark.parametrize("index", range(len(TEXTS)))
def test_ids_are_the_ones_of_llama_cpp(tokenizer: Tokenizer, index: int) -> None:
    text = TEXTS[index]
    assert tokenizer.encode(text) == GOLDEN["text"][index]
    assert tokenizer.encode(text, parse_special=True) == GOLDEN["special"][index]


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    for parse_special in (False, True):
        ids = tokenizer.encode(text, parse_special=parse_special)
        assert tokenizer.decode(ids, skip_special=False) == text
        detokenizer = tokenizer.detokenizer(skip_special=False)
        assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == text


@pytest.mark.parametrize("pre", SPLITS["splits"])
def test_every_way_to_split_text_is_llama_cpps(pre: str) -> None:
    tokenizer = load_tokenizer(byte_level_file(SPLITS["merges"], pre=pre, add_bos_token=False))
    wrong = {}
    for text, expected in zip(TEXTS, SPLITS["splits"][pre], strict=True):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        if ids != expected and (pre, text) not in KNOWN:
            wrong[text] = [[tokenizer.token_bytes(id_) for id_ in each] for each in (ids, expected)]
    assert not wrong


@pytest.mark.parametrize("pre", ["tekken", "gpt-4o"])
def test_combining_marks_belong_to_words(pre: str) -> None:
    word = "x\u094dy"
    tokenizer = load_tokenizer(byte_level_file(chain(word), pre=pre))
    assert [tokenizer.decode([id_]) for id_ in tokenizer.encode(word, add_special=False)] == [word]


def test_every_known_split_is_one_of_those_tested() -> None:
    tested = {PRE_TOKENIZERS[name].patterns for name in SPLITS["splits"]}
    assert {pre.patterns for pre in PRE_TOKENIZERS.values()} == tested


@pytest.mark.parametrize(("pre", "composed"), [("qwen2", True), ("gpt-2", False)])
def test_normal_form_c_where_the_family_was_trained_on_it(pre: str, composed: bool) -> None:
    tokenizer = load_tokenizer(byte_level_file(pre=pre))
    text = unicodedata.normalize("NFD", "\u00e9t\u00e9 \uac00")
    assert tokenizer.decode(tokenizer.encode(text)) == (
        unicodedata.normalize("NFC", text) if composed else text
    )
