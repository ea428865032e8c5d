"""What ``run``, ``bench`` and ``perplexity`` share: the options of a runtime, and opening one with a bar."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pi2rt.cli.pull import fetch

if TYPE_CHECKING:
    from pi2rt import Runtime
    from pi2rt.planner.placement import UnitPlacement


@dataclass(frozen=True, slots=True)
class Opened:
    """A runtime of the command line. ``load_s``: seconds from the call to ready, without the fetching."""

    runtime: Runtime
    path: str
    load_s: float


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a name from 'pi2rt models', hf:ORG/REPO/FILE.gguf, or a path"
    )


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--threads", type=positive, metavar="N", help="threads that compute (default: one per core)"
    )
    group.add_argument(
        "--cores",
        nargs="+",
        metavar="CLASS=LIST",
        help="cores by class, one actor each, such as big=0,1 little=2-5 (default: as found)",
    )
    group.add_argument(
        "--executor", default="cpu", metavar="NAME", help="executor, see 'pi2rt info' (default: cpu)"
    )
    group.add_argument(
        "--executor-option",
        action="append",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="an option of an executor or cluster unit, see 'pi2rt info'; may repeat",
    )
    group.add_argument(
        "--kv", choices=("f16", "q8"), default="f16", help="type of the KV cache (default: f16)"
    )
    group.add_argument(
        "--activations",
        choices=("int16", "mixed", "int8"),
        default="mixed",
        help="of products with quantised weights; mixed, and more so int8, is faster in prefill and less exact "
        "(default: mixed)",
    )
    group.add_argument(
        "--memory",
        metavar="SIZE",
        help="what the process may take, such as 600M; a pack (see 'pi2rt convert') may be larger",
    )
    group.add_argument(
        "--convert",
        action="store_true",
        help="where the model does not fit into --memory, make its pack, keep it in the cache directory, and run that",
    )
    group.add_argument(
        "--io",
        choices=("auto", "uring", "preadv"),
        default="auto",
        help="how weights that do not fit are read (default: auto)",
    )
    group.add_argument(
        "--read-deadline",
        metavar="SECONDS",
        type=float,
        default=30.0,
        help="fail when none of the reads in flight ends for so long (default: 30)",
    )
    group.add_argument(
        "--cache",
        metavar="SIZE|off",
        help="of a pack with neuron bundles, memory for neurons at most (default: all that --memory leaves)",
    )
    group.add_argument(
        "--pipeline",
        choices=("cluster", "matrix", "none"),
        default="cluster",
        help="how far reading neurons overlaps with computing (default: cluster)",
    )
    group.add_argument(
        "--two-phase",
        choices=("on", "off"),
        default="off",
        help="of a pack with --bundles gates, read a neuron's gate first, and the rest once that has let it through "
        "(default: off)",
    )
    group.add_argument(
        "--read-through",
        metavar="SIZE",
        help="bytes between two neurons that are read for nothing, at most, to make one read of two, such as 16K "
        "(default: 0)",
    )
    group.add_argument(
        "--sparsity",
        choices=("exact", "predicted", "thresholded"),
        default="exact",
        help="thresholded: neurons that matter little are skipped; predicted: those of a pack with --bundles gates of "
        "which a predictor says that they are zero. Both change the text; see 'pi2rt calibrate' (default: exact)",
    )
    group.add_argument("--calibration", metavar="FILE", help="for --sparsity (default: MODEL.calibration)")
    group.add_argument(
        "--kernels", metavar="NAME", help="kernel variant, see 'pi2rt info' (default: the best)"
    )


def add_plan_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plan",
        metavar="FILE",
        help="what 'pi2rt plan' has written: what runs where, and what lies where; options that contradict it are "
        "refused",
    )


_KEYWORDS = {
    "executor": "executor",
    "threads": "threads",
    "cores": "cores",
    "kv": "kv_type",
    "activations": "activations",
    "kernels": "kernels",
    "memory": "memory",
    "io": "io",
    "read_deadline": "read_deadline",
    "cache": "cache",
    "pipeline": "pipeline",
    "two_phase": "two_phase",
    "read_through": "read_through",
    "sparsity": "sparsity",
    "calibration": "calibration",
    "executor_option": "executor_options",
}
"""Of each option of ``add_runtime_options`` that a runtime has, the keyword of ``open_runtime``."""


def runtime_keywords(options: argparse.Namespace) -> dict[str, Any]:
    """The options of ``add_runtime_options`` as keywords of ``open_runtime``: those that are not the default, for the
    others may be a plan's."""
    from pi2rt.host.topology import parse_core_classes
    from pi2rt.runtime.plugin_options import parse_options

    parser = argparse.ArgumentParser()
    add_runtime_options(parser)
    chosen = {
        keyword: getattr(options, name)
        for name, keyword in _KEYWORDS.items()
        if getattr(options, name) != parser.get_default(name)
    }
    if "cores" in chosen:
        chosen["cores"] = {each.name: each.cores for each in parse_core_classes(options.cores)}
    if "executor_options" in chosen:
        chosen["executor_options"] = parse_options(options.executor_option)
    if "two_phase" in chosen:
        chosen["two_phase"] = True
    return chosen


