"""Make a pack of a model: the same values, laid out for fast loading and for models larger than memory."""

from __future__ import annotations

import argparse
from functools import partial

from pi2rt.cli import _runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _runtime.add_model_argument(parser)
    parser.add_argument("pack", metavar="FILE.pi2", help="the pack to write")
    parser.add_argument("--force", action="store_true", help="replace the pack if it is there")
    parser.add_argument(
        "--bundles",
        choices=("relu", "gates", "all", "off"),
        default="relu",
        help="feed-forward blocks that are stored by neuron: of ReLU models; of these with their gates, for --sparsity "
        "predicted; all, for --sparsity thresholded; none (default: relu)",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="what 'pi2rt calibrate' found for this model: neurons that are active together lie together, and ReLU "
        "blocks whose neurons are rarely inactive are not stored by neuron",
    )
    parser.add_argument(
        "--dense-above",
        type=_runtime.share,
        metavar="SHARE",
        help="of neurons that are active, by the calibration: such blocks are not stored by neuron (default: where "
        "whole matrices take less time, measured on this machine)",
    )


def main(options: argparse.Namespace) -> int:
    from pi2rt.cli._interrupt import run_until_interrupted

    return run_until_interrupted(partial(_convert, options))


async def _convert(options: argparse.Namespace) -> int:
    import os

    from pi2rt._errors import RequestError
    from pi2rt.cli._console import Bar, size, work_in_thread
    from pi2rt.cli.pull import fetch
    from pi2rt.host.output_file import OutputFile
    from pi2rt.planner.pack.convert import convert

    if options.dense_above is not None and options.calibration is None:
        raise RequestError("--dense-above needs a --calibration, which says how many neurons are active")
    OutputFile(options.pack, seeks=True, overwrite=options.force)  # refused before a model is fetched
    path = await fetch(options.model)
    with Bar("converting") as bar:
        dense = await work_in_thread(
            partial(
                convert,
                path,
                options.pack,
                overwrite=options.force,
                bundles=options.bundles,
                calibration=options.calibration,
                dense_above=options.dense_above,
            ),
            bar,
        )
    if dense:
        least, most = min(each.firing for each in dense), max(each.firing for each in dense)
        how = "measured" if options.dense_above is None else "--dense-above"
        print(
            f"feed-forward blocks that stay whole: {len(dense)}; {least:.0%} to {most:.0%} of their neurons are "
            f"active, more than {dense[0].above:.0%} ({how})"
        )
    print(f"{options.pack}: {size(os.stat(options.pack).st_size)}")
    return 0
