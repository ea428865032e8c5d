"""The messages of a conversation, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pi2rt._errors import RequestError

Message = dict[str, Any]

_EXAMPLE = "{'role': 'user', 'content': '...'}"
_SPEAKERS = (
    "system",
    "developer",
    "user",
    "assistant",
    "model",
)  # every other role says what a tool returned
_SHOWN = 60  # characters of a value in an error


def read_messages(messages: Iterable[object]) -> list[Message]:
    """Copies of the messages. A content is a string, None, or a list of text parts with at least one; an empty list is
    an empty string. What a tool returned may be any mapping or list.

    Args:
        messages: mappings with a role. Besides a string, a content may be None, or a list of OpenAI's text parts
            ``{"type": "text", "text": "..."}``.

    Raises:
        RequestError: one is something else; the error names the message, the part, and what was found.
    """
    if isinstance(messages, (Mapping, str, bytes)) or not isinstance(messages, Iterable):
        raise RequestError(
            f"messages: a list of mappings such as [{_EXAMPLE}] is needed, not {shown(messages)}"
            + ("; put it into a list" if isinstance(messages, Mapping) and "role" in messages else "")
        )
    return [_message(index, message) for index, message in enumerate(messages)]


def _message(index: int, message: object) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        if not isinstance(message, Mapping):
            problem = f"it is {shown(message)}"
        elif "role" in message:
            problem = f"its role is {shown(message['role'])}"
        else:
            problem = f"it has no role, only {', '.join(map(repr, message))[:_SHOWN] or 'nothing'}"
        raise RequestError(
            f"message {index} is not a mapping with a 'role' that is a string, such as {_EXAMPLE}: {problem}"
        )
    content = message.get("content")
    result = _plain(message)
    if content is None or isinstance(content, str):
        return result
    from_tool = message["role"] not in _SPEAKERS
    if from_tool and (
        isinstance(content, Mapping) or (isinstance(content, (list, tuple)) and not has_parts(content))
    ):
        return result  # templates print it as JSON, mostly
    if not isinstance(content, (list, tuple)):
        raise RequestError(
            f"message {index}: content is {shown(content)}; a string, a list of text parts or None is needed"
        )
    result["content"] = [_part(index, number, part) for number, part in enumerate(content)] or ""
    return result


def has_parts(content: Iterable[object]) -> bool:
    """Whether a list is one of parts, of any type; what a tool returned may be another."""
    return any(isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in content)


def _part(index: int, number: int, part: object) -> Message:
    where = f"message {index}, part {number}"
    if not isinstance(part, Mapping):
        raise RequestError(f"{where}: {{'type': 'text', 'text': '...'}} is needed, not {shown(part)}")
    kind = part.get("type")
    if kind != "text":
        raise RequestError(
            f"{where}: its type is {shown(kind)}; pi2rt runs models of text, so that only parts of the type 'text' "
            f"have a meaning"
        )
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where}: its text is {shown(part.get('text'))}, not a string")
    return _plain(part)


def _plain(fields: Mapping[str, Any]) -> Message:
    """A copy whose strings are plain ones: markup would escape the template's tokens beside it, and a rendered chat's
    text is content here."""
    return {key: str.__str__(value) if isinstance(value, str) else value for key, value in fields.items()}


def joined(parts: Iterable[Message]) -> str:
    """Text parts as one string, with a line end between two, as llama.cpp and vLLM join them."""
    return "\n".join(part["text"] for part in parts)


def shown(value: object) -> str:
    """A value in an error: its type, and the value itself if it is short."""
    if value is None:
        return "None"
    text = repr(value) if isinstance(value, (str, int, float, bool)) else ""
    kind = type(value).__name__
    article = "an" if kind[:1].lower() in tuple("aeiou") else "a"
    return f"{article} {kind}" + (f" ({text[:_SHOWN]})" if text else "")
