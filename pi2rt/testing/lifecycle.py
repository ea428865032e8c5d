"""An executor is opened, reports what it loads, and is closed whatever happened before."""

from __future__ import annotations

import os
import threading
import time

import trio

from pi2rt._errors import ClosedError, PluginError
from pi2rt.runtime.executor import StepExecutor
from pi2rt.runtime.registry import check_executor
from pi2rt.testing.harness import GREEDY, Harness, in_trio


class Lifecycle(Harness):
    """``open``, ``aclose`` and what stays behind."""

    @in_trio
    async def test_keeps_to_the_protocol(self) -> None:
        try:
            check_executor(type(self).__name__, self.make_executor)
        except PluginError as error:
            raise AssertionError(str(error)) from error
        assert isinstance(self.make_executor(), StepExecutor)

    @in_trio
    async def test_open_reports_progress(self) -> None:
        file, model = self.open_model(self.models[0])
        executor = self.make_executor()
        seen: list[tuple[int, int]] = []
        thread = threading.get_ident()

        def progress(done: int, total: int) -> None:
            assert threading.get_ident() == thread, "progress must be called in Trio's thread"
            seen.append((done, total))

        await self.open(executor, file, model, self.options, progress)
        await executor.aclose()
        file.close()
        done = [each for each, _ in seen]
        assert seen, "open never called progress"
        assert done == sorted(done), f"progress went backwards: {done}"
        assert seen[-1][0] == seen[-1][1] > 0, f"progress ended at {seen[-1][0]} of {seen[-1][1]}"
        assert len({total for _, total in seen}) == 1, f"the total changed: {seen}"

    @in_trio
    async def test_aclose_twice(self) -> None:
        async with self.opened() as executor:
            for _ in range(2):
                try:
                    await executor.aclose()
                except Exception as error:
                    raise AssertionError(
                        f"aclose must be safe to call twice, but raised {error!r}"
                    ) from error

    @in_trio
    async def test_aclose_without_open(self) -> None:
        await self.make_executor().aclose()

    @in_trio
    async def test_aclose_after_cancelled_open(self) -> None:
        file, model = self.open_model(self.models[0])
        executor = self.make_executor()
        with trio.CancelScope() as scope:
            scope.cancel()
            await self.open(executor, file, model, self.options)
        self.doing = "aclose after a cancelled open"
        await executor.aclose()
        file.close()
        assert scope.cancelled_caught, (
            "open in a cancelled scope must be cancelled, but it went on to its end"
        )

    @in_trio
    async def test_closed_is_closed(self) -> None:
        async with self.opened() as executor:
            step = self.prefill(1, self.prompt(3))
            await executor.aclose()
            with self.raises(ClosedError, "submit after aclose"):
                executor.submit(step)
            self.doing = "wait after aclose"
            with self.raises(ClosedError, "wait after aclose"):
                await executor.wait()
            executor.stop(1)
            left = executor.statistics().in_flight
            assert left == 0, f"after aclose, statistics say that {left} steps are in flight"

    @in_trio
    async def test_aclose_with_a_step_in_flight_ends_the_wait(self) -> None:
        async with self.opened() as executor:
            ended: list[str] = []

            async def wait() -> None:
                try:
                    result = await executor.wait()
                    ended.append(f"step {result.id}")
                except ClosedError:
                    ended.append("closed")
                except Exception as error:
                    ended.append(repr(error))

            executor.submit(self.prefill(1, self.prompt(150)))
            self.doing = "wait, while another task called aclose,"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.lowlevel.checkpoint()
                await executor.aclose()
            # the step may have been done just in time
            assert ended in (["closed"], ["step 1"]), (
                f"a wait during aclose must raise ClosedError, not {ended}"
            )

    @in_trio
    async def test_aclose_leaves_no_thread(self) -> None:
        async def once() -> set[int]:
            """Threads that are there while a step was run."""
            async with self.opened() as executor:
                await self.run(executor, self.prefill(1, self.prompt(20), sampling=GREEDY))
                return _threads()

        await once()  # libraries start threads of their own at first use
        before = _threads()
        during = await once()
        left = _left(during - before, self.patience / 4)
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        shown = ", ".join(names.get(thread, f"native thread {thread}") for thread in sorted(left))
        assert not left, f"after aclose {len(left)} threads of the executor are still there: {shown}"

    @in_trio
    async def test_opens_again_after_aclose(self) -> None:
        """In one program, one after the other: nothing of the first is in the way of the second."""
        texts = []
        for _ in range(2):
            async with self.opened() as executor:
                texts.append(await self.generate(executor, self.prompt(9), 6))
        assert texts[0] == texts[1], f"two executors, opened one after the other, generated {texts}"


def _threads() -> set[int]:
    """Native ids of this process' threads, but for those that Trio keeps to use again."""
    kept = {thread.native_id for thread in threading.enumerate() if thread.name.startswith("Trio ")}
    try:
        found = {int(name) for name in os.listdir("/proc/self/task")}
    except OSError:  # no Linux: those that Python started
        found = {thread.native_id for thread in threading.enumerate() if thread.native_id is not None}
    return found - kept


def _left(threads: set[int], patience: float) -> set[int]:
    """Those still there after ``patience`` seconds: one that was joined is listed for a moment more."""
    deadline = time.monotonic() + patience
    while (left := threads & _threads()) and time.monotonic() < deadline:
        os.sched_yield()
    return left
