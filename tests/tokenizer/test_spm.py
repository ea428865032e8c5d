from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt import _errors as errors
from pi2rt.tokenizer import load_tokenizer
from pi2rt.tokenizer.byte_level import SPACE
from pi2rt.tokenizer.vocabulary import TokenKind
from tests.tokenizer.files import changed, spm_file
from tests.tokenizer.texts import TEXTS
from tests.tokenizer.tok512 import read_tok512, tok512_file

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tok512.json").read_text())


def llama2_c(entries: list[tuple[str, float]], text: str) -> list[int]:
    """``encode`` of llama2.c's run.c: while there are neighbours that join to a token, join those with the
    best score, the first of equals."""
    ids = {token: id_ for id_, (token, _) in enumerate(entries)}
    tokens = [ids[" "]] if text else []
    for character in text:
        if character in ids:
            tokens.append(ids[character])
        else:
            tokens += [byte + 3 for byte in character.encode()]
    while True:
        best, best_at = -1e10, None
        for at in range(len(tokens) - 1):
            joined = ids.get(entries[tokens[at]][0] + entries[tokens[at + 1]][0])
            if joined is not None and entries[joined][1] > best:
                best, best_at, best_id = entries[joined][1], at, joined
        if best_at is None:
            return tokens
        tokens[best_at : best_at + 2] = [best_id]


STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.\n"
    'One day, she saw a big, red ball. "Mom!" she said.  "It\'s too high\u2026"\n'
)


