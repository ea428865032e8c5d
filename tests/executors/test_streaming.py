"""Weights that are read in every step: the same bits as in memory, and faults that nobody computes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from pi2rt._errors import ModelFormatError, RequestError
from pi2rt.cython_kernels.flash.stream import SECTOR, Stream
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.executors.reference.executor import ReferenceExecutor
from pi2rt.formats import ModelFile, open_model_file
from pi2rt.formats.placement import Placement
from pi2rt.models import ModelDescription, describe
from pi2rt.models.stream_pieces import cut, matrices_in_order
from pi2rt.planner.pack.convert import convert
from pi2rt.runtime.executor import ExecutorOptions, StepExecutor
from pi2rt.runtime.flash_reads import FlashReads
from pi2rt.runtime.step import Bind, Sampling, Slice, StateCopy, Step
from pi2rt.runtime.trace import Trace
from pi2rt.testing import StepExecutorConformance, Tolerance
from tests.executors.test_sparse import one_by_one
from tests.support.native_threads import settles_at
from tests.support.running import all_logits, open_with_state, opened, stopped_steps_leave_nothing
from tests.support.tiny_models import TinyModel, write_gguf

MODEL = TinyModel("qwen3", seed=31, dim=256, hidden=512, layers=3, heads=4, kv_heads=2, head_dim=32)
TYPES = {
    "blk.0.attn_q": "Q4_K", "blk.0.attn_v": "Q6_K", "blk.0.attn_output": "Q4_1", "blk.0.ffn_gate": "Q5_0",
    "blk.0.ffn_down": "Q8_0", "blk.1.attn_v": "F16", "blk.1.ffn_down": "BF16", "token_embd": "Q8_0",
}  # fmt: skip


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    convert(write_gguf(folder / "m.gguf", MODEL, weight_type="Q4_0", types=TYPES), folder / "m.pi2")
    return folder / "m.pi2"


def every_matrix(path: Path) -> tuple[str, ...]:
    with open_model_file(path) as file:
        return tuple(name for name, _ in matrices_in_order(describe(file)))


READS = FlashReads(stream_bytes=16384)
"""So that a matrix has many pieces."""


def ring_for(path: Path, names: Sequence[str], more: int = 0, reads: FlashReads = READS) -> int:
    """The least that will do, and ``more`` sectors."""
    with open_model_file(path) as file:
        return cut(file, describe(file), names, reads.stream_bytes).ring + more * SECTOR


BY_ROW = {"token_embd.weight": Placement.BY_ROW}


def streamed(names: Iterable[str]) -> dict[str, Placement]:
    return dict.fromkeys(names, Placement.STREAMED)


class TestStreamedCpu(StepExecutorConformance):
    """Every matrix of every layer is streamed, through the smallest ring there can be."""

    models = ("quantised",)
    tolerance = Tolerance(reference=0.06)

    @pytest.fixture(autouse=True)
    def _model(self, pack: Path) -> None:
        self.path = pack
        names = every_matrix(pack)
        self.options = ExecutorOptions(
            slots=4,
            pages=16,
            context=256,
            max_tokens=192,
            placements=streamed(names),
            ring_bytes=ring_for(pack, names),
            reads=READS,
        )

    def make_executor(self) -> StepExecutor:
        return CpuExecutor()

    def open_model(self, name: str) -> tuple[ModelFile, ModelDescription]:
        file = open_model_file(self.path)
        return file, describe(file)


@pytest.mark.parametrize("io", ["auto", "preadv"])
@pytest.mark.parametrize("more", [0, 1, 30, 10_000])
@pytest.mark.parametrize("every", [1, 2, 5])
async def test_streamed_is_resident_bit_for_bit(pack: Path, every: int, more: int, io: str) -> None:
    tokens = np.random.RandomState(3).randint(0, 300, 70).astype(np.int32)
    names = every_matrix(pack)[::every]
    async with opened(CpuExecutor(), pack, exact_floats=False) as executor:
        expected = await all_logits(executor, tokens)
    placements = (BY_ROW if every > 1 else {}) | streamed(names)
    given = {"placements": placements, "ring_bytes": ring_for(pack, names, more), "reads": READS, "io": io}
    async with opened(CpuExecutor(), pack, exact_floats=False, slots=1, **given) as executor:
        for _ in range(3):
            np.testing.assert_array_equal(await all_logits(executor, tokens), expected)
        statistics = executor.statistics()
        with open_model_file(pack) as file:
            least = sum(file.tensors[name].nbytes for name in names)
        assert all(use.streamed_bytes >= least for use in statistics.recent)
        read = statistics.flash.bytes
        assert isinstance(read, int)
        assert read >= sum(use.streamed_bytes for use in statistics.recent)
        assert statistics.threads[-1].actor == "flash"


async def test_short_steps_keep_pieces_in_memory_that_long_ones_need(pack: Path) -> None:
    """Pages of the KV cache that no step has reached, and rows of activations: what they hold meanwhile is not read
    again, and is given back before a step needs it."""
    tokens = np.random.RandomState(5).randint(0, 300, 200).astype(np.int32)
    names = every_matrix(pack)
    async with opened(CpuExecutor(), pack, exact_floats=False) as executor:
        expected = await all_logits(executor, tokens)
    given = {
        "placements": streamed(names),
        "ring_bytes": ring_for(pack, names, 4),
        "reads": READS,
        "exact_floats": False,
    }

    def of_last_step() -> tuple[int, int]:
        """(bytes read, reclaimable bytes in use)"""
        statistics = executor.statistics()
        lent = statistics.flash.stream.reclaimable_bytes
        assert isinstance(lent, int)
        return statistics.recent[-1].streamed_bytes, lent

    with open_model_file(pack) as file:
        whole = sum(piece.bytes for piece in cut(file, describe(file), names, READS.stream_bytes).pieces)
    async with opened(CpuExecutor(), pack, slots=1, context=8192, **given) as executor:
        for _ in range(3):
            np.testing.assert_array_equal(await one_by_one(executor, tokens[:20]), expected[:20])
            assert of_last_step() == (0, whole)  # all that is streamed has room there
            np.testing.assert_array_equal(await all_logits(executor, tokens), expected)
            assert 0 < of_last_step()[1] <= whole  # most pages of the cache were never used
    async with opened(CpuExecutor(), pack, slots=1, context=1024, **given) as executor:  # the last page is
        for _ in range(3):
            np.testing.assert_array_equal(await one_by_one(executor, tokens[:20]), expected[:20])
            assert of_last_step() == (0, whole)
            np.testing.assert_array_equal(await all_logits(executor, tokens), expected)
            assert of_last_step() == (whole, 0)


async def test_a_page_that_is_copied_to_is_given_back_before(pack: Path) -> None:
    """A page behind all that were used holds pieces of weights meanwhile: neither they nor the copy suffer."""
    tokens = np.random.RandomState(5).randint(0, 300, 22).astype(np.int32)
    names = every_matrix(pack)
    async with opened(CpuExecutor(), pack, exact_floats=False) as executor:
        expected = await all_logits(executor, tokens)
    given = {
        "placements": streamed(names),
        "ring_bytes": ring_for(pack, names, 4),
        "reads": READS,
        "exact_floats": False,
    }
    first, copied = np.array([0], np.int32), np.array([127], np.int32)
    given["max_tokens"] = 20  # or all would fit where rows of activations lie
    async with opened(CpuExecutor(), pack, slots=2, pages=128, context=1024, **given) as executor:
        binds = tuple(Bind(slot, Sampling(), tokens) for slot in range(2))
        executor.submit(Step(0, (Slice(0, 0, first, tokens[:19]),), binds))
        await executor.wait()
        for number in range(1, 4):  # short ones, so that all that is streamed comes to lie there
            executor.submit(Step(number, (Slice(0, 19, first, tokens[19:20], logits=True),)))
            await executor.wait()
        lent = [executor.statistics().flash.stream.reclaimable_bytes]
        copies = (StateCopy("page", 0, 127),)
        executor.submit(Step(4, (Slice(0, 20, first, tokens[20:21], logits=True),), copies=copies))
        executor.submit(Step(5, (Slice(1, 20, copied, tokens[20:], logits=True),)))
        forked = (await executor.wait()).logits[0]
        lent.append(executor.statistics().flash.stream.reclaimable_bytes)
        again = (await executor.wait()).logits[0]
        assert forked is not None
        assert again is not None
        np.testing.assert_array_equal(forked, expected[20:21])
        np.testing.assert_array_equal(again, expected[20:])
    assert isinstance(lent[0], int)
    assert isinstance(lent[1], int)
    assert lent[0] > lent[1]


@pytest.mark.parametrize(
    ("stream_bytes", "stream_depth"), [(4096, 1), (4096, 64), (1 << 20, 2), (8 << 20, 8)]
)
async def test_how_much_is_read_at_once_changes_no_bit(
    pack: Path, stream_bytes: int, stream_depth: int
) -> None:
    tokens = np.random.RandomState(3).randint(0, 300, 70).astype(np.int32)
    names = every_matrix(pack)
    async with opened(CpuExecutor(), pack, exact_floats=False) as executor:
        expected = await all_logits(executor, tokens)
    reads = FlashReads(stream_bytes, stream_depth, measured=True)
    given = {"placements": streamed(names), "ring_bytes": ring_for(pack, names, reads=reads), "reads": reads}
    async with opened(CpuExecutor(), pack, exact_floats=False, **given) as executor:
        np.testing.assert_array_equal(await all_logits(executor, tokens), expected)
        flash = executor.statistics().flash
        assert flash.measured
        assert (flash.stream.read_bytes, flash.stream.reads_at_once) == (stream_bytes, stream_depth)
        assert flash.stream.reads * stream_bytes >= flash.bytes > 0


async def test_a_stopped_step_leaves_nothing_behind(pack: Path) -> None:
    tokens = np.random.RandomState(4).randint(0, 300, 150).astype(np.int32)
    names = every_matrix(pack)
    given = {
        "placements": streamed(names),
        "ring_bytes": ring_for(pack, names, 9),
        "reads": READS,
        "exact_floats": False,
    }
    async with opened(CpuExecutor(), pack, exact_floats=False) as executor:
        expected = await all_logits(executor, tokens)
    async with opened(CpuExecutor(), pack, **given) as executor:
        await stopped_steps_leave_nothing(executor, tokens, expected, 20)


async def test_reads_are_in_the_trace(pack: Path, tmp_path: Path) -> None:
    trace = Trace()
    names = every_matrix(pack)
    given = {
        "placements": streamed(names),
        "ring_bytes": ring_for(pack, names, 9),
        "reads": READS,
        "exact_floats": False,
        "trace": trace,
    }
    async with opened(CpuExecutor(), pack, **given) as executor:
        for _ in range(3):
            await all_logits(executor, np.arange(5, dtype=np.int32))
    trace.write(tmp_path / "t.json")
    with (tmp_path / "t.json").open() as file:
        text = file.read()
    assert '"flash"' in text
    assert names[-1] in text


LONG = np.arange(20, dtype=np.int32)
"""A step that leaves no memory to the stream, where a context has all pages: so everything has to be read."""


async def several(executor: StepExecutor) -> None:
    """Steps enough to use up what was read ahead."""
    for _ in range(3):
        await all_logits(executor, LONG)


async def test_a_file_that_shrinks_fails_the_step_and_not_the_process(pack: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pi2"
    shutil.copy(pack, path)
    names = every_matrix(path)
    given = {
        "placements": streamed(names),
        "ring_bytes": ring_for(path, names),
        "reads": READS,
        "exact_floats": False,
        "slots": 1,
    }
    async with opened(CpuExecutor(), path, **given) as executor:
        await all_logits(executor, LONG)
        with open_model_file(path) as file:
            end = file.tensors[names[len(names) // 2]].offset
        os.truncate(path, end)
        with pytest.raises(
            ModelFormatError, match=f"reading weights: the file ends too early at byte {end}: "
        ):
            await several(executor)


async def test_a_file_that_is_replaced_goes_on_being_read(pack: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "m.pi2", tmp_path / "other"
    shutil.copy(pack, path)
    other.write_bytes(bytes(1 << 20))
    names = every_matrix(path)
    tokens = np.arange(9, dtype=np.int32)
    async with opened(CpuExecutor(), pack, exact_floats=False) as executor:
        expected = await all_logits(executor, tokens)
    given = ExecutorOptions(
        slots=1, pages=16, context=1024, max_tokens=64, ring_bytes=ring_for(path, names), reads=READS,
        placements=BY_ROW | streamed(names),
    )  # fmt: skip
    executor = CpuExecutor()
    with open_model_file(path) as file:
        os.replace(other, path)
        try:
            await open_with_state(executor, file, given)
            for _ in range(3):
                np.testing.assert_array_equal(await all_logits(executor, tokens), expected)
        finally:
            await executor.aclose()


async def test_an_embedding_that_cannot_be_read_fails_the_step(pack: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pi2"
    shutil.copy(pack, path)
    async with opened(CpuExecutor(), path, exact_floats=False, placements=BY_ROW) as executor:
        await all_logits(executor, LONG)
        os.truncate(path, 4096)
        with pytest.raises(
            ModelFormatError, match=r"m\.pi2: reading weights: the file ends too early at byte 4096: "
        ):
            await all_logits(executor, LONG)


async def test_the_reference_executor_refuses_to_stream(pack: Path) -> None:
    with pytest.raises(RequestError, match="keeps all weights in memory"):
        async with opened(ReferenceExecutor(), pack, placements=BY_ROW):
            pass


def test_a_stream_that_nobody_takes_from_closes(pack: Path) -> None:
    from pi2rt.cython_kernels.kernels import native

    ring = native.Memory(1 << 20)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        stream = Stream(os.fspath(pack), [(0, 4096, 0), (4096, 8192, 64)], ring.address, ring.nbytes)
        stream.close()
        stream.close()
    assert settles_at("pi2rt/flash", 0)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(FileNotFoundError):
        Stream(os.fspath(pack) + ".no", [(0, 4096, 0)], ring.address, ring.nbytes)
    ring.close()
