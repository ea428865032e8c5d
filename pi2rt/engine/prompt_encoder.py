"""Prompts to token ids without holding up the loop: in steps, up to what the context holds."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import trio

from pi2rt._errors import ContextOverflowError
from pi2rt.host.limits import limits_explained
from pi2rt.tokenizer import ChatTemplate, Tokenizer

T = TypeVar("T")

LONG_TEXT = 2048
"""Characters from which on text is rendered and tokenised in a worker thread: below, that takes a few milliseconds."""

MESSAGE = 16
"""Characters that take as long to render as a message without text does, some 20 us."""

MOST_BYTES = 256
"""Bytes of text for one token that a budget counts at most: only hostile vocabularies have longer tokens."""

_COPIES = 4
"""Copies of a prompt's text at the same time: as it was given, two while a template puts it together, and bytes."""


def prompt_bytes(tokenizer: Tokenizer, context: int) -> int:
    """Bytes that the text of a prompt takes at most that fills a context, with its copies and its ids."""
    most = min(tokenizer.most_bytes or MOST_BYTES, MOST_BYTES)
    return context * (_COPIES * most + 4 * array("i").itemsize)


class PromptEncoder:
    """Tokenises prompts for a context. Long ones go one at a time, so that what they take is bounded.

    Args:
        tokenizer: of the model.
        context: tokens.
    """

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        self.tokenizer, self._context = tokenizer, context
        self._limiter = trio.CapacityLimiter(1)

    async def template(self) -> ChatTemplate | None:
        """The tokenizer's chat template; compiling it takes a while.

        Raises:
            TemplateError: there is one, and it is invalid or too large.
        """
        tokenizer = self.tokenizer
        if not tokenizer.has_compiled_template:
            with limits_explained():
                await trio.to_thread.run_sync(lambda: tokenizer.chat_template, abandon_on_cancel=True)
        return tokenizer.chat_template

    async def render(self, messages: Sequence[Any], max_tokens: int | None, render: Callable[[], str]) -> str:
        """What ``render`` returns for ``messages``.

        Raises:
            ContextOverflowError: the text in the messages is too long for the context, whatever else is put beside it.
            TemplateError, RequestError: as ``render`` does.
        """

        def check_and_render() -> str:
            self._check_size(_texts(messages), max_tokens)
            return render()

        few = islice(_texts(messages), LONG_TEXT // MESSAGE + 1)  # enough to tell a long text
        return await self._work(sum(MESSAGE + len(text) for text in few), check_and_render)

    async def tokenise(self, text: str, max_tokens: int | None, *, add_special: bool) -> array[int]:
        """Token ids of a text.

        Raises:
            ContextOverflowError: the prompt is too long for the context; it was read only as far as needed to tell.
            RequestError: it is no valid Unicode.
        """
        over = False  # nobody wants it any more

        def encode() -> array[int]:
            self._check_size([text], max_tokens)
            ids = array("i")
            for piece in self.tokenizer.encode_pieces(text, parse_special=True, add_special=add_special):
                ids.extend(piece)
                if over or len(ids) > self._room(max_tokens):
                    raise self._overflow(len(ids), max_tokens)
            return ids

        try:
            return await self._work(len(text), encode)
        finally:
            over = True

    async def _work(self, size: int, function: Callable[[], T]) -> T:
        if (
            size <= LONG_TEXT and not self._limiter.borrowed_tokens
        ):  # who works may hold a lock of the tokenizer's
            return function()
        limiter = self._limiter if size > LONG_TEXT else None
        with limits_explained():
            return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=limiter)

    def _check_size(self, texts: Iterable[str], max_tokens: int | None) -> None:
        """Raises:
        ContextOverflowError: texts of this size have too many tokens, whatever they are.
        """
        room = self._room(max_tokens)
        least = 0
        for text in texts:
            least += self.tokenizer.least_tokens(text, room + 1 - least)
            if least > room:
                raise self._overflow(least, max_tokens)

    def _room(self, max_tokens: int | None) -> int:
        return self._context - (1 if max_tokens is None else max_tokens)

    def _overflow(self, tokens: int, max_tokens: int | None) -> ContextOverflowError:
        wanted = 1 if max_tokens is None else max_tokens
        return ContextOverflowError(tokens, wanted, self._context, at_least=True)


def _texts(messages: Sequence[Any]) -> Iterator[str]:
    """The contents of messages, "" for what is no text; whatever else is in them is the template's business."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list | tuple) and content else [content]:
            text = part.get("text") if isinstance(part, Mapping) else part
            yield text if isinstance(text, str) else ""
