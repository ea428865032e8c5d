"""Fetch a model ahead of time."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="NAME", help="a name from 'pi2rt models', or hf:ORG/REPO/FILE.gguf")


def main(options: argparse.Namespace) -> int:
    from pi2rt.cli._interrupt import run_until_interrupted

    async def pull() -> int:
        print(await fetch(options.model))
        return 0

    return run_until_interrupted(pull)


async def fetch(model: str) -> str:
    """The path of ``model``, fetched with a progress bar if need be.

    Raises:
        ModelNotFoundError, DownloadError: see ``pi2rt.catalogue.pull``.
    """
    from pi2rt import catalogue
    from pi2rt.cli._console import Bar

    if not catalogue.is_fetchable(model):
        return str(catalogue.resolve(model))
    with Bar(model) as bar:
        return str(await catalogue.pull(model, bar.stage))
