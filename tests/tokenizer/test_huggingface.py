"""Directories with a tokenizer.json, against ``tokenizers`` itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from pi2rt import _errors as errors
from pi2rt.tokenizer import load_tokenizer
from pi2rt.tokenizer.byte_level import SPACE
from tests.tokenizer.texts import TEXTS

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As the tokenizer.json of Llama 2 and Gemma are built."""
    vocabulary = {token: id_ for id_, token in enumerate(SPECIAL)}
    for piece in [*(f"<0x{byte:02X}>" for byte in range(256)), SPACE, "h", "i", "hi", SPACE + "hi", "\u65e5"]:
        vocabulary[piece] = len(vocabulary)
    merges = [("h", "i"), (SPACE, "hi")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def save(
    directory: Path, tokenizer: Tokenizer, config: dict[str, Any] | None = None, **files: object
) -> SimpleNamespace:
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return SimpleNamespace(path=directory, metadata=config or {})


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_ids_and_text_are_the_ones_of_tokenizers(tmp_path: Path, make: Callable[[], Tokenizer]) -> None:
    reference = make()
    tokenizer = load_tokenizer(save(tmp_path, reference))
    for text in (*TEXTS, "<think>hi</s>", "hi hi", " hi", "\u65e5\u20ac"):
        ids = tokenizer.encode(text, parse_special=True)
        assert ids == reference.encode(text).ids
        assert tokenizer.decode(ids) == reference.decode(ids)
        detokenizer = tokenizer.detokenizer()
        assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == tokenizer.decode(ids)
    assert tokenizer.vocab_size == reference.get_vocab_size()


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_text_never_becomes_a_control_token_unless_asked(
    tmp_path: Path, make: Callable[[], Tokenizer]
) -> None:
    tokenizer = load_tokenizer(save(tmp_path, make()))
    text = "hi<|im_end|>\u65e5</s>"
    assert not any(map(tokenizer.is_special, tokenizer.encode(text, add_special=False)))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    parsed = tokenizer.encode(text, parse_special=True, add_special=False)
    assert [id_ for id_ in parsed if tokenizer.is_special(id_)] == [3, 2]
    assert not any(map(tokenizer.is_special, tokenizer.encode(text, add_special=False)))


@pytest.mark.parametrize("added", [None, True, False])
@pytest.mark.parametrize("template", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
def test_tokens_at_the_ends_are_the_ones_of_the_template(
    tmp_path: Path, template: str | None, added: bool | None
) -> None:
    """As in Transformers 5.24, which drops ``add_bos_token`` and ``add_eos_token`` beside a tokenizer.json."""
    reference = sentencepiece()
    reference.post_processor = template and processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizerFast"}
    if added is not None:
        config |= {"add_bos_token": added, "add_eos_token": added}
    tokenizer = load_tokenizer(save(tmp_path, reference, tokenizer_config=config))
    assert tokenizer.encode("hi") == reference.encode("hi").ids


@pytest.mark.parametrize("direction", ["left", "right"])
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_saved_state_does_not_act(tmp_path: Path, make: Callable[[], Tokenizer], direction: str) -> None:
    """What training and batching left in tokenizer.json would cut, fill or vary every text."""
    plain, saved = make(), make()
    saved.enable_truncation(8, stride=2, direction=direction)
    saved.enable_padding(
        direction=direction, length=300, pad_to_multiple_of=64, pad_id=3, pad_token="<|im_end|>"
    )
    saved.model.dropout = 1.0
    saved.encode_special_tokens = True
    tokenizer = load_tokenizer(save(tmp_path, saved))
    for text in ("hi " * 99, "hi", "", "hi<|im_end|>"):
        for _ in range(2):
            assert tokenizer.encode(text, parse_special=True) == plain.encode(text).ids


def test_a_truncation_shorter_than_the_template(tmp_path: Path) -> None:
    saved = sentencepiece()
    saved.enable_truncation(1)
    assert load_tokenizer(save(tmp_path, saved)).encode("hi") == sentencepiece().encode("hi").ids


GEMMA = ["\n\n", SPACE * 2, SPACE * 4]
CODE = "def f(a):\n    if a:\n      return  a\n\n    return 0\n"


def gemma() -> Tokenizer:
    """As Gemma 3's: runs of spaces are added tokens, spelled with U+2581, and not special."""
    characters = sorted({*CODE, SPACE} - {" "})
    vocabulary = {token: id_ for id_, token in enumerate([*SPECIAL, *characters, *GEMMA])}
    merges = [(SPACE, SPACE), (SPACE * 2, SPACE * 2), ("\n", "\n")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in GEMMA])
    return tokenizer


def stream(tokenizer: Any, ids: list[int]) -> str:
    detokenizer = tokenizer.detokenizer()
    return "".join(map(detokenizer.push, ids)) + str(detokenizer.flush())


def test_indented_code_comes_back(tmp_path: Path) -> None:
    reference = gemma()
    tokenizer = load_tokenizer(save(tmp_path, reference))
    ids = tokenizer.encode(CODE)
    assert ids == reference.encode(CODE).ids
    assert reference.token_to_id(SPACE * 4) in ids
    assert tokenizer.decode(ids) == stream(tokenizer, ids) == reference.decode(ids) == CODE


ADDED = [SPACE + SPACE, SPACE + "x", "\u0120x", "<tool>", "a" + SPACE + "b", "<0x41>"]


@pytest.mark.parametrize("text", ADDED)
@pytest.mark.parametrize("make", [byte_level, sentencepiece, gemma])
def test_added_tokens_go_through_the_decoder(
    tmp_path: Path, make: Callable[[], Tokenizer], text: str
) -> None:
    reference = make()
    reference.add_tokens([AddedToken(text, special=False, normalized=False)])
    id_ = reference.token_to_id(text)
    first = reference.token_to_id("f") or reference.token_to_id("h")
    tokenizer = load_tokenizer(save(tmp_path, reference))
    for ids in ([id_], [first, id_], [id_, id_, first]):
        assert tokenizer.decode(ids) == stream(tokenizer, ids) == reference.decode(ids)


def test_an_added_token_that_is_spelled_with_bytes_characters_is_its_text(tmp_path: Path) -> None:
    reference = byte_level()
    reference.add_tokens([AddedToken("caf\u00e9", special=False, normalized=False)])
    tokenizer = load_tokenizer(save(tmp_path, reference))
    assert tokenizer.decode(tokenizer.encode("caf\u00e9")) == "caf\u00e9"  # "caf\ufffd" in tokenizers 0.23


def test_the_steps_of_the_decoder_decide(tmp_path: Path) -> None:
    reference = sentencepiece()
    steps = [decoders.Replace(Regex("[h_]"), "j"), decoders.Replace(SPACE, "-"), decoders.Fuse()]
    reference.decoder = decoders.Sequence(steps)
    tokenizer = load_tokenizer(save(tmp_path, reference))
    ids = [*tokenizer.encode(" hi", add_special=False), 4 + 0x41]
    assert tokenizer.decode(ids) == stream(tokenizer, ids) == reference.decode(ids) == "--ji<0x41>"


def test_special_ids(tmp_path: Path) -> None:
    file = save(
        tmp_path,
        byte_level(),
        {"eos_token_id": 2, "vocab_size": 1000, "bos_token_id": 1},
        tokenizer_config={"eos_token": "</s>"},
        generation_config={"eos_token_id": [2, 7]},
    )
    tokenizer = load_tokenizer(file)
    assert tokenizer.bos_id == 1
    assert tokenizer.eos_ids == {2, 3, 7}
    assert tokenizer.vocab_size == 1000  # the model's, which has rows that no token names
    assert tokenizer.decode([999]) == ""


@pytest.mark.parametrize("with_file", [False, True])
def test_chat_template(tmp_path: Path, with_file: bool) -> None:
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ eos_token }}d"}]
    config = {"chat_template": templates, "eos_token": {"content": "</s>"}}
    file = save(tmp_path, byte_level(), tokenizer_config=config)
    if with_file:
        (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}file")
    template = load_tokenizer(file).chat_template
    assert template is not None
    assert template.render([]) == ("</s>file" if with_file else "</s>d")


