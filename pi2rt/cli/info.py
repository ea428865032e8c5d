"""Show what pi2rt finds on this machine, and what it would use."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

LEAST_BYTES = 64 << 20
"""Of a file that stands for its device."""

MEASURE_SECONDS = 6.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--measure",
        metavar="FILE",
        help="measure how fast the device that holds this file (a model, of 64M at least) is read, and keep that: "
        "models on it that do not fit into memory are read accordingly from then on",
    )


def main(options: argparse.Namespace) -> int:
    if options.measure is not None:
        measure(options.measure)
    found = collect()
    print(json.dumps(found) if options.json else "\n".join(_lines(found)))
    return 0


def collect() -> dict[str, Any]:
    """Everything ``pi2rt info`` shows, for JSON. Sizes are bytes."""
    from pi2rt import __version__
    from pi2rt.host.memory import available_memory
    from pi2rt.host.topology import read_topology
    from pi2rt.planner.placement import default_placement
    from pi2rt.runtime.registry import (
        available_cluster_units,
        available_executors,
        load_cluster_unit,
        load_executor,
    )

    topology = read_topology()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "processor": processor(),
        "machine": platform.machine(),
        "core_classes": [
            {
                "name": each.name,
                "cores": each.cores,
                "siblings": each.siblings,
                "capacity": each.capacity,
                "max_mhz": each.max_mhz,
            }
            for each in topology.classes
        ],
        "quota_cores": topology.quota_cores,
        "threads": default_placement(topology).threads,
        "memory": {
            "total": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "available": available_memory(),
            **_pages(),
        },
        "flash": _flash(),
        "kernels": _kernels(),
        "executors": _plugins(available_executors(), load_executor),
        "cluster_units": _plugins(available_cluster_units(), load_cluster_unit),
        "cache": _cache(),
    }


def _pages() -> dict[str, int]:
    """Sizes of the system's pages of memory."""
    try:
        from pi2rt.cython_kernels.kernels.native import huge_page_bytes, page_bytes
    except ImportError:  # what is wrong is said where kernels are shown
        return {}
    return {"page": page_bytes(), "huge_page": huge_page_bytes()}


def _cache() -> str:
    """The cache directory, or why there is none."""
    from pi2rt import ModelNotFoundError, catalogue

    try:
        return str(catalogue.cache_directory())
    except ModelNotFoundError as error:
        return f"none: {error}"


def measure(path: str) -> None:
    """Measures the device that holds a file, and keeps the curve.

    Raises:
        RequestError: the file is too small, cannot be read, or the curve cannot be kept.
    """
    from pi2rt import RequestError, catalogue
    from pi2rt.cli._runtime import note
    from pi2rt.planner.measure.kept_curve import keep_curve, place_for_curve
    from pi2rt.planner.measure.read_curve import measure_read_curve

    try:
        size = Path(path).stat().st_size
        if size < LEAST_BYTES:
            raise RequestError(
                f"{path} has {size} bytes: too few to tell the device from its cache; take a file of 64 MiB at least"
            )
        place_for_curve(catalogue.curves_directory(), path)  # refused before the measuring, if it is
        curve = measure_read_curve(path, MEASURE_SECONDS)
        kept = keep_curve(catalogue.curves_directory(), path, curve, datetime.now(UTC).date().isoformat())
    except OSError as error:
        raise RequestError(f"cannot measure {path}: {error.strerror or error}") from error
    if not curve.direct:
        note(f"{path} cannot be read past the page cache: what was measured is mostly memory")
    note(f"measured {path} with {curve.io}; kept in {kept}")


