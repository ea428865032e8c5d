"""Show what pi2rt finds on this machine, and what it would use."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(options: argparse.Namespace) -> int:
    found = collect()
    print(json.dumps(found) if options.json else "\n".join(_lines(found)))
    return 0


def collect() -> dict[str, Any]:
    """Everything ``pi2rt info`` shows, for JSON. Sizes are bytes."""
    from pi2rt import __version__, catalogue
    from pi2rt.planner.placement import default_placement
    from pi2rt.runtime.host_memory import available_memory
    from pi2rt.runtime.registry import available_executors
    from pi2rt.runtime.topology import read_topology

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
        },
        "flash": _flash(),
        "kernels": _kernels(),
        "executors": {name: _executor(name) for name in available_executors()},
        "cache": str(catalogue.cache_directory()),
    }


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
        from pi2rt.cython_kernels.flash import probe
    except ImportError as error:
        return {"error": f"the native module cannot be imported: {error}"}
    permitted, why = probe()
    return {"io": "uring" if permitted else "preadv", "why": why}


def _kernels() -> dict[str, Any]:
    """The variants of this build, worst first; which one runs, and why."""
    from pi2rt._errors import KernelUnavailableError

    try:
        from pi2rt.cython_kernels import native
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


def _executor(name: str) -> dict[str, str]:
    """Where it comes from, and what is wrong with it, if anything."""
    from pi2rt._errors import Pi2rtError
    from pi2rt.runtime.registry import available_executors, load_executor

    entry = available_executors()[name]
    found = {"from": entry.value, "package": entry.dist.name if entry.dist is not None else ""}
    try:
        load_executor(name)
    except Pi2rtError as error:
        found["error"] = str(error)
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
    yield f"memory: {size(found['memory']['available'])} available of {size(found['memory']['total'])}"
    flash = found["flash"]
    yield f"flash: {flash['error']}" if "error" in flash else f"flash: {flash['io']} ({flash['why']})"
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
        yield f"  {name}: {executor['error'] if 'error' in executor else executor['from']}"
    yield f"cache: {found['cache']}"


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
