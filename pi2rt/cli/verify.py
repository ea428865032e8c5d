"""Compare every checksum of a pack."""

from __future__ import annotations

import argparse
from functools import partial


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", metavar="FILE.pi2", help="a pack, as 'pi2rt convert' writes it")


def main(options: argparse.Namespace) -> int:
    from pi2rt.cli._interrupt import run_until_interrupted

    return run_until_interrupted(partial(_verify, options.pack))


async def _verify(path: str) -> int:
    from pi2rt.cli._console import Bar, work_in_thread
    from pi2rt.planner.pack.convert import verify

    with Bar("verifying") as bar:
        broken = await work_in_thread(partial(verify, path), bar)
    for each in broken:
        print(f"{path}: {each.name}: {each.problem}")
    if not broken:
        print(f"{path}: whole")
    return 1 if broken else 0
