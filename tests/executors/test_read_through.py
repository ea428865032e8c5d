"""One read through a gap in place of two: the same pages, the same bits, and a count of what was read for nothing."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pi2rt
from pi2rt._errors import InternalError, RequestError
from pi2rt.cython_kernels.flash.neuron_cache import MOST_READ_THROUGH, Counters, NeuronCache
from pi2rt.cython_kernels.kernels import native
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.planner.pack.convert import convert
from pi2rt.runtime.flash_reads import FlashReads
from tests.executors.test_sparse import cache_sizes, one_by_one
from tests.support.faulty_disk import FaultyDisk
from tests.support.running import all_logits, opened
from tests.support.tiny_models import TinyModel, write_gguf

PAGE = 4096
PAGES = 300  # more than one read takes
TOKENS = np.arange(3, 60, dtype=np.int32)
MODEL = TinyModel("llama", seed=4, dim=608, hidden=1056, layers=3, heads=4, kv_heads=4, head_dim=32,
                  config={"hidden_act": "drelu"})  # fmt: skip


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose pages hold their numbers."""
    path = tmp_path_factory.mktemp("numbered") / "pages"
    path.write_bytes(np.repeat(np.arange(PAGES, dtype=np.uint32), PAGE // 4).tobytes())
    return path


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    source = write_gguf(folder / "m.gguf", MODEL, weight_type="Q4_0", types={"ffn_up": "Q8_0"})
    convert(source, folder / "m.pi2")
    return folder / "m.pi2"


@contextmanager
def cache_of(path: Path, gap: int, io: str = "auto") -> Iterator[tuple[NeuronCache, native.Memory]]:
    """Two regions, of 200 and of 100 pages."""
    memory = native.Memory(PAGES * PAGE)
    regions = [(0, PAGE, 200 * PAGE), (200 * PAGE, PAGE, 100 * PAGE)]
    try:
        cache = NeuronCache(
            str(path), regions, memory.address, PAGES, PAGE, io=io, depth=1, read_through=gap * PAGE
        )
        try:
            yield cache, memory
        finally:
            assert cache.close() == 0
    finally:
        memory.close()


def read(cache: NeuronCache, memory: native.Memory, pages: list[int], reads: int) -> Counters:
    """Checks that the pages come in that many reads."""
    cache.fetch(np.array(pages, np.int32))
    end = time.monotonic() + 10
    while cache.counters.reads < reads and time.monotonic() < end:
        pass
    assert cache.waiting == 0
    assert cache.counters.reads == reads
    slots = memory.view()[: len(pages) * PAGE].view(np.uint32).reshape(len(pages), -1)
    np.testing.assert_array_equal(slots, np.repeat(np.array(pages, np.uint32)[:, None], PAGE // 4, axis=1))
    return cache.counters


@pytest.mark.parametrize("io", ["auto", "preadv"])
def test_a_gap_is_read_through_and_counted(numbered: Path, io: str) -> None:
    with cache_of(numbered, 2, io) as (cache, memory):
        counters = read(cache, memory, [0, 1, 4, 8, 10, 199, 201], 4)  # 0 to 4, 8 to 10, and each by itself
        assert (counters.read_through, counters.read_through_bytes) == (3, 3 * PAGE)
        assert counters.bytes == (7 + 3) * PAGE
    with cache_of(numbered, 0, io) as (cache, memory):
        counters = read(cache, memory, [0, 1, 4, 8, 10, 199, 201], 6)
        assert (counters.read_through, counters.read_through_bytes, counters.bytes) == (0, 0, 7 * PAGE)


def expected_reads(pages: list[int], gap: int) -> tuple[int, int]:
    """(reads, pages of gaps), one read after another."""
    reads, through, count, nbytes = 0, 0, 0, 0
    for i, page in enumerate(pages):
        between = page - pages[i - 1] - 1 if i else 0
        joins = i and 0 <= between <= gap and (page < 200) == (pages[i - 1] < 200) and count < 64
        if joins and nbytes + (between + 1) * PAGE <= 1 << 20:
            count, nbytes, through = count + 1, nbytes + (between + 1) * PAGE, through + between
        else:
            reads, count, nbytes = reads + 1, 1, PAGE
    return reads, through


@given(
    st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=150, unique=True),
    st.booleans(),
    st.integers(0, 40),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_pages(numbered: Path, pages: list[int], ascending: bool, gap: int) -> None:
    pages = sorted(pages) if ascending else pages
    with cache_of(numbered, gap) as (cache, memory):
        reads, through = expected_reads(pages, gap)
        assert read(cache, memory, pages, reads).read_through == through


def test_gaps_are_whole_sectors_and_not_too_long(numbered: Path) -> None:
    for gap in (-1, 0.5, MOST_READ_THROUGH // PAGE + 1):
        with pytest.raises(InternalError, match="gaps of"), cache_of(numbered, gap):  # type: ignore[arg-type]
            pass


@pytest.mark.parametrize(("io", "cores"), [("auto", (0, 1)), ("preadv", (0,))])
async def test_no_bit_changes(pack: Path, io: str, cores: tuple[int, ...]) -> None:
    size, cluster, pages = cache_sizes(pack)
    async with opened(CpuExecutor(), pack, exact_floats=False) as executor:
        expected = await all_logits(executor, TOKENS)
    for slots in (cluster, pages // 2):
        given_ = {"exact_floats": False, "cores": cores, "io": io, "neuron_bytes": slots * size}
        reads = FlashReads(neuron_gap=4 * PAGE)
        async with opened(CpuExecutor(), pack, **given_, reads=reads) as executor:
            np.testing.assert_array_equal(await one_by_one(executor, TOKENS), expected)
            np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)
            statistics = executor.statistics()
        through = int(str(statistics.flash.neurons.read_through))
        assert through > 0
        assert statistics.flash.neurons.read_through_bytes == through * size
        uses = [step.neurons for step in statistics.recent if step.neurons]
        assert 0 < sum(use.read_through for use in uses) <= through
        assert all(use.read_through_bytes == use.read_through * size for use in uses)


async def test_what_nobody_asked_for_may_be_broken(numbered: Path) -> None:
    """A page that cannot be read, in a gap, fails no read of others."""
    with FaultyDisk(numbered) as disk:
        disk.damage(2 * PAGE, 3 * PAGE)
        with cache_of(disk.path, 4) as (cache, memory):
            counters = read(cache, memory, [1, 3, 5], 4)  # together, and each by itself
            assert (counters.read_through, counters.read_through_bytes) == (0, 0)
            with pytest.raises(OSError, match="reading weights") as caught:
                cache.fill(0, 2, 1)
            assert caught.value.errno == errno.EIO


async def test_options(pack: Path) -> None:
    async with pi2rt.open_runtime(pack, context=64, memory="1G", cache="off", read_through="16K") as runtime:
        await runtime.generate("Once", max_tokens=20, ignore_eos=True)
        assert runtime.statistics().actors[0].executor.flash.neurons.read_through > 0
    for wrong, why in (
        ({"read_through": 2 << 20}, "from 0 to 1048576 bytes"),
        ({"read_through": -1}, "from 0 to 1048576 bytes"),
        ({"read_through": True}, "a number of bytes or a text"),
        ({"read_through": "16K", "two_phase": True}, "take one of the two"),
        ({"read_through": "16K", "memory": None}, "that takes a memory budget"),
    ):
        with pytest.raises(RequestError, match=why):
            async with pi2rt.open_runtime(pack, **({"memory": "1G"} | wrong)):  # type: ignore[arg-type]
                pass
