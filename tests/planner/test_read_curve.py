from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from pi2rt.planner.measure.read_curve import Pattern, ReadCurve, ReadPoint, measure_read_curve

KNEE = ReadCurve(
    "uring",
    True,
    1 << 30,
    (
        ReadPoint("random", 4096, 1, 70e6),
        ReadPoint("random", 4096, 16, 280e6),
        ReadPoint("random", 65536, 1, 700e6),
        ReadPoint("random", 65536, 16, 1300e6),
        ReadPoint("sequential", 1 << 20, 1, 1900e6),
        ReadPoint("sequential", 1 << 20, 4, 1950e6),
        ReadPoint("sequential", 4 << 20, 1, 1960e6),
    ),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1 << 20))
    return path


def test_bandwidth_between_and_beyond_the_points() -> None:
    for point in KNEE.points:
        assert KNEE.bandwidth(point.read_bytes, point.depth, point.pattern) == pytest.approx(
            point.bytes_per_second
        )
    assert KNEE.bandwidth(4096, 4) == pytest.approx(140e6)  # twice the depth, 1.41 times as fast
    assert KNEE.bandwidth(16384, 1) == pytest.approx((70e6 * 700e6) ** 0.5)
    assert KNEE.bandwidth(1 << 30, 200) == pytest.approx(1300e6)
    assert KNEE.bandwidth(512, 1) == pytest.approx(70e6)
    # a depth that was measured at one size only
    assert KNEE.bandwidth(4 << 20, 4, "sequential") == pytest.approx(1960e6)
    with pytest.raises(ValueError, match="depth=0"):
        KNEE.bandwidth(4096, 0)


def test_choice_is_the_smallest_that_is_good_enough() -> None:
    assert KNEE.choose("sequential") == KNEE.points[4]
    assert (
        KNEE.choose("sequential", share=0.99) == KNEE.points[6]
    )  # as much in flight as 4 x 1 MiB, fewer reads
    assert KNEE.choose("random") == KNEE.points[3]
    assert KNEE.choose("random", buffer_bytes=1 << 16) == KNEE.points[2]
    with pytest.raises(ValueError, match="no random reads were measured with 4095 bytes"):
        KNEE.choose("random", buffer_bytes=4095)


def test_msgpack_there_and_back() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(KNEE), type=ReadCurve) == KNEE


def test_every_point_is_measured_in_both_orders(file: Path) -> None:
    asked: list[tuple[Pattern, int, int]] = []
    durations: list[float] = []

    def falling(read_bytes: int, depth: int, seconds: float, pattern: Pattern) -> float:
        asked.append((pattern, read_bytes, depth))
        durations.append(seconds)
        return 100.0 - len(asked)

    curve = measure_read_curve(
        file, 3.0, read_bytes=(65536, 4096, 4 << 20), depths=(1, 4), buffer_bytes=128 << 10, measure=falling
    )
    expected = [
        ("random", 4096, 1),
        ("random", 4096, 4),
        ("random", 65536, 1),  # 4 of them are more than the buffer, and 4 MiB more than the file
        ("sequential", 65536, 1),
    ]
    assert asked == expected + expected[::-1]
    assert sum(durations) == pytest.approx(3.0)
    assert [(point.pattern, point.read_bytes, point.depth) for point in curve.points] == expected
    assert {point.bytes_per_second for point in curve.points} == {95.5}  # the drift cancels
    assert curve.file_bytes == 1 << 20


def test_real_reads(file: Path) -> None:
    curve = measure_read_curve(file, 0.2, read_bytes=(4096, 65536), depths=(1, 8))
    assert len(curve.points) == 6
    assert all(point.bytes_per_second > 0 for point in curve.points)
    assert curve.choose().buffer_bytes <= 8 * 65536
    small = measure_read_curve(file, 0.02, io="preadv", read_bytes=(4096,), depths=(1,))
    assert small.io == "preadv"
    assert [(point.pattern, point.read_bytes) for point in small.points] == [
        ("random", 4096),
        ("sequential", 4096),  # nothing larger was asked for
    ]


def test_nothing_to_measure(file: Path) -> None:
    with pytest.raises(ValueError, match=r"1048576 bytes: no reads of \[2097152\] bytes"):
        measure_read_curve(file, read_bytes=(2 << 20,))
    with pytest.raises(ValueError, match="seconds=0"):
        measure_read_curve(file, 0)
    with pytest.raises(FileNotFoundError):
        measure_read_curve(file.with_name("missing"))
