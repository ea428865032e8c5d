"""The entry point ``pi2rt``: parses, runs one command, and turns every way to fail into one line and a
status.

0: done. 2: usage error. 1: any other error. 128 + n: ended by signal n, as shells have it.
Modules of commands import at the top what parsing needs and everything else where they use it: ``--help`` is
instant.
"""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

from pi2rt import __version__
from pi2rt._errors import Pi2rtError
from pi2rt.cli import bench, calibrate, convert, info, models, perplexity, plan, pull, run, verify
from pi2rt.cli._streams import standard_streams
from pi2rt.host.limits import explained

_COMMANDS = (run, pull, models, convert, verify, calibrate, plan, info, bench, perplexity)


class _Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pi2rt: error: {message} (see '{self.prog} --help')\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line ``arguments`` (None: those of the process) and returns its exit status."""
    with standard_streams(), warnings.catch_warnings():
        warnings.showwarning = _warn
        debug = False
        try:
            try:
                options = _parser().parse_args(arguments)
                debug = options.debug
                status = int(options.command(options))
            finally:  # also behind the help, which ends in SystemExit
                sys.stdout.flush()
        except SystemExit:
            raise
        except BaseException as error:
            if debug:
                raise
            return _report(error)
        return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pi2rt", description="Runs language models on this machine.")
    parser.add_argument("--version", action="version", version=f"pi2rt {__version__}")
    parser.add_argument("--debug", action="store_true", help="on an error, show where it came from")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in _COMMANDS:
        name, first_line = module.__name__.rpartition(".")[2], (module.__doc__ or "").split("\n")[0]
        command = commands.add_parser(name, help=first_line, description=first_line)
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        module.add_arguments(command)
        command.set_defaults(command=module.main)
    return parser


def _report(error: BaseException) -> int:
    """Prints what went wrong and returns the exit status. Of a group, the error a user can act on speaks."""
    leaves = list(_leaves(error))
    for leaf in leaves:
        if isinstance(leaf, Pi2rtError):
            return _say(str(leaf), leaf.exit_status)
    for leaf in leaves:
        if isinstance(leaf, KeyboardInterrupt):
            return 128 + signal.SIGINT
        if isinstance(leaf, BrokenPipeError):
            # Whoever read our output has gone, which is no error ('pi2rt run ... | head -1').
            return 128 + signal.SIGPIPE
        if (limit := explained(leaf)) is not None:
            return _say(str(limit), limit.exit_status)
    message = str(leaves[0]) or "no message"
    return _say(f"{type(leaves[0]).__name__}: {message}; run with --debug for the traceback", 1)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _warn(message: Warning | str, *where: object, **more: object) -> None:
    """As ``warnings.showwarning``, for people."""
    print(f"pi2rt: warning: {message}", file=sys.stderr)


def _say(message: str, status: int) -> int:
    print(f"pi2rt: error: {' '.join(message.split())}", file=sys.stderr)
    return status
