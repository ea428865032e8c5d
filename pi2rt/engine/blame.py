"""Which error a request ends with, where the fault is its own, the executor's, or that of its callback."""

from __future__ import annotations

import trio

from pi2rt._errors import ExecutorError, Pi2rtError, RequestError
from pi2rt.runtime.step import Sampling, Step, Unusable

_SHOWN = 3
"""Entries of a logit bias in a message."""


def blame(
    unusable: Unusable,
    sampling: Sampling,
    position: int,
    actor: str,
    step: Step,
    late: float | None = None,
) -> Pi2rtError:
    """The error of the one request whose logits are unusable: RequestError that names the parameters and their values,
    or, where the model's own logits are to blame, ExecutorError.

    Args:
        sampling: of the request.
        position: of the token that cannot be picked.
        actor: the name of the actor whose executor ran ``step``.
        late: the seconds within which there was no mask of that token; None: there was one, or none was wanted.
    """
    if not unusable.parameters:
        return ExecutorError(
            actor,
            step,
            f"the model's logits at position {position} are not finite numbers: its weights are damaged, its "
            f"activations overflow, or the executor computes wrongly",
        )
    if unusable.parameters == ("token_mask",):
        if late is not None:
            return RequestError(
                f"token_mask gave no mask for position {position} within the mask_deadline of {late:g} s; make it "
                f"faster, or open the model with a longer mask_deadline"
            )
        return RequestError(
            f"token_mask: no token can be picked at position {position}, because none that it allows has a finite "
            f"logit; where a text may end there, allow a token that ends it"
        )
    named = " and ".join(
        name if name == "token_mask" else f"{name}={_value(sampling, name)}" for name in unusable.parameters
    )
    return RequestError(
        f"{named}: no token can be picked at position {position}, because the logits are not finite numbers after "
        f"that; a less extreme value is needed"
    )


def carried(error: BaseException) -> BaseException:
    """What a consumer is given for an error of its callback: the error, unless it would mean something else there."""
    if not isinstance(error, StopIteration | StopAsyncIteration | GeneratorExit | trio.Cancelled):
        return error
    wrapped = RequestError(f"on_prefill raised {type(error).__name__}, which ends no request in good order")
    wrapped.__cause__ = error
    return wrapped


def copied(error: ExecutorError) -> ExecutorError:
    """A copy for one consumer: an exception that several tasks raise collects the traceback of each."""
    own = ExecutorError.__new__(ExecutorError)
    own.args = error.args
    own.__dict__.update(error.__dict__)
    own.__cause__ = error.__cause__ or error
    return own


def _value(sampling: Sampling, name: str) -> str:
    value = getattr(sampling, name)
    if name != "logit_bias":
        return repr(value)
    shown = ", ".join(f"{token}: {bias!r}" for token, bias in value[:_SHOWN])
    return f"{{{shown}}}" if len(value) <= _SHOWN else f"{{{shown}, ... {len(value) - _SHOWN} more}}"
