"""A conversation at the terminal: every turn sees the ones before, whose KV entries are reused."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import TYPE_CHECKING

import trio

from pi2rt._errors import ExecutorError, Pi2rtError, RequestError
from pi2rt.cli._streams import write

if TYPE_CHECKING:
    from pi2rt import Runtime, SamplingParams

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


async def chat(runtime: Runtime, params: SamplingParams, system: str | None) -> int:
    """Runs until the user leaves; returns the exit status."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing and a history
    beginning = [] if system is None else [{"role": "system", "content": system}]
    history = list(beginning)
    print(_HELP, file=sys.stderr)
    while (line := _read_line()) is not None:
        if line.startswith("/"):
            if line == "/exit":
                break
            if line == "/reset":
                history = list(beginning)
            else:
                print(_HELP, file=sys.stderr)
        elif line:
            question = {"role": "user", "content": line}
            try:
                answer = await _answer(runtime, [*history, question], params)
            except (
                RequestError,
                ExecutorError,
            ) as error:  # the context is full, most likely; what was said stays
                print(f"{error} (or start afresh with /reset)", file=sys.stderr)
            else:
                history += [question, {"role": "assistant", "content": answer}]
    return 0


def _read_line() -> str | None:
    """The next line without surrounding blanks, "" after Ctrl-C, None at the end.

    This blocks the Trio loop on purpose: nothing else runs in this process while the user types, and only the
    main thread can have line editing and Ctrl-C at once.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return input("> ").strip()
    except KeyboardInterrupt:
        print(flush=True)
        return ""
    except UnicodeDecodeError:
        print("that line is not UTF-8", file=sys.stderr)
        return ""
    except EOFError:
        print(flush=True)
        return None
    finally:
        signal.signal(signal.SIGINT, before)


async def _answer(runtime: Runtime, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Streams one answer to standard output; Ctrl-C ends it early. Returns the text so far."""
    text = ""
    failure: Pi2rtError | None = None
    with trio.open_signal_receiver(signal.SIGINT) as interrupts:
        async with trio.open_nursery() as nursery:

            async def stop_when_interrupted() -> None:
                await anext(interrupts)
                nursery.cancel_scope.cancel()

            nursery.start_soon(stop_when_interrupted)
            try:
                async with runtime.stream(messages, params) as chunks:
                    async for chunk in chunks:
                        text += chunk.text
                        await write(chunk.text)
            except Pi2rtError as error:
                failure = error
            nursery.cancel_scope.cancel()
    await write("\n")
    if failure is not None:
        raise failure
    return text
