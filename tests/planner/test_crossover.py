"""Where whole matrices take less time than single neurons. How much time that is, no test can say."""

from __future__ import annotations

import math

import pytest

from pi2rt.cython_kernels.kernels import native
from pi2rt.cython_kernels.kernels.block_work import BlockWork
from pi2rt.formats.neuron_bundles import Matrix, NeuronBundles, arrange
from pi2rt.planner.measure import crossover
from tests.kernels.variants import KERNELS


def bundles(up_type: str | None, down_type: str, dim: int, neurons: int) -> NeuronBundles:
    up = None if up_type is None else Matrix("up", up_type, (neurons, dim))
    return arrange("bundles", up, Matrix("down", down_type, (dim, neurons)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("up_type", ["Q4_0", "Q8_0", None])
def test_it_is_a_number(up_type: str | None, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossover, "WEIGHTS_BYTES", 4 << 20)
    monkeypatch.setattr(crossover, "REPEATS", 2)
    found = crossover.crossover(up_type, "Q4_1", 544, bundles(up_type, "Q4_1", 544, 1056), threads)
    assert found > 0
    assert math.isfinite(found)


@pytest.mark.parametrize("name", list(KERNELS))
@pytest.mark.parametrize(("dim", "neurons"), [(32, 32), (544, 1056), (1024, 96)])
def test_every_kernel_does_the_work(name: str, dim: int, neurons: int) -> None:
    """Within the memory that it asks for."""
    for up_type, down_type, every in (
        ("Q4_0", "Q4_0", 0),
        ("Q4_1", "Q8_0", 0),
        ("Q4_0", "Q4_1", 2),
        ("Q8_0", "Q8_0", 5),
    ):
        layout = bundles(up_type, down_type, dim, neurons).layout
        work = BlockWork(up_type, down_type, dim, neurons, layout, every, name)
        memory = native.Memory(3 * work.nbytes)
        try:
            work.compute(memory, 3)
            with pytest.raises(ValueError, match="too few for 4 blocks"):
                work.compute(memory, 4)
        finally:
            memory.close()