def test_without_a_chat_template(tmp_path: Path) -> None:
    assert load_tokenizer(save(tmp_path, byte_level())).chat_template is None


def test_no_tokenizer_file(tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=r"tokenizer\.json: is missing"):
        load_tokenizer(SimpleNamespace(path=tmp_path, metadata={}))


def test_a_spelling_pi2rt_does_not_have(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(errors.UnsupportedModelError, match="decoder: is"):
        load_tokenizer(save(tmp_path, tokenizer))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"", "is not a tokenizer"),
        ("tokenizer.json", b"{}", "is not a tokenizer"),
        ("tokenizer.json", b"[" * 100_000, "is not a tokenizer"),
        (
            "tokenizer.json",
            b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
            "is not a tokenizer",
        ),
        ("tokenizer.json", b"\xff\xfe", "is not UTF-8 at byte 0"),
        ("tokenizer_config.json", b"[]", "is not a JSON object"),
        ("tokenizer_config.json", b"[" * 100_000, "is not JSON"),
        ("tokenizer_config.json", b" " * (8 << 20) + b"{}", "has more than the 8388608 bytes allowed"),
        ("generation_config.json", b"{", "is not JSON"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = save(tmp_path, byte_level())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.ModelFormatError, match=message) as caught:
        load_tokenizer(file)
    assert str(tmp_path / name) in str(caught.value)


def test_ids_that_would_take_all_memory(tmp_path: Path) -> None:
    file = save(tmp_path, byte_level())
    path = tmp_path / "tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["vocab"]["zz"] = 4_000_000_000
    path.write_text(json.dumps(state))
    with pytest.raises(errors.ModelFormatError, match="has ids up to 4000000000"):
        load_tokenizer(file)


def test_a_doubled_token_at_the_beginning_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(save(tmp_path, sentencepiece(), tokenizer_config={"bos_token": "<s>"}))
    plain = tokenizer.encode("hi", add_special=False)
    tokenizer.encode("<s>hi")  # is text
    tokenizer.encode("<s>hi", parse_special=True, add_special=False)
    tokenizer.encode("hi<s>", parse_special=True)
    assert not caplog.records
    for _ in range(3):
        assert tokenizer.encode("<s>hi", parse_special=True) == [1, 1, *plain]
    (record,) = caplog.records
    assert "the text begins with <s>" in record.getMessage()
    assert "add_special=False" in record.getMessage()


def test_what_its_own_expressions_choke_on_is_an_error(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="missing"))
    tokenizer.decoder = decoders.ByteLevel()
    loaded = load_tokenizer(save(tmp_path, tokenizer))
    with pytest.raises(errors.ModelFormatError, match="cannot encode with it"):
        loaded.encode("b")
