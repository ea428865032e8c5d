"""What ``test_hanging_reads.py`` runs in a process whose reads hang while the file named by HANG is there.

python -m tests.executors.hang_and_recover stream|neurons|experts PACK
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import trio

from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.formats import open_model_file
from pi2rt.formats.placement import Placement
from pi2rt.models import describe
from pi2rt.planner.weights import plan_streaming
from pi2rt.runtime.executor import ExecutorOptions
from pi2rt.runtime.flash_reads import FlashReads
from tests.support.running import all_logits, open_with_state

DEADLINE = 0.2
READS = FlashReads(stream_bytes=16384)  # so that a matrix has many pieces
TOKENS = np.arange(3, 20, dtype=np.int32)


def options_for(path: Path) -> ExecutorOptions:
    """With as little of the model in memory as can be."""
    with open_model_file(path) as file:
        plan = plan_streaming(file, describe(file), 0, reads=READS)
    return ExecutorOptions(
        slots=1, pages=16, context=1024, max_tokens=64, io="preadv", read_deadline=DEADLINE,
        placements=plan.placements, ring_bytes=plan.ring_bytes, expert_bytes=plan.expert_bytes,
        neuron_bytes=plan.neuron_bytes, reads=READS,
    )  # fmt: skip


async def fails(executor: CpuExecutor) -> None:
    with pytest.raises(OSError, match=r"no read has ended for 0.2 s; the device does not answer: .*m\.pi2"):
        await all_logits(executor, TOKENS)
    print("hung")


async def main(kind: str, path: Path) -> None:
    hang = Path(os.environ["HANG"])
    given = options_for(path)
    assert bool(given.placed(Placement.STREAMED)) or kind != "stream"
    assert bool(given.neuron_bytes) == (kind == "neurons")
    assert bool(given.placed(Placement.PAGED)) == (kind == "experts")

    async def opened() -> CpuExecutor:
        executor = CpuExecutor()
        await open_with_state(executor, file, given)
        return executor

    async def works(executor: CpuExecutor) -> npt.NDArray[np.float32]:
        with trio.fail_after(20):
            return await all_logits(executor, TOKENS)

    with open_model_file(path) as file:
        executor = await opened()
        expected = await works(executor)
        print("worked")
        hang.touch()  # noqa: ASYNC240
        await fails(executor)
        await fails(executor)
        hang.unlink()  # noqa: ASYNC240
        if given.placed(
            Placement.STREAMED
        ):  # a stream that has failed is made again, with its executor, as the actor does it
            await executor.aclose()
            executor = await opened()
        while True:  # until the reads that were late have ended
            try:
                np.testing.assert_array_equal(await works(executor), expected)
            except OSError:
                continue
            break
        print("recovered")
        hang.touch()  # noqa: ASYNC240
        await fails(executor)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            await executor.aclose()
        assert any("the device does not answer" in str(each.message) for each in caught), caught
        assert executor.statistics().bytes == {}
        print("closed")
    hang.unlink()  # noqa: ASYNC240


if __name__ == "__main__":
    trio.run(main, sys.argv[1], Path(sys.argv[2]))
