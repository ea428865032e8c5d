from __future__ import annotations

import logging

import numpy as np
import pytest

from pi2rt import _errors as errors
from pi2rt.tokenizer import load_tokenizer
from pi2rt.tokenizer.byte_level import CHARACTERS, token_bytes
from pi2rt.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from tests.tokenizer.files import byte_level_file, chain, changed


def test_the_alphabet_spells_every_byte() -> None:
    assert [token_bytes(character) for character in CHARACTERS] == [bytes([byte]) for byte in range(256)]
    assert token_bytes("\u0120a\u010a") == b" a\n"
    assert token_bytes("a b\u65e5") == "a b\u65e5".encode()  # no spelling of bytes: the text itself


def test_text_never_becomes_a_control_token_unless_asked() -> None:
    tokenizer = load_tokenizer(byte_level_file(control=["<|im_end|>", "<s>"]))
    end = tokenizer.vocab_size - 2
    text = "a<|im_end|>b<s>"
    plain = tokenizer.encode(text)
    assert len(plain) == len(text)
    assert not any(map(tokenizer.is_special, plain))
    parsed = tokenizer.encode(text, parse_special=True)
    assert parsed == [plain[0], end, tokenizer.encode("b")[0], end + 1]
    assert tokenizer.decode(parsed) == "ab"
    assert tokenizer.decode(parsed, skip_special=False) == text


def test_a_word_spelled_like_a_control_token_stays_text_where_merges_are_ignored() -> None:
    file = byte_level_file(control=["EOT"], pre="llama-bpe", bos_token_id=0)
    tokenizer = load_tokenizer(file)
    assert len(tokenizer.encode("EOT", add_special=False)) == 3
    assert tokenizer.encode("EOT", parse_special=True, add_special=False) == [256]


def test_pieces_that_are_tokens_skip_merging_only_where_the_family_says_so() -> None:
    merges = ["b c", "a b", "ab c"]  # "abc" is a token, but merging "bc" first never gets there
    for pre, count in (("llama-bpe", 1), ("dbrx", 2)):
        tokenizer = load_tokenizer(byte_level_file(merges, pre=pre))
        assert len(tokenizer.encode("abc", add_special=False)) == count


def test_user_defined_tokens_are_found_in_any_text() -> None:
    tokenizer = load_tokenizer(byte_level_file(user_defined=["<think>", "<think>>", "  "]))
    first = tokenizer.vocab_size - 3
    assert tokenizer.encode("<think>>x<think>") == [first + 1, tokenizer.encode("x")[0], first]
    assert tokenizer.encode("   ") == [first + 2, tokenizer.encode(" ")[0]]
    assert tokenizer.decode(tokenizer.encode("a   <think>")) == "a   <think>"


@pytest.mark.parametrize(
    ("keys", "prefix", "suffix"),
    [
        ({}, 0, 0),
        ({"add_bos_token": True}, 1, 0),
        ({"add_bos_token": True, "add_eos_token": True}, 1, 1),
        ({"pre": "llama-bpe"}, 1, 0),
        ({"pre": "llama-bpe", "add_bos_token": False}, 0, 0),
        ({"pre": "llama-bpe", "bos_token_id": None}, 0, 0),
    ],
)
def test_ends_are_the_ones_the_file_asks_for(keys: dict[str, object], prefix: int, suffix: int) -> None:
    ids = {"bos_token_id": 256, "eos_token_id": 257}
    tokenizer = load_tokenizer(byte_level_file(control=["<s>", "</s>"], **ids | keys))
    plain = tokenizer.encode("hi", add_special=False)
    assert tokenizer.encode("hi") == [256] * prefix + plain + [257] * suffix
    assert tokenizer.encode("") == [256] * prefix + [257] * suffix


def test_tokens_that_end_a_turn() -> None:
    control = ["<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<pad>", "<custom>"]
    file = byte_level_file(control=control, user_defined=["</s>"], eos_token_id=256, eot_token_id=261)
    assert load_tokenizer(file).eos_ids == {256, 257, 258, 259, 261, 262}


def test_harmony_ends_messages_inside_a_turn() -> None:
    harmony = ["<|end|>", "<|return|>", "<|call|>"]
    assert load_tokenizer(byte_level_file(control=harmony)).eos_ids == {257, 258}
    assert load_tokenizer(byte_level_file(control=harmony[:1])).eos_ids == {256}


def test_ids_outside_the_vocabulary() -> None:
    tokenizer = load_tokenizer(byte_level_file())
    for id_ in (-1, 256, 1 << 40):
        for call in (tokenizer.token_bytes, tokenizer.is_special, tokenizer.detokenizer().push):
            with pytest.raises(errors.RequestError, match=f"token id {id_} is outside the vocabulary of 256"):
                call(id_)
        with pytest.raises(errors.RequestError):
            tokenizer.decode([0, id_])


def test_lone_surrogates_are_no_text() -> None:
    with pytest.raises(errors.RequestError, match=r"lone surrogate U\+D83D at character 2"):
        load_tokenizer(byte_level_file()).encode("ab\ud83d")


