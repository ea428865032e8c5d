"""Tokens that only the files beside tokenizer.json declare. Values: Transformers 5.24 for the same directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi2rt import _errors as errors
from pi2rt.tokenizer import Tokenizer, load_tokenizer
from pi2rt.tokenizer.declared_tokens import read_declared_tokens
from tests.tokenizer.test_huggingface import byte_level, save

SIZE = byte_level().get_vocab_size()
TEMPLATE = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ image_token }}"


def load(directory: Path, rows: int = SIZE, **files: object) -> Tokenizer:
    return load_tokenizer(save(directory, byte_level(), {"vocab_size": rows}, **files))


def rendered(tokenizer: Tokenizer) -> str:
    template = tokenizer.chat_template
    assert template is not None
    return template.render([])


CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
MAP = {"bos_token": "<unk>", "pad_token": "<s>", "unk_token": {"content": "<unk>", "lstrip": False}}


def test_names_reach_the_template(tmp_path: Path) -> None:
    config = {**CONFIG, "pad_token": "</s>", "unk_token": "<unk>", "image_token": "<img>"}
    assert rendered(load(tmp_path, tokenizer_config=config)) == "<s>|</s>|</s>|<unk>|<img>"


def test_special_tokens_map_overrules_a_config_that_declares_no_tokens(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, tokenizer_config=CONFIG, special_tokens_map=MAP)
    assert rendered(tokenizer) == "<unk>|</s>|<s>|<unk>|"
    assert tokenizer.bos_id == 0


def test_it_only_adds_to_one_that_does(tmp_path: Path) -> None:
    config = {**CONFIG, "added_tokens_decoder": {"1": {"content": "<s>", "special": True}}}
    tokenizer = load(tmp_path, tokenizer_config=config, special_tokens_map=MAP)
    assert rendered(tokenizer) == "<s>|</s>|<s>|<unk>|"
    assert tokenizer.bos_id == 1


def test_only_special_tokens_map_is_there(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load(tmp_path, special_tokens_map={"eos_token": "</s>"})
    assert rendered(tokenizer) == "|</s>|||"
    assert tokenizer.eos_ids == {2, 3}


@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_decoder_adds_at_its_ids(tmp_path: Path, special: bool) -> None:
    declared = {
        str(SIZE + index): {"content": text, "special": special, "normalized": False, "rstrip": index == 1}
        for index, text in enumerate(["<a>", "<b>"])
    }
    tokenizer = load(tmp_path, tokenizer_config={"added_tokens_decoder": declared})
    ids = tokenizer.encode("<a>hi<b>  hi", parse_special=True)
    hi = tokenizer.encode("hi")
    assert ids == [SIZE, *hi, SIZE + 1, *hi]  # rstrip: the token takes the space after it
    assert tokenizer.decode(ids) == ("hihi" if special else "<a>hi<b>hi")
    assert (SIZE in tokenizer.encode("<a>")) is not special
    assert tokenizer.vocab_size == SIZE + 2


def test_added_tokens_file_adds_at_its_ids(tmp_path: Path) -> None:
    tokenizer = load(
        tmp_path, added_tokens={"<b>": SIZE + 1, "[PAD]": SIZE}, special_tokens_map={"pad_token": "[PAD]"}
    )
    assert tokenizer.encode("[PAD]<b>", parse_special=True) == [SIZE, SIZE + 1]
    assert tokenizer.decode([SIZE, SIZE + 1]) == "<b>"
    assert SIZE not in tokenizer.encode("[PAD]")


@pytest.mark.parametrize(("rows", "n"), [(SIZE, 0), (SIZE + 1, 1), (SIZE + 64, 3)])
def test_names_without_an_id_get_the_next_rows_the_model_has(tmp_path: Path, rows: int, n: int) -> None:
    config = {"pad_token": "[PAD]", "additional_special_tokens": ["<a>", {"content": "<b>"}]}
    tokenizer = load(tmp_path, rows, tokenizer_config=config)
    for index, text in enumerate(["[PAD]", "<a>", "<b>"]):
        ids = tokenizer.encode(text, parse_special=True)
        assert (ids == [SIZE + index]) is (index < n)
        assert (tokenizer.decode(ids) == "") is (index < n)


def test_declared_and_named_tokens_are_control_tokens(tmp_path: Path) -> None:
    think = byte_level().token_to_id("<think>")  # added, and not special, in tokenizer.json
    for config in (
        {"added_tokens_decoder": {str(think): {"content": "<think>", "special": True}}},
        {"sep_token": "<think>"},
        {"extra_special_tokens": ["<think>"]},
        {"extra_special_tokens": {"think_token": "<think>"}},
    ):
        tokenizer = load(tmp_path, tokenizer_config=config)
        assert tokenizer.is_special(think)
        assert tokenizer.encode("<think>", parse_special=True) == [think]
        assert think not in tokenizer.encode("<think>")
    assert not load(tmp_path, tokenizer_config={}).is_special(think)


def test_flags_of_added_tokens_decoder_overrule(tmp_path: Path) -> None:
    """But a control token stays one."""
    flags = {"content": "<|im_end|>", "lstrip": True, "rstrip": True, "normalized": False, "special": False}
    tokenizer = load(tmp_path, tokenizer_config={"added_tokens_decoder": {"3": flags}})
    hi = tokenizer.encode("hi")
    assert tokenizer.encode("hi  <|im_end|>  hi", parse_special=True) == [*hi, 3, *hi]
    assert tokenizer.is_special(3)
    assert 3 not in tokenizer.encode("<|im_end|>")


def test_a_pad_token_that_is_text_stays_text(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, tokenizer_config={"pad_token": "!"})
    assert tokenizer.decode(tokenizer.encode("hi!")) == "hi!"


def test_an_id_that_tokenizer_json_contradicts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load(tmp_path, added_tokens={"</s>": 77})
    assert tokenizer.encode("</s>", parse_special=True) == [2]
    assert "'</s>' has the id 77, but tokenizer.json says 2, which is used" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<a>": 2}}, r"added_tokens\.json: '<a>': has the id 2, but in .* '</s>' has it"),
        ({"added_tokens": {"<a>": SIZE + 3}}, f"the next id after its tokens is {SIZE}$"),
        ({"added_tokens": {"<a>": "7"}}, "'<a>': has the id '7', not one from 0 to"),
        ({"added_tokens": {"<a>": -1}}, "'<a>': has the id '-1', not one from 0 to"),
        ({"added_tokens": {"<a>": 1 << 40}}, "not one from 0 to 1048575"),
        ({"added_tokens": []}, r"added_tokens\.json: file: is not a JSON object"),
        ({"special_tokens_map": 1}, r"special_tokens_map\.json: file: is not a JSON object"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "added_tokens_decoder: is not an object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": "a"}}}, "with a 'content' that is a string"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": {"content": 1}}}}, "with a 'content' that is"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}}, "has the id 'x'"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, files: dict[str, object], message: str) -> None:
    with pytest.raises(errors.ModelFormatError, match=message) as caught:
        load(tmp_path, **files)
    assert str(tmp_path) in str(caught.value)


KEYS = st.sampled_from(
    [
        "bos_token",
        "x_token",
        "content",
        "special",
        "added_tokens_decoder",
        "extra_special_tokens",
        "7",
        "\ud800",
    ]
) | st.text(max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(KEYS, children, max_size=4),
    max_leaves=12,
)
OBJECTS: st.SearchStrategy[dict[str, Any]] = st.dictionaries(KEYS, JSON, max_size=5)


@given(OBJECTS, OBJECTS, OBJECTS)
def test_any_json_is_read_or_refused(
    config: dict[str, Any], special_map: dict[str, Any], added: dict[str, Any]
) -> None:
    try:
        found = read_declared_tokens(Path("d"), config, special_map, added)
    except errors.ModelFormatError:
        return
    texts = [*found.names.values(), *found.others, *(each.token.content for each in found.added.values())]
    assert all(texts)
    json.dumps(texts).encode()
