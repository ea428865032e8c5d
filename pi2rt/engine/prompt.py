"""Token ids as a request gives them: checked, and never more of them read than the context holds."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sized
from itertools import islice
from operator import index
from typing import SupportsIndex

from pi2rt._errors import ContextOverflowError, RequestError
from pi2rt.engine.options import EngineOptions


def prompt_tokens(tokens: Iterable[SupportsIndex], more: int | None, options: EngineOptions) -> array[int]:
    """The tokens, int32.

    Args:
        more: tokens that come after them; None: what the context leaves, one at least.

    Raises:
        RequestError: there are none, or one is outside the vocabulary.
        ContextOverflowError: they do not fit into the context, with ``more``.
    """
    context = options.context
    try:
        known = array("i", map(index, islice(tokens, context + 1)))
    except (TypeError, OverflowError) as error:
        raise RequestError(f"prompt: token ids are integers: {error}") from None
    if not known:
        raise RequestError("prompt: empty; at least one token is needed")
    for token in (min(known), max(known)):
        check_token("prompt", token, options)
    more = 1 if more is None else more
    if len(known) + more > context:
        if isinstance(tokens, Sized):
            raise ContextOverflowError(len(tokens), more, context)
        raise ContextOverflowError(len(known), more, context, at_least=len(known) > context)
    return known


def check_token(where: str, token: int, options: EngineOptions) -> None:
    """Raises RequestError that says ``where`` a token outside the vocabulary stands."""
    if not 0 <= token < options.vocab_size:
        raise RequestError(
            f"{where}: token id {token} is outside the vocabulary of {options.vocab_size} tokens"
        )