def test_duplicate_and_empty_tokens_are_tolerated() -> None:
    file = byte_level_file(["a b"])
    file.metadata["tokenizer.ggml.tokens"] += ["ab", "", ""]
    file.metadata["tokenizer.ggml.token_type"] += [1, 1, 3]
    tokenizer = load_tokenizer(file)
    assert tokenizer.encode("ab") == [257]
    assert tokenizer.token_bytes(256) == tokenizer.token_bytes(257) == b"ab"
    assert tokenizer.decode([258, 259, 257]) == "ab"


def test_numpy_arrays_as_the_gguf_reader_gives_them() -> None:
    file = byte_level_file(control=["<s>"])
    kinds = file.metadata["tokenizer.ggml.token_type"]
    file.metadata["tokenizer.ggml.token_type"] = np.array(kinds, np.int32)
    tokenizer = load_tokenizer(file)
    assert tokenizer.is_special(256)
    assert not tokenizer.is_special(255)


def test_a_missing_split_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_tokenizer(byte_level_file(pre=None))
    assert "test.gguf: no tokenizer.ggml.pre" in caplog.text


BAD = {
    "no tokenizer": ({"model": None}, "model: is missing"),
    "tokenizer of another kind": ({"model": "bert"}, "model: is 'bert'; pi2rt has"),
    "model is no string": ({"model": 5}, "model: is a int, not a string"),
    "split unknown": ({"pre": "new-thing"}, "pre: is 'new-thing', a way to split text"),
    "no tokens": ({"tokens": None}, "tokens: is missing"),
    "tokens empty": ({"tokens": [], "token_type": []}, "tokens: is empty"),
    "tokens are a string": ({"tokens": "abc"}, "tokens: is a str, not an array"),
    "tokens are numbers": ({"tokens": [1, 2]}, "tokens: is not an array of strings"),
    "token too long": ({"tokens": ["a" * 5000]}, "tokens: token 0 has 5000 characters; at most 4096"),
    "vocabulary bomb": ({"tokens": [""] * ((1 << 20) + 1)}, "tokens: has 1048577 entries; at most 1048576"),
    "kinds too few": ({"token_type": [1]}, "token_type: has 1 entries for 256 tokens"),
    "kinds are no numbers": ({"token_type": ["a"] * 256}, "token_type: is not an array of integers"),
    "kinds nested": ({"token_type": np.ones((256, 1), np.int32)}, "token_type: is a ndarray, not an array"),
    "no merges": ({"merges": None}, "merges: is missing"),
    "merge of one": ({"merges": ["ab"]}, "merges: entry 0 is 'ab', not two tokens and a space"),
    "merge of three": ({"merges": ["a b", "a b c", "ab"]}, "merges: entry 1 is 'a b c'"),
    "merge of what is no token": ({"merges": ["a zz"]}, "entry 0, 'a' + 'zz': 'zz' is not a token"),
    "merge to what is no token": ({"merges": ["a b"]}, "entry 0, 'a' + 'b': 'ab' is not a token"),
    "id too large": ({"bos_token_id": 256}, "bos_token_id: is 256, outside the vocabulary of 256 tokens"),
    "id negative": ({"eos_token_id": -7}, "eos_token_id: is -7, outside"),
    "id is a string": ({"eot_token_id": "1"}, "eot_token_id: is a str, not an integer"),
    "id is a boolean": ({"eom_token_id": True}, "eom_token_id: is a bool, not an integer"),
    "flag is a number": ({"add_bos_token": 1}, "add_bos_token: is a int, not a boolean"),
    "flag without its token": (
        {"add_eos_token": True},
        "add_eos_token: is true, but there is no eos_token_id",
    ),
}


@pytest.mark.parametrize(("keys", "message"), BAD.values(), ids=BAD.keys())
def test_bad_metadata_is_named(keys: dict[str, object], message: str) -> None:
    with pytest.raises(errors.ModelFormatError) as caught:
        load_tokenizer(changed(byte_level_file(), keys))
    assert str(caught.value).startswith("test.gguf: tokenizer.ggml.")
    assert message in str(caught.value)


@pytest.mark.parametrize("keys", [{"model": "t5"}, {"pre": "x" * 10_000}])
def test_what_pi2rt_does_not_have_is_unsupported(keys: dict[str, object]) -> None:
    with pytest.raises(errors.UnsupportedModelError) as caught:
        load_tokenizer(byte_level_file(**keys))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_split_keeps_every_byte(name: str) -> None:
    tokenizer = load_tokenizer(byte_level_file(pre=name))
    text = "I'll x12 \t\r\n\n  \u00e9\u65e5\u672c  \U0001f600 a_b//c  "
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


@pytest.mark.parametrize("unit", ["a", " ", "\n", " \n", "\u65e5", "1", "!", "a ", "\U0001f600"])
@pytest.mark.parametrize("name", ["llama-bpe", "tekken", "deepseek-llm"])
def test_long_runs_take_no_longer_than_other_text(name: str, unit: str) -> None:
    """A quadratic split or merge would take minutes for these."""
    tokenizer = load_tokenizer(byte_level_file(chain("aaaaaaaa"), pre=name))
    text = unit * (30_000 // len(unit)) + "x"
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text
