"""Chat templates: a conversation to the text that a model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from pi2rt._errors import TemplateError
from pi2rt.tokenizer.marked_text import RenderedChat, is_trusted, join, trusted
from pi2rt.tokenizer.messages import Message, has_parts, joined, read_messages

MAX_SOURCE_CHARACTERS = (
    64 << 10
)  # several times the largest in use; compiling takes time that no clock limits
SECONDS = 2.0

_MAX_MESSAGE = 500  # of what a template says about itself
_PROBE = "pi2rt-probe"


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
        tokens = {"bos_token": bos_token, "eos_token": eos_token, **(special_tokens or {})}
        self._tokens = {name: trusted(text) for name, text in tokens.items()}

        def strftime_now(format: str) -> str:  # noqa: A002  # templates know it by this name
            if len(format) > 256:
                raise TemplateError("the chat template formats the time by over 256 characters")
            text = now().strftime(format)
            return trusted(text) if is_trusted(format) else text

        self._environment = TemplateEnvironment(
            {"raise_exception": _raise_exception, "strftime_now": strftime_now}
        )
        try:
            self._template, self._format = self._environment.template(source)
        except Exception as error:
            raise _translate("the chat template is invalid", error) from error

    def render(
        self,
        messages: Iterable[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> RenderedChat:
        """The text of a conversation, to be encoded with ``parse_special=True, add_special=False``. It knows what the
        template wrote; whatever is given here is content, in which control tokens are text.

        Args:
            messages: mappings with a role. A content is a string, None (the key is left out), or a list of text parts
                (``{"type": "text", "text": "..."}``), which a template that has no use for lists gets as one string.
            add_generation_prompt: whether the text ends where the assistant's answer begins.
            tools: descriptions of tools, as the template wants them.
            variables: whatever else the template knows.

        Raises:
            RequestError: a message is malformed; the error says which, and how.
            TemplateError: the template refuses the conversation, or fails, or goes over a limit.
        """
        from jinja2.exceptions import UndefinedError

        conversation = read_messages(messages)
        without = [message for message in conversation if message.get("content", "") is None]
        self._adapt(conversation)
        known = {
            **self._tokens,
            "documents": None,
            **variables,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            try:
                return self._run(known, conversation)
            except (UndefinedError, TypeError):
                if not without:
                    raise
                for message in without:  # the template adds something to every content
                    message["content"] = ""
                return self._run(known, conversation)
        except Exception as error:
            raise _translate("the chat template failed", error) from error

    def _adapt(self, messages: list[Message]) -> None:
        """Makes the messages what the template wants."""
        for message in messages:
            for key in [key for key, value in message.items() if value is None]:
                if key not in self._format.knows_none:
                    del message[key]
            content = message.get("content")
            if isinstance(content, list) and has_parts(content) and not self._takes_parts:
                message["content"] = joined(content)
            elif isinstance(content, str) and self._format.reads_text and self._needs_parts:
                message["content"] = [{"type": "text", "text": content}]

    @property
    def _takes_parts(self) -> bool:
        """Whether the template prints the texts of a list of parts."""
        return self._format.reads_text and (self._prints[1] or not self._prints[0])

    @property
    def _needs_parts(self) -> bool:
        """Whether it prints these only, and strings not at all."""
        return self._prints == (False, True)

    @cached_property
    def _prints(self) -> tuple[bool, bool]:
        """Whether the template prints a content that is a string, and one that is a list of parts: tried out."""

        def prints(content: object) -> bool:
            try:
                text = self._run(
                    {**self._tokens, "documents": None, "tools": None, "add_generation_prompt": False},
                    [{"role": "user", "content": content}],
                )
            except Exception:
                return False
            return _PROBE in text and not any(quote + _PROBE in text for quote in "\"'")

        return prints(_PROBE), prints([{"type": "text", "text": _PROBE}])

    def _run(self, known: dict[str, Any], messages: list[Message]) -> RenderedChat:
        from pi2rt.tokenizer.template_budget import Budget

        budget = Budget(self._seconds)
        with self._environment.spending(budget):
            context = self._template.new_context({**known, "messages": messages})
            return RenderedChat.of(join("", list(map(budget.emit, self._template.root_render_func(context)))))


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