@asynccontextmanager
async def opened(
    options: argparse.Namespace, *, context: int | None, max_sequences: int | None, **more: Any
) -> AsyncIterator[Opened]:
    """Fetches the model if it has to, converts it if that is asked for and it does not fit, and opens it;
    ``more`` goes to ``pi2rt.open_runtime``. ``context``, ``max_sequences``: None leaves them to a plan."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="pi2rt: warning: %(message)s")
    from pi2rt import MemoryBudgetError, RequestError, open_runtime  # imported before the clock starts
    from pi2rt.cli._console import Bar
    from pi2rt.host.output_file import OutputFile

    if options.convert and options.memory is None:
        raise RequestError(
            "--convert is for a model that does not fit into --memory SIZE; say how much that is"
        )
    if more.get("trace") is not None:
        OutputFile(more["trace"])  # refused before a model is fetched
    path = await fetch(options.model)
    keywords = runtime_keywords(options) | more
    if context is not None:
        keywords["context"] = context
    if max_sequences is not None:
        keywords["max_sequences"] = max_sequences

    async with AsyncExitStack() as stack:

        async def load() -> Opened:
            with Bar("loading") as bar:
                start = time.perf_counter()
                runtime = await stack.enter_async_context(open_runtime(path, on_load=bar.update, **keywords))
                return Opened(runtime, path, time.perf_counter() - start)

        opened = None
        try:
            opened = await load()
        except MemoryBudgetError as error:
            if not (options.convert and error.pack_fits):
                raise
        if opened is None:  # not where the error is handled, which keeps what was loaded before it
            path = await converted(path)
            opened = await load()
        if opened.runtime.model.sparsity != "exact":
            note(f"lossy: {opened.runtime.model.sparsity}")
        yield opened


async def converted(path: str) -> str:
    """The pack of a model in the cache directory, made with a progress bar if it is not there; says where it is."""
    from pi2rt.cli._console import Bar, size
    from pi2rt.opening.pack_cache import ensure_pack, packs_directory

    said: set[str] = set()

    def report(stage: str, done: int, total: int) -> None:
        if stage not in said:
            said.add(stage)
            what = "converting" if stage == "converting" else "waiting for another process that converts"
            note(f"{path} does not fit into the memory; {what} it to a pack in {packs_directory()}")
        bar.stage(stage, done, total)

    with Bar("to a pack") as bar:
        pack = await ensure_pack(path, report)
    note(f"running the pack {pack} ({size(pack.stat().st_size)})")
    return str(pack)


def note(text: str) -> None:
    print(f"pi2rt: {text}", file=sys.stderr)


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return value


def placement(options: argparse.Namespace) -> UnitPlacement:
    """The cores that these options choose, as ``open_runtime`` places them."""
    from pi2rt.host.topology import parse_core_classes, read_topology
    from pi2rt.planner.placement import default_placement

    topology = read_topology()
    classes = parse_core_classes(options.cores, topology) if options.cores else ()
    return default_placement(topology, options.threads, classes)


def kernels(options: argparse.Namespace) -> str | None:
    """The kernel variant that these options choose; None for an executor that has its own."""
    if options.executor != "cpu":
        return None
    from pi2rt.cython_kernels.kernels import native

    return str(native.current(options.kernels))


def share(text: str) -> float:
    """argparse type: above 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and below 1")
    return value
