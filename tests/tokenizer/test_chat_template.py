from __future__ import annotations

import json
import threading
import time
import tracemalloc
from datetime import datetime
from pathlib import Path

import pytest

from pi2rt import _errors as errors
from pi2rt.tokenizer import ChatTemplate, load_tokenizer
from pi2rt.tokenizer.chat_template import MAX_SOURCE_CHARACTERS
from tests.tokenizer.files import byte_level_file, changed
from tests.tokenizer.hostile import FAIL, REFUSED, SLOW
from tests.tokenizer.templates import CHAT, TEMPLATES

GOLDEN = json.loads((Path(__file__).parent / "golden" / "templates.json").read_text())
USER = [{"role": "user", "content": "hi"}]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(USER, **variables)


@pytest.mark.parametrize("name", TEMPLATES)
def test_output_is_what_transformers_makes(name: str) -> None:
    source, variables = TEMPLATES[name]
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    assert template.render(**variables) == GOLDEN["rendered"][name]


def test_variables() -> None:
    source = (
        "{{ bos_token }}{{ tools }}{{ documents }}{{ x }}{{ add_generation_prompt }}{{ messages[0].role }}"
    )
    assert render(source, x=1) == "<s>NoneNone1Trueuser"
    assert render(source, bos_token="<b>", add_generation_prompt=False, tools=[1]) == "<b>[1]NoneFalseuser"


def test_the_templates_own_refusal_is_told() -> None:
    with pytest.raises(errors.TemplateError, match=r"^the chat template says: roles must alternate$"):
        render("{{ raise_exception('roles must alternate') }}")


def test_the_clock() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2024, 7, 26))
    assert template.render(USER) == "26 Jul 2024"


