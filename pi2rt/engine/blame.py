"""Who is told what when a token cannot be picked: the request that asked for the impossible, or the executor."""

from __future__ import annotations

from pi2rt._errors import ExecutorError, Pi2rtError, RequestError
from pi2rt.runtime.step import Sampling, Step, Unusable

_SHOWN = 3
"""Entries of a logit bias in a message."""


def blame(unusable: Unusable, sampling: Sampling, position: int, actor: str, step: Step) -> Pi2rtError:
    """The error of the one request whose logits are unusable: RequestError that names the parameters and their values,
    or, where the model's own logits are to blame, ExecutorError.

    Args:
        sampling: of the request.
        position: of the token that cannot be picked.
        actor: the name of the actor whose executor ran ``step``.
    """
    if not unusable.parameters:
        return ExecutorError(
            actor,
            step,
            f"the model's logits at position {position} are not finite numbers: its weights are damaged, its "
            f"activations overflow, or the executor computes wrongly",
        )
    named = " and ".join(f"{name}={_value(sampling, name)}" for name in unusable.parameters)
    return RequestError(
        f"{named}: no token can be picked at position {position}, because the logits are not finite numbers after "
        f"that; a less extreme value is needed"
    )


def _value(sampling: Sampling, name: str) -> str:
    value = getattr(sampling, name)
    if name != "logit_bias":
        return repr(value)
    shown = ", ".join(f"{token}: {bias!r}" for token, bias in value[:_SHOWN])
    return f"{{{shown}}}" if len(value) <= _SHOWN else f"{{{shown}, ... {len(value) - _SHOWN} more}}"
