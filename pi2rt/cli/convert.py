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
        "--order",
        metavar="CALIBRATION",
        help="neurons of a block that fire together lie together, as 'pi2rt calibrate' found for this model",
    )


def main(options: argparse.Namespace) -> int:
    from pi2rt.cli._interrupt import run_until_interrupted

    return run_until_interrupted(partial(_convert, options))


async def _convert(options: argparse.Namespace) -> int:
    import os

    from pi2rt.cli._console import Bar, size, work_in_thread
    from pi2rt.cli.pull import fetch
    from pi2rt.planner.convert import convert

    path = await fetch(options.model)
    with Bar("converting") as bar:
        await work_in_thread(
            partial(
                convert,
                path,
                options.pack,
                overwrite=options.force,
                bundles=options.bundles,
                order=options.order,
            ),
            bar,
        )
    print(f"{options.pack}: {size(os.stat(options.pack).st_size)}")
    return 0
