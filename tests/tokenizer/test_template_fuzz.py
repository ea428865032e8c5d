"""Any template is rendered, or refused by a TemplateError, in bounded time."""

from __future__ import annotations

import re
import time
from datetime import datetime
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pi2rt import _errors as errors
from pi2rt.tokenizer import ChatTemplate, chat_template, template_sandbox
from tests.tokenizer.hostile import FAIL, REFUSED, SLOW

SECONDS = 0.05
MESSAGES = [{"role": "user", "content": "hi \u00e9\n" * 3}, {"role": "assistant", "content": "x"}]


def words(*texts: str) -> st.SearchStrategy[str]:
    return st.sampled_from(" ".join(texts).split(" "))


NAMES = st.sampled_from(
    ["a", "b", "ns", "ns.x", "messages", "messages[0].content", "loop", "caller", "m", "bos_token", "tools"]
)
NUMBERS = st.sampled_from(["0", "1", "2", "-1", "3", "1000", "99999", "10**9", "2.5", "1e300"])
FILTERS = words(
    "abs attr batch capitalize center count default dictsort e escape first float format groupby indent int",
    "items join last length list lower map max min reject rejectattr replace reverse round safe select",
    "selectattr slice sort string sum title tojson trim truncate unique upper",
)
METHODS = words(
    "split rsplit splitlines strip lstrip rstrip replace join format center zfill ljust upper count find",
    "rfind items keys values get partition startswith title index encode __class__ next",
)
FUNCTIONS = words("range dict namespace cycler joiner m loop caller strftime_now self.a ns")
BINARY = words("+ - * / // % ** ~ == < in and or")


def _compound(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    arguments = st.lists(inner, max_size=3).map(", ".join)
    return st.one_of(
        st.builds("({} {} {})".format, inner, BINARY, inner),
        st.builds("({} | {})".format, inner, FILTERS),
        st.builds("({} | {}({}))".format, inner, FILTERS, arguments),
        st.builds("({} | map('{}'))".format, inner, FILTERS),
        st.builds("{}.{}({})".format, inner, METHODS, arguments),
        st.builds("{}({})".format, FUNCTIONS, arguments),
        st.builds("[{}]".format, arguments),
        st.builds("({},)".format, inner),
        st.builds("{{{}: {}}}".format, inner, inner),
        st.builds("{}[{}:{}]".format, inner, inner, inner),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("({} is {})".format, inner, st.sampled_from(["odd", "string", "iterable", "defined"])),
    )


STRINGS = st.sampled_from(["''", "'a'", "'\u3042b '", "'%s%d'", "'{}{0}'", "'%99999d'", "'content'", "'\\n'"])
EXPRESSIONS = st.recursive(st.one_of(NAMES, NUMBERS, STRINGS), _compound, max_leaves=8)


def _block(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("{{% for a in {} %}}{}{{% endfor %}}".format, EXPRESSIONS, inner),
        st.builds(
            "{{% for a in {} if {} recursive %}}{}{{% endfor %}}".format, EXPRESSIONS, EXPRESSIONS, inner
        ),
        st.builds("{{% for a in range(999) %}}{}{{% endfor %}}".format, inner),
        st.builds("{{% if {} %}}{}{{% else %}}{}{{% endif %}}".format, EXPRESSIONS, inner, inner),
        st.builds("{{% set b %}}{}{{% endset %}}".format, inner),
        st.builds("{{% macro m(a) %}}{}{{% endmacro %}}{}".format, inner, inner),
        st.builds("{{% call m(1) %}}{}{{% endcall %}}".format, inner),
        st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, FILTERS, inner),
        st.builds("{{% generation %}}{}{{% endgeneration %}}".format, inner),
        st.builds("{{% set ns = namespace(x='ab') %}}{}".format, inner),
    )


LEAVES = st.one_of(
    st.builds("{{{{ {} }}}}".format, EXPRESSIONS),
    st.builds("{{% set a = {} %}}".format, EXPRESSIONS),
    st.builds("{{% set ns.x = {} %}}".format, EXPRESSIONS),
    st.sampled_from(["{% break %}", "{% continue %}", "text", "{{ caller() }}", "{{ m(m) }}"]),
)
TEMPLATES = st.recursive(LEAVES, _block, max_leaves=6)

# what tells Jinja's lexer and parser something
TOKENS = st.lists(
    words(
        "{{ }} {% %} {# #} {%- -%} ( ) [ ] { } | . , : ~ + ** ' \" \\ for in if endif else set = raw endraw",
        "macro endfor block a 1 1e9 not is _ \n \0 \ud800 \u2028",
    ),
    max_size=40,
).map(" ".join)


def check(source: str) -> None:
    start = time.thread_time()
    try:
        result = ChatTemplate(source, seconds=SECONDS).render(MESSAGES)
    except errors.TemplateError as error:
        result = str(error)[:1001]
        assert len(result) <= 1000  # whatever the error, it must not repeat a whole prompt
    assert isinstance(result, str)
    assert time.thread_time() - start < 20 * SECONDS


@given(TEMPLATES)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_programs(source: str) -> None:
    check(source)


@given(TOKENS)
@settings(deadline=None, max_examples=60)
def test_tokens(source: str) -> None:
    check(source)


def outcome(source: str) -> str:
    template = partial(ChatTemplate, seconds=1, bos_token="<s>", now=lambda: datetime(2026, 11, 30))
    try:
        return re.sub("at 0x[0-9a-f]+", "at an address", template(source).render(MESSAGES))
    except errors.TemplateError as error:
        limited = any(limit in str(error) for limit in ("ran for over", "MiB of memory"))
        return "over a limit" if limited else "an error"  # its text may name the type of a string


def check_marks(source: str) -> None:
    """That strings know where they come from changes nothing of what they say."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (template_sandbox, chat_template):
            patch.setattr(module, "trusted", str)
        expected = outcome(source)
    found = outcome(source)
    if "over a limit" not in (expected, found):
        assert found == expected


@given(TEMPLATES)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_marks_change_no_text(source: str) -> None:
    check_marks(source)


@pytest.mark.slow
@given(TEMPLATES)
@settings(deadline=None, max_examples=1500, suppress_health_check=list(HealthCheck))
def test_marks_change_no_text_for_longer(source: str) -> None:
    check_marks(source)


@pytest.mark.slow
@given(TEMPLATES)
@settings(deadline=None, max_examples=800, suppress_health_check=list(HealthCheck))
def test_programs_for_longer(source: str) -> None:
    check(source)


@pytest.mark.slow
@given(st.one_of(TOKENS, st.text()))
@settings(deadline=None, max_examples=2000, suppress_health_check=list(HealthCheck))
def test_tokens_for_longer(source: str) -> None:
    check(source)


@pytest.mark.slow
@given(
    st.lists(
        st.sampled_from([*(s for s, _ in REFUSED.values()), *SLOW.values(), *(s for s, _ in FAIL.values())]),
        min_size=2,
        max_size=3,
    ),
    st.data(),
)
@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
def test_mixtures_of_hostile_templates(sources: list[str], data: st.DataObject) -> None:
    """Halves of known attacks, stuck together."""
    source = "".join(part[: data.draw(st.integers(0, min(len(part), 400)))] for part in sources)
    check(source)