def processor() -> str:
    """The processor's own name, as far as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for key in ("model name", "Hardware", "Processor"):
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == key and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _flash() -> dict[str, Any]:
    """How weights that do not fit are read, and why."""
    try:
        from pi2rt.cython_kernels.flash.files import probe
    except ImportError as error:
        return {"error": f"the native module cannot be imported: {error}"}
    permitted, why = probe()
    return {"io": "uring" if permitted else "preadv", "why": why, "measured": list(_measured())}


def _measured() -> Iterator[dict[str, Any]]:
    """The curves that are kept, and what they make of reading."""
    from pi2rt import ModelNotFoundError, catalogue
    from pi2rt.planner.measure.kept_curve import kept_curves
    from pi2rt.planner.read_choice import choose_reads

    try:
        folder = catalogue.curves_directory()
    except ModelNotFoundError:  # there is no cache
        return
    for kept in kept_curves(folder):
        points = [
            {
                "pattern": each.pattern,
                "read_bytes": each.read_bytes,
                "depth": each.depth,
                "bytes_per_second": round(each.bytes_per_second),
            }
            for each in kept.curve.points
        ]
        yield {
            "device": kept.device,
            "date": kept.date,
            "io": kept.curve.io,
            "direct": kept.curve.direct,
            "reads": asdict(choose_reads(kept.curve)),
            "points": points,
        }


def _kernels() -> dict[str, Any]:
    """The variants of this build, worst first; which one runs, and why."""
    from pi2rt._errors import KernelUnavailableError

    try:
        from pi2rt.cython_kernels.kernels import native
    except ImportError as error:
        return {"error": f"the native module cannot be imported: {error}"}
    variants = [{"name": name, "runs_here": runs} for name, runs, _ in native.variants()]
    wanted = os.environ.get("PI2RT_KERNELS")
    why = (
        f"PI2RT_KERNELS={wanted} asks for it" if wanted else "the best of this build that this processor runs"
    )
    try:
        return {"variants": variants, "current": native.current(), "why": why}
    except KernelUnavailableError as error:
        return {"variants": variants, "error": str(error)}


def _plugins(
    entries: Mapping[str, EntryPoint], load: Callable[[str], Callable[..., object]]
) -> dict[str, dict[str, Any]]:
    """Where each comes from, its options with their defaults, and what is wrong with it, if anything."""
    from pi2rt._errors import Pi2rtError
    from pi2rt.runtime.plugin_options import option_defaults

    found: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        found[name] = {"from": entry.value, "package": entry.dist.name if entry.dist is not None else ""}
        try:
            found[name]["options"] = option_defaults(load(name))
        except Pi2rtError as error:
            found[name]["error"] = str(error)
    return found


def _lines(found: dict[str, Any]) -> Iterator[str]:
    from pi2rt.cli._console import size

    yield f"pi2rt {found['version']}, Python {found['python']}"
    yield f"processor: {found['processor']} ({found['machine']})"
    for each in found["core_classes"]:
        siblings = f", second threads {_list(each['siblings'])}" if each["siblings"] else ""
        clock = f", {each['max_mhz']} MHz" if each["max_mhz"] else ""
        yield f"  {each['name']}: cores {_list(each['cores'])}{siblings}{clock}"
    quota = (
        f" (a quota of {found['quota_cores']:g} cores applies)" if found["quota_cores"] is not None else ""
    )
    yield f"threads by default: {found['threads']}{quota}"
    memory = found["memory"]
    pages = (
        f", in pages of {size(memory['page'])}, huge ones of {size(memory['huge_page'])}"
        if "page" in memory
        else ""
    )
    yield f"memory: {size(memory['available'])} available of {size(memory['total'])}{pages}"
    flash = found["flash"]
    yield f"flash: {flash['error']}" if "error" in flash else f"flash: {flash['io']} ({flash['why']})"
    for each in flash.get("measured", ()):
        yield from _curve(each)
    kernels = found["kernels"]
    yield (
        f"kernels: {kernels['current']} ({kernels['why']})"
        if "current" in kernels
        else f"kernels: {kernels['error']}"
    )
    for variant in kernels.get("variants", ()):
        runs = "runs here" if variant["runs_here"] else "this processor cannot run it"
        yield f"  {variant['name']}: {runs}"
    yield "executors:"
    for name, executor in found["executors"].items():
        yield f"  {name}: {_plugin(executor)}"
    if found["cluster_units"]:
        yield "cluster units:"
    for name, unit in found["cluster_units"].items():
        yield f"  {name}: {_plugin(unit)}"
    yield f"cache: {found['cache']}"


def _plugin(found: dict[str, Any]) -> str:
    if "error" in found:
        return str(found["error"])
    options = ", ".join(f"{name}={default!r}" for name, default in found["options"].items())
    return f"{found['from']}{f' (options: {options})' if options else ''}"


def _curve(found: dict[str, Any]) -> Iterator[str]:
    """A table of MB/s by size and depth, and what is chosen."""
    from pi2rt.cli._console import size

    yield f"  device {found['device']}, measured {found['date']} with {found['io']}; MB/s by reads at once:"
    points = {
        (each["pattern"], each["read_bytes"], each["depth"]): each["bytes_per_second"] / 1e6
        for each in found["points"]
    }
    depths = sorted({depth for _, _, depth in points})
    yield f"    {'':24}" + "".join(f"{depth:>7}" for depth in depths)
    for pattern, read_bytes in sorted({(pattern, nbytes) for pattern, nbytes, _ in points}):
        row = (points.get((pattern, read_bytes, depth)) for depth in depths)
        cells = "".join(f"{'' if each is None else round(each):>7}" for each in row)
        yield f"    {pattern + ' ' + size(read_bytes):24}{cells}"
    reads = found["reads"]
    yield (
        f"    so matrices are read in pieces of {size(reads['stream_bytes'])}, {reads['stream_depth']} at once; "
        f"neurons {reads['neuron_depth']} at once; pages of experts {reads['cluster_depth']} at once"
    )


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
