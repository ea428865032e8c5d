"""Tokens that end a turn are found by their spelling, whatever a file has them as."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken

from pi2rt.tokenizer import Tokenizer, load_tokenizer
from pi2rt.tokenizer.byte_level import SPACE
from pi2rt.tokenizer.end_tokens import END_OF_TURN, end_of_turn_ids
from pi2rt.tokenizer.vocabulary import TokenKind
from tests.tokenizer.files import byte_level_file, chain, spm_file
from tests.tokenizer.test_huggingface import byte_level, save

KINDS = [TokenKind.NORMAL, TokenKind.USER_DEFINED, TokenKind.CONTROL, TokenKind.UNUSED, TokenKind(2)]
PIECES = [(character, -1.0) for character in SPACE + "<|im_end>"]


def retyped(file: SimpleNamespace, kind: TokenKind) -> SimpleNamespace:
    """The file with its last token of this kind."""
    file.metadata["tokenizer.ggml.token_type"][-1] = int(kind)
    return file


def ends_a_turn(tokenizer: Tokenizer, text: str) -> None:
    """The token is the last of the vocabulary, ends a turn, is not shown and comes of no user's text."""
    id_ = tokenizer.vocab_size - 1
    assert id_ in tokenizer.eos_ids
    assert tokenizer.is_special(id_)
    assert tokenizer.decode([id_]) == ""
    assert tokenizer.token_bytes(id_) == text.encode()
    assert tokenizer.encode(text, parse_special=True, add_special=False) == [id_]
    plain = tokenizer.encode(text, add_special=False)
    assert id_ not in plain
    assert tokenizer.decode(plain) == text


@pytest.mark.parametrize("kind", KINDS)
def test_of_any_kind_in_a_gguf_file(kind: TokenKind) -> None:
    ends_a_turn(load_tokenizer(retyped(byte_level_file(control=["<|im_end|>"]), kind)), "<|im_end|>")
    ends_a_turn(load_tokenizer(retyped(spm_file(PIECES, control=["<|im_end|>"]), kind)), "<|im_end|>")


def test_a_gguf_file_without_kinds() -> None:
    file = byte_level_file(control=["<|im_end|>"])
    del file.metadata["tokenizer.ggml.token_type"]
    ends_a_turn(load_tokenizer(file), "<|im_end|>")


@pytest.mark.parametrize("special", [False, True])
def test_of_any_kind_in_a_directory(tmp_path: Path, special: bool) -> None:
    engine = byte_level()
    engine.add_tokens([AddedToken("<end_of_turn>", special=special, normalized=False)])
    ends_a_turn(load_tokenizer(save(tmp_path, engine)), "<end_of_turn>")


@pytest.mark.parametrize("text", END_OF_TURN)
def test_every_spelling(text: str) -> None:
    ends_a_turn(load_tokenizer(byte_level_file(user_defined=[text])), text)


@pytest.mark.parametrize("parse_special", [False, True])
def test_one_that_merges_make_ends_a_turn_and_stays_text(parse_special: bool) -> None:
    """As llama.cpp encodes it; it would otherwise vanish of a user's text."""
    tokenizer = load_tokenizer(byte_level_file(chain("</s>"), pre="gpt-2"))
    id_ = tokenizer.vocab_size - 1
    ids = tokenizer.encode("</s>", parse_special=parse_special)
    assert (ids == [id_]) is parse_special  # the family splits it before it merges
    assert id_ in tokenizer.eos_ids
    assert tokenizer.decode(ids) == "</s>"


def test_formats_that_end_messages_inside_a_turn() -> None:
    for pair in (["<|return|>", "<|call|>"], ["<|calls|>", "<|flush|>"]):
        assert end_of_turn_ids({"<|end|>": 1, pair[0]: 2}) == {1, 2}
        assert end_of_turn_ids({"<|end|>": 1, pair[0]: 2, pair[1]: 3}) == {2, 3}
    assert end_of_turn_ids({"</s>": 1, "<|tool_response>": 2, "x": 3}) == {2}
    assert end_of_turn_ids({}) == frozenset()
