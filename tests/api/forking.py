"""``python forking.py HOW MODEL [MEMORY]``: forks with engines open; the child and then the parent print what they saw.

HOW: "exit": a child of ``os.fork``, which leaves by the interpreter's exit. "multiprocessing": a process of the fork
context, with an asyncio engine too. "trio": a child forked inside a Trio task; it leaves with ``os._exit``, because
Trio's loop does not survive a child that goes on with it. asyncio's does not either.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import trio

import pi2rt

HOW, MODEL = sys.argv[1:3]
OPTIONS: dict[str, Any] = {"context": 128} | ({"memory": sys.argv[3]} if len(sys.argv) > 3 else {})
ASKED: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}


def said(function: Callable[[], object]) -> str:
    try:
        return f"no error, but {function()!r}"
    except pi2rt.Pi2rtError as error:
        return f"{type(error).__name__}: {error}"


def step(coroutine: Any) -> object:
    """Runs a coroutine that has no reason to wait."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    return "it waits"


def calls_of(engine: Any, chunks: Any) -> dict[str, Callable[[], object]]:
    """Of the Trio or the asyncio API."""
    return {
        "generate": lambda: step(engine.generate("hi")),
        "stream": lambda: engine.stream("hi"),
        "next": lambda: step(chunks.__anext__()),
        "score": lambda: step(engine.score([1, 2])),
        "logits": lambda: step(engine.logits([1, 2])),
        "resize": lambda: step(engine.resize("1G")),
        "statistics": engine.statistics,
        "close": lambda: step(engine.aclose()),
        "drain": lambda: step(engine.aclose(drain=100)),
    }


def sync_calls_of(engine: pi2rt.Engine, stream: pi2rt.Stream) -> dict[str, Callable[[], object]]:
    return {
        "generate": lambda: engine.generate("hi"),
        "stream": lambda: engine.stream("hi"),
        "next": lambda: next(stream),
        "score": lambda: engine.score([1, 2]),
        "logits": lambda: engine.logits([1, 2]),
        "resize": lambda: engine.resize("1G"),
        "statistics": engine.statistics,
        "close": engine.close,
        "drain": lambda: engine.close(drain=100),
        "with": lambda: engine.__exit__(None, None, None),
        "close stream": stream.close,
    }


def tell(**seen: object) -> None:
    print(json.dumps(seen), flush=True)


def in_child(*all_calls: dict[str, Callable[[], object]]) -> None:
    for calls in all_calls:
        tell(**{name: said(call) for name, call in calls.items()})
    with pi2rt.Engine(MODEL, **OPTIONS) as own:
        tell(tokens=own.generate("hi", **ASKED).tokens)


def exiting() -> None:
    engine = pi2rt.Engine(MODEL, **OPTIONS)
    tokens = engine.generate("hi", **ASKED).tokens
    stream = engine.stream("hi", **ASKED)
    got = [next(stream).token]
    pid = os.fork()
    if not pid:
        in_child(sync_calls_of(engine, stream))
        return  # finalisers, then the interpreter's exit
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    got += [chunk.token for chunk in stream]
    other = subprocess.run(
        [sys.executable, "-c", "print(7)"], capture_output=True, text=True, check=True
    ).stdout
    engine.close()
    tell(status=status, pid=os.getpid(), tokens=tokens, went_on=got == list(tokens), subprocess=other.strip())


async def with_asyncio() -> None:
    with pi2rt.Engine(MODEL, **OPTIONS) as engine:
        async with pi2rt.AsyncEngine(MODEL, **OPTIONS) as apart:
            tokens = (await apart.generate("hi", **ASKED)).tokens
            stream, chunks = engine.stream("hi", **ASKED), apart.stream("hi", **ASKED)
            got, apart_got = [next(stream).token], [(await anext(chunks)).token]
            both = sync_calls_of(engine, stream), calls_of(apart, chunks)
            process = multiprocessing.get_context("fork").Process(target=in_child, args=both)
            process.start()
            await asyncio.to_thread(process.join)
            got += [chunk.token for chunk in stream]
            apart_got += [chunk.token async for chunk in chunks]
            went_on = got == apart_got == list(tokens)
    tell(status=process.exitcode, pid=os.getpid(), tokens=tokens, went_on=went_on)


async def with_trio() -> None:
    async with pi2rt.open_runtime(MODEL, **OPTIONS) as runtime:
        tokens = (await runtime.generate("hi", **ASKED)).tokens
        async with runtime.stream("hi", **ASKED) as chunks:
            got = [(await anext(chunks)).token]
            pid = os.fork()
            if not pid:
                calls = calls_of(runtime, chunks) | {
                    "close stream": chunks.close,
                    "leave stream": lambda: step(chunks.__aexit__(None, None, None)),
                }
                tell(**{name: said(call) for name, call in calls.items()})
                os._exit(0)
            status = os.waitstatus_to_exitcode((await trio.to_thread.run_sync(os.waitpid, pid, 0))[1])
            got += [chunk.token async for chunk in chunks]
    tell(status=status, pid=os.getpid(), tokens=tokens, went_on=got == list(tokens))


if HOW == "exit":
    exiting()
elif HOW == "multiprocessing":
    asyncio.run(with_asyncio())
else:
    trio.run(with_trio)