@pytest.mark.parametrize("messages", [["hi"], [{"content": "hi"}], [{"role": 1, "content": ""}], [None]])
def test_messages_have_roles(messages: list[object]) -> None:
    with pytest.raises(errors.RequestError, match="message 0 is not a mapping with a 'role'"):
        ChatTemplate("").render(messages)


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(errors.TemplateError, match="unsafe"):
        ChatTemplate("{{ messages[0].update({'role': 'system'}) }}").render(messages)
    with pytest.raises(errors.TemplateError, match="unsafe"):
        ChatTemplate("{{ messages.append(1) }}").render(messages)
    assert messages == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(("source", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_at_once(source: str, message: str) -> None:
    start = time.thread_time()
    with pytest.raises(errors.TemplateError, match=message):
        # on a busy machine the memory may come after the time otherwise
        ChatTemplate(source, **({"seconds": 60} if "memory" in message else {})).render(USER)
    assert time.thread_time() - start < 4  # compiling the larger ones takes one of them


@pytest.mark.parametrize("source", SLOW.values(), ids=SLOW.keys())
def test_what_never_ends_is_stopped(source: str) -> None:
    template = ChatTemplate(source, seconds=0.1)
    start = time.thread_time()
    # a fast machine may use up the memory first
    with pytest.raises(errors.TemplateError, match=r"ran for over 0\.1 s|over 128 MiB of memory"):
        template.render(USER)
    assert time.thread_time() - start < 1.5


@pytest.mark.parametrize(("source", "output"), FAIL.values(), ids=FAIL.keys())
def test_what_reaches_for_python_finds_nothing(source: str, output: str | None) -> None:
    if output is None:
        with pytest.raises(errors.TemplateError):
            render(source)
    else:
        assert render(source) == output


@pytest.mark.parametrize("name", [name for name in REFUSED if name.startswith("memory")])
def test_memory_stays_small(name: str) -> None:
    template = ChatTemplate(REFUSED[name][0])
    tracemalloc.start()
    try:
        with pytest.raises(errors.TemplateError):
            template.render(USER)
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


def test_source_size() -> None:
    assert render("a" * MAX_SOURCE_CHARACTERS) == "a" * MAX_SOURCE_CHARACTERS
    with pytest.raises(errors.TemplateError, match=r"has 65537 characters; 65536 are allowed"):
        ChatTemplate("a" * (MAX_SOURCE_CHARACTERS + 1))


def test_syntax_errors_name_the_line() -> None:
    with pytest.raises(errors.TemplateError, match=r"is invalid: line 2: TemplateSyntaxError"):
        ChatTemplate("a\n{% if %}")


def test_threads_have_budgets_of_their_own() -> None:
    template = ChatTemplate("{% for i in range(20000) %}{% endfor %}{{ messages[0].content }}", seconds=5)
    results: list[str] = []

    def work(name: str) -> None:
        results.append(template.render([{"role": "user", "content": name}]))

    threads = [threading.Thread(target=work, args=(f"thread {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [f"thread {i}" for i in range(4)]


def test_a_long_conversation_is_within_the_limits() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 1000} for i in range(400)]
    for source in (
        TEMPLATES["chatml"][0],
        "{% for m in messages %}{{ m.content | trim ~ '\n' }}{% endfor %}",
    ):
        assert len(ChatTemplate(source).render(messages)) > 1_900_000


def test_rendering_is_cheap() -> None:
    """A chat turn must not notice it; Jinja alone takes about a third of this."""
    template = ChatTemplate(TEMPLATES["chatml"][0])
    template.render(CHAT)
    best = min(_timed(template) for _ in range(20))
    assert best < 0.005


def _timed(template: ChatTemplate) -> float:
    start = time.thread_time()
    template.render(CHAT)
    return time.thread_time() - start


def test_a_bad_template_in_a_file_harms_nobody_who_does_not_chat() -> None:
    for source, message in (("{% if %}", "is invalid"), (["a"], "chat_template: is a list, not a string")):
        tokenizer = load_tokenizer(byte_level_file(**{"tokenizer.chat_template": source}))
        assert tokenizer.decode(tokenizer.encode("hi")) == "hi"
        with pytest.raises(errors.TemplateError, match=message):
            _ = tokenizer.chat_template
    assert load_tokenizer(byte_level_file()).chat_template is None


def test_a_file_gives_its_template_all_named_tokens() -> None:
    names = ["bos", "eos", "unk", "pad", "sep", "cls", "mask"]
    keys = dict(
        zip(["bos", "eos", "unknown", "padding", "seperator", "cls", "mask"], range(256, 263), strict=True)
    )
    source = "".join(f"{{{{ {name}_token }}}}" for name in names)
    file = byte_level_file(
        control=[f"<{name}>" for name in names],
        **{f"{key}_token_id": id_ for key, id_ in keys.items()},
        **{"tokenizer.chat_template": source},
    )
    template = load_tokenizer(file).chat_template
    assert template is not None
    assert template.render([]) == "".join(f"<{name}>" for name in names)
    file = changed(
        file, {"padding_token_id": 999, "mask_token_id": -1, "cls_token_id": "x", "eos_token_id": None}
    )
    template = load_tokenizer(file).chat_template
    assert template is not None
    assert template.render([]) == "<bos><unk><sep>"  # what only templates use refuses no file


def test_special_tokens_overrule_and_are_overruled() -> None:
    template = ChatTemplate("{{ bos_token }}{{ x_token }}", bos_token="a", special_tokens={"x_token": "b"})
    assert template.render([]) == "ab"
    assert template.render([], x_token="c") == "ac"


def test_a_file_gives_its_template_its_tokens() -> None:
    file = byte_level_file(
        control=["<s>", "</s>"],
        bos_token_id=256,
        eos_token_id=257,
        **{"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"},
    )
    tokenizer = load_tokenizer(file)
    template = tokenizer.chat_template
    assert template is not None
    text = template.render(USER)
    assert text == "<s>hi</s>"
    ids = tokenizer.encode(text, parse_special=True, add_special=False)
    assert ids == [256, *tokenizer.encode("hi"), 257]
