"""What is native crosses from one Cython module to another as an object of its class: anything else is a TypeError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pi2rt._errors import InternalError
from pi2rt.cython_kernels.kernels import native
from pi2rt.cython_kernels.kernels.block_work import BlockWork
from pi2rt.cython_kernels.plane.cluster_unit import Mailbox
from pi2rt.cython_kernels.plane.gang import Gang
from pi2rt.cython_kernels.plane.matrices import Matrix
from pi2rt.cython_kernels.plane.program import Program
from pi2rt.cython_kernels.plane.sampler import sample
from pi2rt.runtime.step import Sampling


class Impostor:
    """Has what such objects had when addresses crossed."""

    address = 4096
    n_regions = 1
    gang = 4096


IMPOSTORS = [Impostor(), 4096, Mailbox(1, 1), "kernels"]


def program(threads: Any = 1, kernels: Any = None, **others: Any) -> Program:
    return Program(
        threads,
        native.Variant() if kernels is None else kernels,
        dim=64,
        vocab=64,
        max_rows=4,
        max_slots=1,
        context=64,
        pages=1,
        **others,
    )


def matrix() -> Matrix:
    return Matrix(native.TYPE_IDS["F32"], 64, 64, 4096)


@pytest.mark.parametrize("what", ["stream", "neurons", "clusters", "kernels"])
@pytest.mark.parametrize("impostor", IMPOSTORS, ids=lambda each: type(each).__name__)
def test_a_program_takes_what_it_knows(what: str, impostor: object) -> None:
    with pytest.raises(TypeError, match=f"Argument '{what}' has incorrect type"):
        program(**{what: impostor})


@pytest.mark.parametrize("impostor", [Impostor(), "1", None, native.Variant()])
def test_a_gang_is_one_or_a_number_of_threads(impostor: object) -> None:
    with pytest.raises(TypeError, match="int"):
        program(impostor)


NEITHER = [4096, None, Impostor()]


@pytest.mark.parametrize(
    "call",
    [
        lambda p, wrong: p.embed(wrong),
        lambda p, wrong: p.linear(0, None, "x", "y", [matrix(), wrong]),
        lambda p, wrong: p.ffn(0, None, wrong, None, 0, 0, q8_out=False),
        lambda p, wrong: p.sparse_ffn(0, None, "x", None, wrong, 0, 0),
        lambda p, wrong: p.head(None, wrong),
        lambda p, wrong: Program(1, wrong, dim=1, vocab=1, max_rows=1, max_slots=1, context=1, pages=1),
        lambda p, wrong: sample(wrong, np.zeros(4, np.float32), Sampling(), np.zeros(4, np.int32), 0),
        lambda p, wrong: BlockWork(None, "Q8_0", 64, 64, (1, 4096, 4096, 0), 0).compute(wrong, 1),
    ],
    ids=["embed", "linear", "ffn", "sparse_ffn", "head", "kernels", "sample", "compute"],
)
@pytest.mark.parametrize("wrong", NEITHER, ids=lambda each: type(each).__name__)
def test_what_is_needed_is_neither_an_address_nor_none(
    call: Callable[[Program, Any], object], wrong: object
) -> None:
    with pytest.raises(TypeError):
        call(program(), wrong)


def test_a_mailbox_is_one_where_the_program_runs() -> None:
    gang = Gang([-1])
    try:
        runs = program(gang)
        with pytest.raises(TypeError, match="Argument 'mailbox' has incorrect type"):
            runs.hand_off(0, None, Impostor())  # type: ignore[arg-type]
        with pytest.raises(InternalError, match="there is no unit"):
            runs.join(0, "x", None)
    finally:
        gang.close()
