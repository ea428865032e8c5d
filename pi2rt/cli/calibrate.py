"""Find which neurons of a pack may be inactive, and what that costs: for 'run --sparsity thresholded'."""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pi2rt.cli import _runtime

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pi2rt.formats.calibration import BlockCalibration, Calibration, Method, Reading

WHICH: tuple[Literal["own", "ordered", "own_half", "ordered_half"], ...] = (
    "own",
    "ordered",
    "own_half",
    "ordered_half",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _runtime.add_model_argument(parser)
    parser.add_argument("file", metavar="TEXT", help="text in UTF-8, of the kind that the model is for")
    parser.add_argument(
        "--resting",
        type=_runtime.share,
        default=0.5,
        metavar="SHARE",
        help="of all neurons, those that are to be inactive, such as 0.3 (default: 0.5)",
    )
    parser.add_argument(
        "--recall",
        type=_runtime.share,
        default=0.98,
        metavar="SHARE",
        help="of the neurons that are active, those that predictors are to name; of packs with --bundles gates "
        "(default: 0.98)",
    )
    parser.add_argument(
        "--rank",
        type=_runtime.positive,
        metavar="N",
        help="of predictors (default: a sixteenth of the width)",
    )
    parser.add_argument(
        "--tokens",
        type=_runtime.positive,
        default=4096,
        metavar="N",
        help="of the text's beginning, looked at (default: 4096)",
    )
    parser.add_argument(
        "--held-out",
        type=_runtime.positive,
        default=2048,
        metavar="N",
        help="tokens of its end, to measure the perplexity on (default: 2048)",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="the file to write (default: MODEL.calibration, where 'run' looks)"
    )
    parser.add_argument("--force", action="store_true", help="replace that file if it is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    group = parser.add_argument_group("runtime, for measuring")
    group.add_argument(
        "--threads", type=_runtime.positive, metavar="N", help="threads that compute (default: one per core)"
    )
    group.add_argument("--memory", metavar="SIZE", help="what the process may take, such as 600M")


def main(options: argparse.Namespace) -> int:
    from pi2rt.cli._interrupt import run_until_interrupted
    from pi2rt.cli.perplexity import read_text

    return run_until_interrupted(partial(_calibrate, options, read_text(options.file)))


async def _calibrate(options: argparse.Namespace, text: str) -> int:
    from pathlib import Path

    from pi2rt.cli._console import Bar
    from pi2rt.cli.pull import fetch
    from pi2rt.formats.calibration import calibration_path
    from pi2rt.host.output_file import OutputFile
    from pi2rt.tools.calibrate import Sample, calibrate

    if options.output is not None:
        OutputFile(options.output, overwrite=options.force)  # refused before a model is fetched
    path = Path(await fetch(options.model))
    destination = calibration_path(path) if options.output is None else Path(options.output)
    with Bar(pieces=True) as bar:
        found = await calibrate(
            path,
            text,
            resting=options.resting,
            recall=options.recall,
            rank=options.rank,
            output=destination,
            overwrite=options.force,
            sample=Sample(tokens=options.tokens, held_out=options.held_out),
            progress=bar.stage,
            threads=options.threads,
            memory=options.memory,
        )
    print(json.dumps(_document(found)) if options.json else "\n".join(_lines(found, destination)))
    return 0


def _document(found: Calibration) -> dict[str, Any]:
    """Shares are of 1. ``hottest_tenth``: the share of all activity that the most active tenth of the neurons has."""
    return {
        "wanted": found.wanted,
        "tokens": found.tokens,
        "scored_tokens": found.scored,
        "perplexity_exact": found.exact,
        "method": found.method,
        "methods": {
            method: {
                "resting": cost.resting,
                "perplexity": cost.perplexity,
                "perplexity_increase": found.increase(method),
            }
            for method, cost in found.costs.items()
        },
        "predicted": None
        if found.predicted is None
        else {
            "not_read": found.predicted.resting,
            "perplexity": found.predicted.perplexity,
            "perplexity_increase": found.increase("predicted"),
        },
        "order": {
            "blocks": len(found.orders()),
            "gap_bytes": found.gap,
            **{which: _reading(found.reading(which)) for which in WHICH},
        },
        "blocks": [
            {
                "layer": block.layer,
                "down": block.down,
                "neurons": block.neurons,
                "tokens": block.tokens,
                "firing": float(block.firing().mean()),
                "hottest_tenth": _hottest_tenth(block, None),
                "methods": {
                    method: {
                        "resting": block.resting(method),
                        "median_threshold": _median(block, method),
                        "hottest_tenth": _hottest_tenth(block, method),
                    }
                    for method in block.thresholds
                },
                "ordered": block.order is not None,
                "reading": None
                if block.readings is None
                else {which: _reading(getattr(block.readings, which)) for which in WHICH},
                "predictor": None
                if (each := block.predictor) is None
                else {
                    "rank": each.rank,
                    "bytes": each.nbytes,
                    "recall": each.recall,
                    "precision": each.precision,
                    "asked": each.asked,
                },
            }
            for block in found.blocks
        ],
    }


def _lines(found: Calibration, path: Path) -> Iterator[str]:
    from pi2rt.cli._console import size

    methods = list(found.costs)
    groups = [f"{name + ': rest':>15} {'threshold':>9} {'hottest tenth':>13}" for name in methods]
    header, names = _names(found)
    yield f"{header} {'neurons':>7} {'fire':>6} " + " ".join(groups)
    for block in found.blocks:
        cells = [
            f"{block.resting(method):>15.1%} {_median(block, method):>9.4f} {_hottest_tenth(block, method):>13.1%}"
            for method in methods
        ]
        yield f"{names[block.down]} {block.neurons:>7} {_fire(block)} " + " ".join(cells)
    yield from _predictor_lines(found)
    yield from _order_lines(found)
    yield f"exact: perplexity {found.exact:.4f} over {found.scored} held-out tokens"
    for method, cost in found.costs.items():
        chosen = ", used by --sparsity thresholded" if method == found.method else ""
        chosen = (
            ", which is exact: as many as were asked for are inactive already"
            if found.does_nothing(method)
            else chosen
        )
        yield (
            f"{method}: {cost.resting:.1%} of neurons are inactive, perplexity {cost.perplexity:.4f} "
            f"({found.increase(method):+.1%}){chosen}"
        )
    if found.predicted is not None:
        yield (
            f"predicted: {found.predicted.resting:.1%} of neurons are not read, perplexity "
            f"{found.predicted.perplexity:.4f} ({found.increase('predicted'):+.1%})"
        )
    yield f"{path}: {size(path.stat().st_size)}"


def _names(found: Calibration) -> tuple[str, dict[str, str]]:
    """The first columns of a table, and what stands there for each block: its layer, and of a mixture's the expert."""
    layers = [block.layer for block in found.blocks]
    several = {layer for layer in layers if layers.count(layer) > 1}
    if not several:
        return f"{'layer':>5}", {block.down: f"{block.layer:>5}" for block in found.blocks}
    numbers = [layers[:at].count(layer) if layer in several else "" for at, layer in enumerate(layers)]
    names = {
        block.down: f"{block.layer:>5} {number:>6}"
        for block, number in zip(found.blocks, numbers, strict=True)
    }
    return f"{'layer':>5} {'expert':>6}", names


def _fire(block: BlockCalibration) -> str:
    return f"{'unused':>6}" if block.tokens == 0 else f"{block.firing().mean():>6.1%}"


def _reading(found: Reading) -> dict[str, float]:
    """For a token, means over the held-out text."""
    return {"pages": found.pages, "reads": found.reads, "reads_through_gaps": found.through}


def _order_lines(found: Calibration) -> Iterator[str]:
    """Reads for a token, before and after, of what is active on the held-out text."""
    from pi2rt.cli._console import size

    if not any(block.readings for block in found.blocks):
        return
    kinds = ("nothing in memory", f"gaps of {size(found.gap)}", "half in memory", "half, gaps")
    header, names = _names(found)
    yield f"{header} {'reads per token:':>16} " + " ".join(f"{kind:>18}" for kind in kinds)
    rows = [(names[block.down], block.readings) for block in found.blocks if block.readings is not None]
    for name, each in rows:
        yield f"{name} {'':>16} " + " ".join(
            f"{f'{before:.1f} -> {after:.1f}':>18}"
            for old, new in ((each.own, each.ordered), (each.own_half, each.ordered_half))
            for before, after in ((old.reads, new.reads), (old.through, new.through))
        )
    before, after = found.reading("own"), found.reading("ordered")
    before_half, after_half = found.reading("own_half"), found.reading("ordered_half")
    yield (
        f"order: {_change(before.reads, after.reads)} reads per token with nothing in memory, "
        f"{_change(before_half.reads, after_half.reads)} with the half of the pages that is active most "
        f"(convert --calibration); {_worth(found, before_half, after_half)}"
    )


def _worth(found: Calibration, before: Reading, after: Reading) -> str:
    if not found.orders():
        return "it gains nothing, and no block keeps it"
    if after.reads > 0.97 * before.reads:
        return "next to nothing where what is active often is in memory"
    return f"of {len(found.orders())} of {len(found.blocks)} blocks"


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else "none"


def _predictor_lines(found: Calibration) -> Iterator[str]:
    from pi2rt.cli._console import size

    records = [(block, block.predictor) for block in found.blocks if block.predictor is not None]
    if not records:
        return
    header, names = _names(found)
    yield f"{header} {'fire':>6} {'predictor: rank':>16} {'size':>10} {'recall':>7} {'precision':>9} {'asked':>6}"
    for block, each in records:
        yield (
            f"{names[block.down]} {_fire(block)} {each.rank:>16} {size(each.nbytes):>10} "
            f"{each.recall:>7.2%} {each.precision:>9.1%} {each.asked:>6.1%}"
        )
    short = sum(each.recall < 0.98 for _, each in records)
    if short:
        yield f"the recall of {short} of {len(records)} predictors is below 98 %: more text or a larger --rank may help"


def _median(block: BlockCalibration, method: Method) -> float:
    import numpy as np

    return float(np.median(block.vector(method)))


def _hottest_tenth(block: BlockCalibration, method: Method | None) -> float:
    """Where nothing is active at all, 0."""
    import numpy as np

    firing = np.sort(block.firing(method))[::-1]
    total = float(firing.sum())
    return float(firing[: max(1, len(firing) // 10)].sum()) / total if total else 0.0
