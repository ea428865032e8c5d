"""Which memory is resident, as the system counts it."""

from __future__ import annotations

from pathlib import Path

from pi2rt.cython_kernels.kernels.native import Memory


def resident_bytes(memory: Memory) -> int:
    """Of the mappings that ``memory`` lies in: of its own alone, if no neighbour has the same flags."""
    begin, end = memory.address, memory.address + memory.nbytes
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(each, 16) for each in first.split("-"))
            inside = low < end and begin < high
        elif inside and first == "Rss:":
            found += int(line.split()[1]) << 10
    return found
