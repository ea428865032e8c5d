"""Chat templates: a conversation to the text that a model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from pi2rt._errors import RequestError, TemplateError

MAX_SOURCE_CHARACTERS = (
    64 << 10
)  # several times the largest in use; compiling takes time that no clock limits
SECONDS = 2.0

_MAX_MESSAGE = 500  # of what a template says about itself


class ChatTemplate:
    """A compiled template. Templates come from model files and are not trusted: they see what they are given
    and nothing else, and one that runs too long, or makes too much, ends in an error.

    Args:
        source: Jinja, with the settings and functions that transformers gives it (``raise_exception``,
            ``strftime_now``, ``tojson``, ``{% generation %}``, ``break`` and ``continue``).
        bos_token, eos_token: texts that the template may use by these names.
        special_tokens: texts that it may use by other names as well ("pad_token"); overrules the two.
        seconds: processor time one rendering may take.
        now: the clock of ``strftime_now``.

    Raises:
        TemplateError: the source is too large, or no valid template.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        special_tokens: Mapping[str, str] | None = None,
        seconds: float = SECONDS,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        from pi2rt.tokenizer.template_sandbox import TemplateEnvironment  # imports Jinja; not everyone chats

        if len(source) > MAX_SOURCE_CHARACTERS:
            raise TemplateError(
                f"the chat template has {len(source)} characters; {MAX_SOURCE_CHARACTERS} are allowed"
            )
        self.source = source
        self._seconds = seconds
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token, **(special_tokens or {})}

        def strftime_now(format: str) -> str:  # noqa: A002  # templates know it by this name
            if len(format) > 256:
                raise TemplateError("the chat template formats the time by over 256 characters")
            return now().strftime(format)

        self._environment = TemplateEnvironment(
            {"raise_exception": _raise_exception, "strftime_now": strftime_now}
        )
        try:
            self._template = self._environment.template(source)
        except Exception as error:
            raise _translate("the chat template is invalid", error) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, to be encoded with ``parse_special=True, add_special=False``.

        Args:
            messages: each has at least a role; most templates want a content that is a string.
            add_generation_prompt: whether the text ends where the assistant's answer begins.
            tools: descriptions of tools, as the template wants them.
            variables: whatever else the template knows.

        Raises:
            RequestError: a message is not a mapping with a role.
            TemplateError: the template refuses the conversation, or fails, or goes over a limit.
        """
        from pi2rt.tokenizer.template_budget import Budget

        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise RequestError(f"message {index} is not a mapping with a 'role' that is a string")
        known = {
            **self._tokens,
            "documents": None,
            **variables,
            "messages": list(messages),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        budget = Budget(self._seconds)
        try:
            with self._environment.spending(budget):
                context = self._template.new_context(known)
                return "".join(map(budget.emit, self._template.root_render_func(context)))
        except Exception as error:
            raise _translate("the chat template failed", error) from error


def _raise_exception(message: object) -> None:
    raise TemplateError(f"the chat template says: {str(message)[:_MAX_MESSAGE]}")


def _translate(what: str, error: Exception) -> TemplateError:
    """The error to raise in place of one of Jinja's, or of Python's."""
    if isinstance(error, TemplateError):
        return error
    if isinstance(error, RecursionError):
        return TemplateError(f"{what}: it is nested too deeply")
    if isinstance(error, MemoryError):
        return TemplateError(f"{what}: out of memory")
    line = getattr(error, "lineno", None)
    where = f"line {line}: " if isinstance(line, int) else ""
    return TemplateError(f"{what}: {where}{type(error).__name__}: {str(error)[:_MAX_MESSAGE]}")
