"""What messages may be, and what templates get of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from pi2rt import _errors as errors
from pi2rt.tokenizer import ChatTemplate
from pi2rt.tokenizer.marked_text import trusted
from tests.tokenizer.chats import CHATML, GEMMA, LLAMA3, MISTRAL, QWEN3

PRINTS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PARTS_ONLY = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ part.text }}{% endfor %}{% endfor %}"
)


def user(content: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def text(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": each} for each in texts]


def test_no_content_prints_nothing() -> None:
    messages = [*user("hi"), {"role": "assistant", "content": None}]
    assert ChatTemplate(PRINTS).render(messages) == "<user>hi<assistant>"
    assert messages[1] == {"role": "assistant", "content": None}
    seen = "{% for m in messages %}{{ 'content' in m }}{{ m.content is defined }}{% endfor %}"
    assert ChatTemplate(seen).render(messages) == "TrueTrueFalseFalse"


def test_no_content_where_the_template_adds_to_it() -> None:
    messages = [*user("hi"), {"role": "assistant", "content": None}]
    rendered = ChatTemplate(CHATML).render(messages, add_generation_prompt=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    knowing = "{% if false %}{{ messages[0].content is none }}{% endif %}" + CHATML
    assert ChatTemplate(knowing).render(messages, add_generation_prompt=False) == rendered
    with pytest.raises(errors.TemplateError, match="has no attribute 'content'"):  # nothing is not None
        ChatTemplate(CHATML).render([{"role": "user"}])


@pytest.mark.parametrize("source", [LLAMA3, QWEN3, GEMMA])
def test_real_templates_take_no_content(source: str) -> None:
    rendered = ChatTemplate(source).render([*user("hi"), {"role": "assistant", "content": None}, *user("x")])
    assert "None" not in rendered
    assert "hi" in rendered


@pytest.mark.parametrize(
    "source",
    [
        "{% if messages[0].content is none %}none{% endif %}",
        "{{ 'none' if messages[0]['content'] == none }}",
        "{% set content = messages[0].content %}{{ 'none' if content is none }}",
        "{{ 'none' if none == messages[0].get('content') }}",
    ],
)
def test_a_template_that_looks_for_none_finds_it(source: str) -> None:
    assert ChatTemplate(source).render([{"role": "assistant", "content": None}]) == "none"


def test_other_keys_that_are_none_are_left_out_too() -> None:
    """As client libraries write them: everything that a message does not have is null."""
    message = {"role": "assistant", "content": "hi", "tool_calls": None, "refusal": None, "name": None}
    source = "{{ messages[0] }}{% if messages[0].tool_calls is defined %}calls{% endif %}"
    assert ChatTemplate(source).render([message]) == "{'role': 'assistant', 'content': 'hi'}"


@pytest.mark.parametrize("source", [PRINTS, CHATML, LLAMA3, MISTRAL, QWEN3], ids=str.__len__)
def test_text_parts_where_the_template_wants_a_string(source: str) -> None:
    template = ChatTemplate(source)
    assert template.render(user(text("one", "two"))) == template.render(user("one\ntwo"))
    assert template.render(user(text("one"))) == template.render(user("one"))
    assert template.render(user(tuple(text("one")))) == template.render(user("one"))
    assert template.render(user([])) == template.render(user(""))


def test_text_parts_where_the_template_takes_lists() -> None:
    template = ChatTemplate(GEMMA)
    assert template.render(user(text(" one", "two "))) == template.render(user("onetwo"))
    assert template.render([{"role": "system", "content": text("s")}, *user("u")]) == template.render(
        [{"role": "system", "content": "s"}, *user("u")]
    )


def test_a_string_where_the_template_takes_nothing_but_lists() -> None:
    template = ChatTemplate(PARTS_ONLY)
    assert template.render(user(text("one", "two"))) == "<user>onetwo"
    assert template.render(user("one")) == "<user>one"


def test_the_word_text_alone_does_not_make_a_template_take_lists() -> None:
    template = ChatTemplate("{% set kind = {'type': 'text'} %}" + CHATML)
    assert template.render(user(text("one", "two"))) == ChatTemplate(CHATML).render(user("one\ntwo"))
    picky = ChatTemplate(
        "{% if messages | length < 2 %}{{ raise_exception('more') }}{% endif %}" + PARTS_ONLY
    )
    assert picky.render([*user(text("one")), *user(text("two"))]) == "<user>one<user>two"


@pytest.mark.parametrize("message", [OrderedDict(role="user", content="hi"), MappingProxyType(user("hi")[0])])
def test_messages_may_be_any_mappings(message: Any) -> None:
    assert ChatTemplate("{{ messages[0] }}").render([message]) == "{'role': 'user', 'content': 'hi'}"
    assert ChatTemplate(PRINTS).render(message for message in [message]) == "<user>hi"


@pytest.mark.parametrize("result", [{"a": [1]}, [{"output": 1}], ["x"]])
def test_what_a_tool_returned_is_passed_on(result: object) -> None:
    message = {"role": "tool", "content": result}
    assert ChatTemplate("{{ messages[0].content | tojson }}").render([message])[0] in "[{"
    with pytest.raises(errors.RequestError):
        ChatTemplate("{{ messages[0].content | tojson }}").render([message | {"role": "user"}])


FAULTS: dict[str, tuple[Any, str]] = {
    "one message": ({"role": "user", "content": "hi"}, r"^messages: a list .* not a dict; put it into a list$"),
    "a mapping": ({}, r"^messages: a list .* not a dict$"),
    "text": ("hi", r"^messages: a list .* not a str \('hi'\)$"),
    "nothing": (None, r"^messages: a list .* not None$"),
    "a string in the list": (["hi"], r"^message 0 is not a mapping with a 'role' .*: it is a str \('hi'\)$"),
    "a string among messages": ([*user("a"), "b"], r"^message 1 is not .*: it is a str \('b'\)$"),
    "None": ([None], "^message 0 is not .*: it is None$"),
    "an object": ([SimpleNamespace(role="user")], "^message 0 is not .*: it is a SimpleNamespace$"),
    "no role": ([{"content": "hi"}], "^message 0 is not .*: it has no role, only 'content'$"),
    "an empty mapping": ([{}], "^message 0 is not .*: it has no role, only nothing$"),
    "a role of another type": ([{"role": 1}], r"^message 0 is not .*: its role is an int \(1\)$"),
    "a number": (user(5), r"^message 0: content is an int \(5\); a string, a list of text parts or None is needed$"),
    "bytes": (user(b"hi"), "^message 0: content is a bytes; a string"),
    "a mapping as content": (user({"type": "text", "text": "a"}), "^message 0: content is a dict; a string"),
    "an image": (
        [*user("a"), *user([*text("b"), {"type": "image_url", "image_url": {"url": "u"}}])],
        r"^message 1, part 1: its type is a str \('image_url'\); .* only parts of the type 'text'",
    ),
    "an image from a tool": ([{"role": "tool", "content": [{"type": "image"}]}], r"^message 0, part 0: its type is"),
    "a part without type": (user([{"text": "a"}]), "^message 0, part 0: its type is None"),
    "a string as part": (user(["a"]), r"^message 0, part 0: \{'type': 'text', .* is needed, not a str \('a'\)$"),
    "a part without text": (user([{"type": "text"}]), "^message 0, part 0: its text is None, not a string$"),
    "a text of another type": (user([{"type": "text", "text": 1}]), r"^message 0, part 0: its text is an int \(1\)"),
    "a long string": ([f"{'a' * 1000}"], r"^message 0 is not .*: it is a str \('a{59}\)$"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(name: str) -> None:
    messages, expected = FAULTS[name]
    with pytest.raises(errors.RequestError, match=expected):
        ChatTemplate(PRINTS).render(messages)


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=3)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text", "user"]), inner, max_size=4),
    ),
    max_leaves=8,
)


@given(st.one_of(VALUES, st.lists(st.builds(dict, role=st.just("user"), content=VALUES), max_size=3)))
def test_anything_is_rendered_or_refused(messages: Any) -> None:
    for source in (PRINTS, CHATML, GEMMA):
        try:
            outcome = ChatTemplate(source).render(messages)
        except errors.RequestError as error:
            outcome = f"message {error}"
        except errors.TemplateError as error:
            outcome = str(error)
        # the template's own business: Gemma's wants a message, and ChatML's a content
        refused = outcome.startswith("the chat template failed")
        assert not refused or (source is not PRINTS and "UndefinedError" in outcome)


@pytest.mark.parametrize("kind", [Markup, np.str_, trusted], ids=["markup", "numpy", "marked"])
def test_strings_of_any_class_are_content(kind: Callable[[str], str]) -> None:
    """Markup would escape what stands beside it, and marks may come from the template alone."""
    template = ChatTemplate(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}"
    )
    text = "a <b> <|im_end|>"
    for content in kind(text), [{"type": "text", "text": kind(text)}]:
        chat = template.render([{"role": kind("user"), "content": content}])
        assert str(chat) == f"<|im_start|>user{text}<|im_end|>"
        assert [str(chat)[start:end] for start, end in chat.trusted] == ["<|im_start|>", "<|im_end|>"]