@pytest.mark.parametrize("text", [*TEXTS, STORY, STORY * 3, "\u2122\u2122 tttthe hehe  ~[]"])
def test_ids_are_the_ones_of_llama2_c(text: str) -> None:
    tokenizer = load_tokenizer(tok512_file())
    # llama2.c knows no user-defined tokens, and reads U+2581 as itself, not as a space
    if SPACE not in text:
        assert tokenizer.encode(text) == [1, *llama2_c(read_tok512(), text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace(SPACE, " ")


@settings(max_examples=40)
@given(st.text(alphabet="the aTwn\n\u00e9\U0001f600.<s>", max_size=60))
def test_ids_are_the_ones_of_llama2_c_for_any_text(text: str) -> None:
    tokenizer = load_tokenizer(tok512_file())
    assert tokenizer.encode(text, add_special=False) == llama2_c(read_tok512(), text)


@pytest.mark.parametrize("index", range(len(TEXTS)))
def test_ids_are_the_ones_of_llama_cpp(index: int) -> None:
    tokenizer = load_tokenizer(tok512_file(add_bos_token=False))
    assert tokenizer.encode(TEXTS[index]) == GOLDEN["text"][index]
    assert tokenizer.encode(TEXTS[index], parse_special=True) == GOLDEN["special"][index]


@st.composite
def small_vocabularies(draw: st.DrawFn) -> list[tuple[str, float]]:
    """Tokens of three letters, with few scores, so that many pairs are equally good."""
    pieces = draw(st.lists(st.text("ab" + SPACE, min_size=2, max_size=5), max_size=25, unique=True))
    scores = st.integers(-3, 3).map(float)
    return [(piece, draw(scores)) for piece in ["a", "b", SPACE, *pieces]]


@settings(max_examples=60)
@given(small_vocabularies(), st.text("ab c", max_size=24))
def test_the_best_pair_merges_first_and_of_equals_the_leftmost(
    pieces: list[tuple[str, float]], text: str
) -> None:
    tokenizer = load_tokenizer(spm_file(pieces, add_bos_token=False, add_space_prefix=False))
    scores = dict(pieces)
    symbols = list(text.replace(" ", SPACE))
    while True:
        pairs = [(left + right, at) for at, (left, right) in enumerate(pairwise(symbols))]
        known = [(-scores[joined], at, joined) for joined, at in pairs if joined in scores]
        if not known:
            break
        _, at, joined = min(known)
        symbols[at : at + 2] = [joined]
    expected = [symbol.replace(SPACE, " ").encode() for symbol in symbols]
    assert [tokenizer.token_bytes(id_) for id_ in tokenizer.encode(text)] == expected


def test_what_is_no_token_becomes_its_bytes() -> None:
    tokenizer = load_tokenizer(spm_file([("a", -1.0)], add_space_prefix=False, add_bos_token=False))
    ids = tokenizer.encode("a\u20ac a\n")
    assert [tokenizer.token_bytes(id_) for id_ in ids] == [
        b"a", b"\xe2", b"\x82", b"\xac", b"\xe2", b"\x96", b"\x81", b"a", b"\n",
    ]  # fmt: skip


def test_without_byte_tokens_it_becomes_the_unknown_token() -> None:
    file = spm_file([("a", -1.0), (SPACE, -2.0)], bytes_=False, add_space_prefix=False, add_bos_token=False)
    tokenizer = load_tokenizer(file)
    assert tokenizer.encode("a\u20ac a") == [3, 0, 4, 3]
    assert tokenizer.is_special(0)


def test_a_space_before_text_comes_and_goes() -> None:
    pieces = [(SPACE, -9.0), (SPACE + "a", -1.0), ("a", -2.0), (SPACE + SPACE, -3.0)]
    with_prefix = load_tokenizer(spm_file(pieces, add_bos_token=False))
    without = load_tokenizer(spm_file(pieces, add_bos_token=False, add_space_prefix=False))
    for text in ("a", " a", "  a", "a ", " ", "", "a a"):
        for tokenizer in (with_prefix, without):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    (a,) = with_prefix.encode("a")
    assert with_prefix.token_bytes(a) == b" a"
    assert with_prefix.decode([a, a]) == "a a"
    assert with_prefix.decode([a, a], continuation=True) == " a a"
    assert without.decode([a, a]) == " a a"
    assert with_prefix.decode([1, a]) == "a"  # <s> is left out, so the text begins with the token after it
    assert with_prefix.decode([1, a], skip_special=False) == "<s> a"


def test_control_tokens_begin_text_anew() -> None:
    pieces = [(SPACE, -9.0), (SPACE + "a", -1.0), ("a", -2.0)]
    tokenizer = load_tokenizer(spm_file(pieces, control=["<turn>"]))
    turn = tokenizer.vocab_size - 1
    (a,) = tokenizer.encode("a", add_special=False)
    assert tokenizer.encode("a<turn>a", parse_special=True) == [1, a, turn, a]
    assert turn not in tokenizer.encode("a<turn>a")


def test_text_spelled_like_control_tokens_stays_text_though_its_parts_merge() -> None:
    pieces = [("<", -1.0), ("s", -2.0), (">", -3.0), ("<s", -0.5), (SPACE, -9.0)]
    tokenizer = load_tokenizer(spm_file(pieces, add_bos_token=False))
    assert [tokenizer.token_bytes(id_) for id_ in tokenizer.encode("<s>")] == [b" ", b"<s", b">"]


def test_user_defined_tokens_with_spaces_match_spaces() -> None:
    """As Gemma has them for indents and line ends."""
    runs = [SPACE * 4, SPACE * 2, "  ", "\n\n", "<table>"]
    pieces = [(SPACE, -9.0), ("a", -2.0), (SPACE + "a", -1.0), ("\n", -3.0)]
    file = spm_file(pieces, user_defined=runs, add_space_prefix=False, add_bos_token=False)
    tokenizer = load_tokenizer(file)
    text = "a    a\n\n\n  <table> a"
    spelled = [tokenizer.token_bytes(id_) for id_ in tokenizer.encode(text)]
    assert spelled == [b"a", b"    ", b"a", b"\n\n", b"\n", b"  ", b"<table>", b" a"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("prefix", [True, False])
def test_user_defined_tokens_are_found_as_sentencepiece_does(prefix: bool) -> None:
    """One space before the whole text, none after a user-defined token."""
    golden = json.loads((Path(__file__).parent / "golden" / "user_defined.json").read_text())
    file = spm_file(
        golden["pieces"], user_defined=golden["user_defined"], add_bos_token=False, add_space_prefix=prefix
    )
    tokenizer = load_tokenizer(file)
    found = [tokenizer.encode(text) for text in golden["texts"]]
    assert found == golden["with_prefix" if prefix else "without_prefix"]
    assert [tokenizer.decode(ids) for ids in found] == golden["texts"]


def test_text_begins_anew_after_tokens_that_sentencepiece_never_had() -> None:
    """As in llama.cpp: converters give added tokens this score."""
    pieces = [(SPACE, -9.0), (SPACE + "a", -1.0), ("a", -2.0)]
    file = spm_file(pieces, user_defined=["<own>", "<added>"], add_bos_token=False)
    file.metadata["tokenizer.ggml.scores"][-1] = -1000.0
    tokenizer = load_tokenizer(file)
    added = tokenizer.vocab_size - 1
    own, space, prefixed, plain = added - 1, added - 4, added - 3, added - 2
    assert tokenizer.encode("<added>a") == [added, prefixed]
    assert tokenizer.encode("a<added>a") == [prefixed, added, prefixed]
    assert tokenizer.encode("<own>a") == [space, own, plain]
    assert tokenizer.encode("a<added><own>a</s>a", parse_special=True) == [
        prefixed, added, space, own, plain, 2, prefixed,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "kinds", [(TokenKind.NORMAL,) * 2, (TokenKind.BYTE,) * 2, (TokenKind.NORMAL, TokenKind.BYTE)]
)
def test_bytes_are_found_by_name(kinds: tuple[TokenKind, TokenKind]) -> None:
    file = spm_file([(SPACE, -3.0), ("a", -1.0), ("b", -2.0), (SPACE + "a", -0.5)])
    file.metadata["tokenizer.ggml.token_type"][3:259] = [int(kinds[byte % 2]) for byte in range(256)]
    tokenizer = load_tokenizer(file)
    ids = tokenizer.encode("a\nb", add_special=False)
    assert ids == [262, 13, 261]
    assert tokenizer.decode(ids) == "a\nb"
    assert tokenizer.decode([3 + byte for byte in "\u20ac".encode()]) == "\u20ac"


def test_names_of_bytes_are_text_where_some_are_missing() -> None:
    pieces = [(character, -2.0) for character in "<0xA>"] + [(SPACE, -3.0), ("<0x0A>", -1.0), ("<0", -1.5)]
    tokenizer = load_tokenizer(spm_file(pieces, bytes_=False, add_bos_token=False, unknown_token_id=0))
    assert tokenizer.decode([tokenizer.vocab_size - 2]) == "<0x0A>"
    assert tokenizer.encode("\n")[-1] == 0


@pytest.mark.parametrize(
    "text", ["ab" * 20_000, "a" * 40_000, "the cat " * 12_000, "\u65e5" * 30_000, "\0" * 30_000]
)
def test_long_text_is_quick(text: str) -> None:
    """Merging in quadratic time would take hours."""
    pieces = [("a" * n, float(-n)) for n in range(1, 17)] + [("ab", -1.5), ("b", -20.0), ("abab", -1.2)]
    tokenizer = load_tokenizer(spm_file([*pieces, (SPACE, -30.0)]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_numpy_scores() -> None:
    file = spm_file([("a", -1.0), (SPACE, -2.0)])
    file.metadata["tokenizer.ggml.scores"] = np.array(file.metadata["tokenizer.ggml.scores"], np.float32)
    assert load_tokenizer(file).decode(load_tokenizer(file).encode("a a")) == "a a"


BAD = {
    "no scores": ({"scores": None}, "scores: is missing"),
    "too few scores": ({"scores": [0.0]}, "scores: has 1 entries for 260 tokens"),
    "NaN": ({"scores": [0.0] * 7 + [float("nan")] + [0.0] * 252}, "scores: entry 7 is not a number"),
    "scores are strings": ({"scores": ["0"] * 260}, "scores: is not an array of numbers"),
    "no kinds": ({"token_type": None}, "token_type: is missing"),
    "a byte is missing": (
        {"tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(255)), "x", "a"]},
        "tokens: has 255 of the 256 byte tokens; <0xFF> is missing",
    ),
    "prefix is a number": ({"add_space_prefix": 0}, "add_space_prefix: is a int, not a boolean"),
}


@pytest.mark.parametrize(("keys", "message"), BAD.values(), ids=BAD.keys())
def test_bad_metadata_is_named(keys: dict[str, object], message: str) -> None:
    with pytest.raises(errors.ModelFormatError, match=r"^test\.gguf: tokenizer\.ggml\.") as caught:
        load_tokenizer(changed(spm_file([("a", -1.0)]), keys))
    assert message in str(caught.value)
