"""List the models that are here, and those that have a name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object per model, one a line")


def main(options: argparse.Namespace) -> int:
    from pi2rt.catalogue import catalogue, installed
    from pi2rt.cli._console import size

    present = installed()
    if options.json:
        for model in present:
            print(json.dumps({**asdict(model), "path": str(model.path)}))
        return 0
    rows = [(model.name, model.path.name, size(model.size), str(model.path.parent)) for model in present]
    names = {model.name for model in present}
    rows += [
        (name, entry.file, size(entry.size), f"not fetched yet; 'pi2rt pull {name}'")
        for name, entry in sorted(catalogue().items())
        if name not in names
    ]
    print(table(("NAME", "FILE", "SIZE", "WHERE"), rows))
    return 0


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell, two spaces apart."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)
