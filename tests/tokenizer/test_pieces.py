"""Text is encoded in pieces: the ids are those of the whole text, and no step does more than a bounded part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pi2rt.tokenizer import load_tokenizer
from pi2rt.tokenizer.byte_bpe import ByteBpe
from pi2rt.tokenizer.byte_level import CHARACTERS, SPACE
from pi2rt.tokenizer.huggingface_encoder import HuggingFaceEncoder
from pi2rt.tokenizer.marked_text import Runs
from pi2rt.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from pi2rt.tokenizer.special_splitter import SpecialSplitter
from pi2rt.tokenizer.spm import Spm
from pi2rt.tokenizer.tokenizer import Encoder
from pi2rt.tokenizer.vocabulary import read_vocabulary
from tests.tokenizer.files import byte_level_file, chain, spm_file

WHOLE = 1 << 40
FAMILIES = {(pre.patterns, pre.nfc, pre.ignore_merges): name for name, pre in PRE_TOKENIZERS.items()}.values()

# characters that the expressions of some family treat differently, and text that splits do not expect
PARTS = [
    " ", "  ", "\n", "\r\n", "\n\n", "\t", "a", "b", "A", "B", "s", "'", "'s", "'T", "0", "1", "9", ".", ",", "!", "?",
    "/", "-", "(", "|", "_", "~", "\u4e2d", "\u6587", "\uff0c", "\u3002", "\u3001", "\u3042", "\u30a2", "\u30fb",
    "\u30fc", "\ud55c", "\u05d0", "\u0628", "\u00e9", "e\u0301", "\u0301", "\u0300\u0323", "\u200d", "\U0001f468",
    "\ufe0f", "\u2026", "\u3000", "\u00a0", "\u0660", "\u00b2", "\u01c5", "\u02b0", "\u1100", "\u1161", "\u11a8",
    "\u0964", "\u2028", "\x85", "\x1c", "\ufb01", "\u00aa", "\U0001f1e9",
]  # fmt: skip


@st.composite
def texts(draw: st.DrawFn, parts: Sequence[str] = PARTS) -> str:
    """Few kinds of parts, so that they meet; some many times over, as in no text that somebody wrote."""
    kinds = draw(st.lists(st.sampled_from(parts), min_size=1, max_size=6))
    part = st.tuples(st.sampled_from(kinds), st.sampled_from([1, 1, 1, 2, 3, 45]))
    return "".join(text * count for text, count in draw(st.lists(part, min_size=4, max_size=60)))


@st.composite
def merges(draw: st.DrawFn) -> list[str]:
    """Of tokens that may mean anything, across words and inside characters."""
    tokens = [CHARACTERS[byte] for byte in " aAbs09'.!\n-\u00e9\u4e2d\u3042\U0001f468".encode()]
    found: dict[tuple[str, str], None] = {}
    for left, right in draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=60)):
        pair = tokens[left % len(tokens)], tokens[right % len(tokens)]
        if len("".join(pair)) <= 12 and pair not in found:
            found[pair] = None
            tokens.append("".join(pair))
    return [f"{left} {right}" for left, right in found]


def ids(encoder: Encoder, text: str, trusted: Runs = ()) -> list[int]:
    return [id_ for piece in encoder.pieces(text, trusted) for id_ in piece]


@pytest.mark.parametrize("pre", FAMILIES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_byte_level_ids_are_those_of_the_whole_text(pre: str, data: st.DataObject) -> None:
    compare(pre, data)


@pytest.mark.slow
@pytest.mark.parametrize("pre", FAMILIES)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_byte_level_ids_are_those_of_many_whole_texts(pre: str, data: st.DataObject) -> None:
    compare(pre, data)


def compare(pre: str, data: st.DataObject) -> None:
    """The ids of pieces of some sizes with those of the whole."""
    user_defined = data.draw(st.sampled_from([(), ("  ",), ("<t>", "b a", "!!")]))
    file = byte_level_file(data.draw(merges()), pre=pre, user_defined=user_defined, bos_token_id=0)
    vocabulary = read_vocabulary(file)
    whole = ByteBpe(vocabulary, WHOLE)
    parts = [ByteBpe(vocabulary, window) for window in (1, 8, 32, 41)]
    for text in data.draw(st.lists(texts(), min_size=1, max_size=4)):
        expected = ids(whole, text)
        for encoder in parts:
            assert ids(encoder, text) == expected


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "gpt-4o", "deepseek-coder", "bloom"])
@settings(max_examples=10, deadline=None)
@given(text=texts())
def test_bytes_that_a_vocabulary_lacks_change_nothing(pre: str, text: str) -> None:
    file = byte_level_file(["! !"], pre=pre, bos_token_id=0)
    lacking = [CHARACTERS[byte] for byte in b"a-" + "\u4e2d".encode()[:1]]
    file.metadata["tokenizer.ggml.tokens"] = [
        f"[{token}]" if token in lacking else token for token in file.metadata["tokenizer.ggml.tokens"]
    ]
    vocabulary = read_vocabulary(file)
    whole = ByteBpe(vocabulary, WHOLE)
    assert ids(ByteBpe(vocabulary, 32), text) == ids(whole, text)
    assert {ord("a"), ord("-")} <= set(whole.dropped)
    assert load_tokenizer(file).least_tokens(text) <= len(ids(whole, text))


@st.composite
def spm_files(draw: st.DrawFn) -> SimpleNamespace:
    alphabet = draw(st.sampled_from(["ab" + SPACE, "a" + SPACE, "abc", "ab\u00e9\u4e2d"]))
    pieces = draw(st.lists(st.text(alphabet, min_size=1, max_size=6), max_size=30, unique=True))
    scores = st.integers(-4, 4).map(float)
    return spm_file(
        [(piece, draw(scores)) for piece in pieces],
        user_defined=draw(st.sampled_from([(), ("  ", "ba ")])),
        control=["<x>"],
        bytes_=draw(st.booleans()),
        add_space_prefix=draw(st.booleans()),
    )


@settings(max_examples=100, deadline=None)
@given(spm_files(), texts(["a", "b", "c", " ", "\u00e9", "\u4e2d", "<x>", "ab"]), st.booleans())
def test_sentencepiece_ids_are_those_of_the_whole_text(file: SimpleNamespace, text: str, parse: bool) -> None:
    trusted: Runs = ((0, len(text)),) if parse else ()
    vocabulary = read_vocabulary(file)
    expected = ids(Spm(vocabulary, WHOLE), text, trusted)
    for window in (1, 2, 5, 17):
        assert ids(Spm(vocabulary, window), text, trusted) == expected
    assert load_tokenizer(file).least_tokens(text) <= len(expected)


def engine(pre: Any, tokens: Sequence[AddedToken | str] = (), normalizer: Any = None) -> Tokenizer:
    pairs = [tuple(merge.split(" ")) for merge in [*chain(" abab"), *chain("\n\n")]]
    words = dict.fromkeys([*CHARACTERS, *("".join(pair) for pair in pairs)])
    vocabulary = {text: id_ for id_, text in enumerate(words)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))  # type: ignore[arg-type]
    made.pre_tokenizer, made.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_tokens(list(tokens))
    return made


def split(*patterns: str) -> Any:
    parts: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(False, use_regex=False)])


def metaspace(*, legacy: bool, tokens: Sequence[AddedToken | str] = ()) -> Tokenizer:
    """As Llama 2's and Gemma's: no split, spaces as U+2581, bytes where a character is no token."""
    words = [
        SPACE,
        "a",
        "b",
        "s",
        SPACE + "a",
        "ab",
        SPACE + SPACE,
        "aa",
        "aaaa",
        "\n",
        "\n\n",
        "b" + SPACE,
        "!",
    ]
    pairs = [(SPACE, "a"), ("a", "b"), (SPACE, SPACE), ("a", "a"), ("aa", "aa"), ("\n", "\n"), ("b", SPACE)]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {text: id_ for id_, text in enumerate(names)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, byte_fallback=True, unk_token="<unk>"))
    if legacy:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]  # type: ignore[list-item]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_tokens(list(tokens))
    return made


QWEN2 = PRE_TOKENIZERS["qwen2"].patterns[0].replace(r"[\p{L}]", r"\p{L}")
KNOWN = {
    "gpt-2": lambda: engine(pre_tokenizers.ByteLevel(False)),
    "smollm": lambda: engine(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    ),
    "Llama 2": lambda: metaspace(legacy=True, tokens=["<|t|>", AddedToken("ab!", normalized=False)]),
    "Mistral": lambda: metaspace(
        legacy=False, tokens=[AddedToken("<|t|>", special=True, normalized=False), "\n\n\n"]
    ),
    "qwen2": lambda: engine(split(QWEN2), ["<|t|>", "  "], normalizers.NFC()),
}
UNKNOWN = {
    "another expression": lambda: engine(split(r"\w+")),
    "a space before text": lambda: engine(pre_tokenizers.ByteLevel(True)),
    "a token with a border in it": lambda: engine(split(QWEN2), ["a b"]),
    "a token that takes spaces in": lambda: engine(split(QWEN2), [AddedToken("<t>", rstrip=True)]),
    "spaces taken in": lambda: metaspace(legacy=True, tokens=[AddedToken("<t>", lstrip=True)]),
    "a normal form": lambda: engine(split(QWEN2), (), normalizers.NFKC()),
}


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN.keys())
@settings(max_examples=25, deadline=None)
@example(
    text="<|t|>" * 45
)  # trusted in part: the names that stand for trusted tokens were themselves spelled out
@given(text=texts([*PARTS, "<|t|>", " abab"]))
def test_known_tokenizer_files_are_encoded_in_pieces(make: Any, text: str) -> None:
    whole = HuggingFaceEncoder(Path("tokenizer.json"), make(), WHOLE)
    for trusted in ((), ((0, len(text)),) if text else (), ((3, 9), (15, 60)) if len(text) > 60 else ()):
        expected = ids(whole, text, trusted)
        for window in (1, 9, 40):
            encoder = HuggingFaceEncoder(Path("tokenizer.json"), make(), window)
            assert ids(encoder, text, trusted) == expected
    assert whole.most_bytes
    assert len(text.encode()) <= len(expected) * whole.most_bytes


@pytest.mark.parametrize("make", [*KNOWN.values(), *UNKNOWN.values()], ids=[*KNOWN.keys(), *UNKNOWN.keys()])
def test_of_what_is_not_known_nothing_is_claimed(make: Any) -> None:
    encoder = HuggingFaceEncoder(Path("tokenizer.json"), make(), 4)
    pieces = list(encoder.pieces("a b ab, c d e", ()))
    assert (len(pieces) > 1) == (make in KNOWN.values())
    if make in UNKNOWN.values():
        assert encoder.most_bytes == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("<ab>", min_size=1, max_size=5), max_size=6, unique=True),
    st.lists(st.sampled_from(["<", "a", "b", ">", "<a>", "x" * 50, "<" * 9]), max_size=60),
    st.integers(1, 40),
)
def test_special_tokens_are_found_whatever_window_they_are_in(
    names: list[str], parts: list[str], window: int
) -> None:
    text = "".join(parts)
    tokens = {name: number for number, name in enumerate(names)}
    expected: list[tuple[int, int, int | None]] = []
    at = text_start = 0
    while at <= len(text):
        found = max((name for name in names if text.startswith(name, at)), key=len, default=None)
        if (found is not None or at == len(text)) and text_start < at:
            expected.append((text_start, at, None))
        if found is None:
            at += 1
            continue
        expected.append((at, at + len(found), tokens[found]))
        at += len(found)
        text_start = at
    splitter = SpecialSplitter(tokens, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pi2rt.tokenizer.special_splitter._WINDOW", window)
        patch.setattr("pi2rt.tokenizer.special_splitter._SKIPPED", window)
        assert [span for span in splitter.split(text, ()) if span is not None] == expected


class Counted:
    """An engine that counts the characters it is given."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.characters = 0

    def encode(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self._engine.encode(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


N = 60_000
LONG = {
    "words": "some words, and more " * (N // 21),
    "one letter": "a" * N,
    "spaces": " " * N,
    "lines": "Hi!" + "\n" * N,
    "spaces and lines": " \n" * (N // 2),
    "digits": "1234567890" * (N // 10),
    "emoji": "\U0001f468\u200d\U0001f469" * (N // 12),
    "Chinese": "".join(chr(0x4E00 + i * 7919 % 20000) for i in range(N // 3)),
    "marks": "e" + "\u0301" * (N // 2),
    "punctuation": "!?-_=+" * (N // 6),
    "base64": "aB3dE/f7gH+iJkL0" * (N // 16),
}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "gpt-4o", "deepseek-coder", "bloom"])
@pytest.mark.parametrize("text", LONG.values(), ids=LONG.keys())
def test_no_step_encodes_more_than_a_few_windows(pre: str, text: str) -> None:
    """However the text is. A step checks at most 16 cuts, of three times the longest token each."""
    file = byte_level_file(chain("a" * 16) + chain(" " * 16), pre=pre, add_bos_token=False)
    encoder = ByteBpe(read_vocabulary(file))
    counted = encoder._engine, encoder._words._engine = (
        Counted(encoder._engine),
        Counted(encoder._words._engine),
    )  # type: ignore[assignment]
    limit = 8 * encoder.window
    if pre in ("llama-bpe", "gpt-4o") and text == LONG["spaces and lines"]:
        limit = (
            2 * N
        )  # only the last line end of such a run tells where a piece ends; nothing but the run is read
    for _ in encoder.pieces(text, ()):
        assert sum(each.characters for each in counted) <= limit  # type: ignore[attr-defined]
        for each in counted:
            each.characters = 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", LONG.values(), ids=LONG.keys())
def test_no_step_merges_more_than_a_few_windows(text: str) -> None:
    pieces = [("a" * n, float(-n)) for n in range(1, 17)] + [(SPACE * n, -9.0) for n in range(1, 9)]
    encoder = Spm(read_vocabulary(spm_file(pieces)))
    merged = 0
    plain = encoder.ends

    def ends(text: str) -> list[int]:
        nonlocal merged
        merged += len(text)
        return plain(text)

    encoder.ends = ends  # type: ignore[method-assign]
    for _ in encoder.pieces(text, ()):
        assert merged <= 8 * encoder.window
        merged = 0


def steps(encoder: Encoder, text: str) -> Iterator[list[int]]:
    return encoder.pieces(text, ())


def test_the_ids_of_the_beginning_come_before_the_end_is_read() -> None:
    """So that a prompt can be refused when the context is full."""
    encoder = ByteBpe(read_vocabulary(byte_level_file(pre="gpt-2")))
    first = next(piece for piece in steps(encoder, "so it goes " * 100_000) if piece)
    assert 0 < len(first) <= encoder.window


@pytest.mark.parametrize("text", ["", "a", "a b c", "\u00e9t\u00e9 \u4e2d\u6587", "<s>" * 9, "\0\0"])
def test_a_lower_bound_is_one(text: str) -> None:
    for file in (byte_level_file(chain("a b c"), control=["<s>"]), spm_file([("a", -1.0)], control=["<t>"])):
        tokenizer = load_tokenizer(file)
        least = tokenizer.least_tokens(text)
        assert least == -(-len(text) // tokenizer.most_bytes)
        assert least <= len(tokenizer.encode(text, parse_special=True, add_special=False))
        assert tokenizer.least_tokens(text.encode()) <= len(tokenizer.encode(text, add_special=False))
        assert tokenizer.least_tokens(text * 1000, 3) <= -(-len(text) * 1000 // tokenizer.most_bytes)
