from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt.tokenizer import Tokenizer, load_tokenizer
from pi2rt.tokenizer.byte_level import SPACE
from tests.tokenizer.files import byte_level_file, chain, spm_file

WORDS = [" the", "\u65e5\u672c", "\U0001f600", "e\u0301", "\n\n"]


@cache
def byte_level() -> Tokenizer:
    merges = dict.fromkeys(merge for word in WORDS for merge in chain(word))
    return load_tokenizer(byte_level_file(list(merges), control=["<s>", "<|im_end|>"], user_defined=["<b>"]))


@cache
def spm() -> Tokenizer:
    pieces = [(SPACE, -1.0), (SPACE + "a", -2.0), ("a", -3.0), ("\u65e5", -4.0), (SPACE + SPACE, -5.0)]
    return load_tokenizer(spm_file(pieces, control=["<turn>"], user_defined=["  "]))


TOKENIZERS = st.sampled_from([byte_level, spm])


def stream(tokenizer: Tokenizer, ids: list[int], **options: bool) -> str:
    detokenizer = tokenizer.detokenizer(**options)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


@settings(max_examples=60)
@given(TOKENIZERS, st.data(), st.booleans(), st.booleans())
def test_a_stream_of_any_ids_is_what_decode_gives(
    make: type, data: st.DataObject, skip_special: bool, continuation: bool
) -> None:
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    whole = tokenizer.decode(ids, skip_special=skip_special, continuation=continuation)
    assert stream(tokenizer, ids, skip_special=skip_special, continuation=continuation) == whole


@given(TOKENIZERS, st.text(max_size=30))
def test_any_text_comes_back(make: type, text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text)
    # U+2581 is how SentencePiece writes a space, so it comes back as one
    expected = text.replace(SPACE, " ") if make is spm else text
    assert tokenizer.decode(ids) == stream(tokenizer, ids) == expected


@given(st.binary(max_size=40))
def test_bytes_that_are_not_utf_8_become_what_python_makes_of_them(data: bytes) -> None:
    for tokenizer, first in ((byte_level(), None), (spm(), 3)):
        ids = [tokenizer.encode("a")[0]] if first is None else []
        spelled = {tokenizer.token_bytes(id_): id_ for id_ in reversed(range(tokenizer.vocab_size))}
        ids = [spelled[bytes([byte])] if first is None else first + byte for byte in data]
        assert stream(tokenizer, ids, continuation=True) == data.decode(errors="replace")


def test_half_a_character_is_held_back() -> None:
    tokenizer = load_tokenizer(byte_level_file())
    detokenizer = tokenizer.detokenizer()
    emoji = tokenizer.encode("\U0001f600")
    assert [detokenizer.push(id_) for id_ in emoji] == ["", "", "", "\U0001f600"]
    assert detokenizer.flush() == ""
    assert [detokenizer.push(id_) for id_ in emoji[:3]] == ["", "", ""]
    assert detokenizer.push(tokenizer.encode("x")[0]) == "\ufffdx"
    assert detokenizer.push(emoji[0]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(tokenizer.encode("y")[0]) == "y"


def test_a_character_split_by_a_control_token_is_whole_when_it_is_left_out() -> None:
    tokenizer = byte_level()
    control = tokenizer.vocab_size - 2
    first, second = (tokenizer.encode(c)[0] for c in ("\u00c3", "\u00a9"))
    spelled = {tokenizer.token_bytes(id_): id_ for id_ in range(256)}
    ids = [spelled[b"\xc3"], control, spelled[b"\xa9"]]
    assert tokenizer.decode(ids) == stream(tokenizer, ids) == "\u00e9"
    assert {first, second} <= set(range(tokenizer.vocab_size))


@pytest.mark.parametrize("make", [byte_level, spm])
def test_special_tokens_are_left_out_or_named(make: type) -> None:
    tokenizer = make()
    for id_ in range(tokenizer.vocab_size):
        if tokenizer.is_special(id_):
            assert tokenizer.decode([id_]) == ""
            assert tokenizer.decode([id_], skip_special=False) == tokenizer.token_bytes(id_).decode()
