"""Prompts are tokenised beside the loop, up to what the context holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel

import pi2rt
from pi2rt.engine.prompt_encoder import LONG_TEXT, MESSAGE, MOST_BYTES, PromptEncoder, prompt_bytes
from pi2rt.formats import open_model_file
from pi2rt.tokenizer import Tokenizer, load_tokenizer
from pi2rt.tokenizer.marked_text import Runs
from tests.support.real_model import smollm2
from tests.tokenizer.files import byte_level_file

LETTERS = "a" * (LONG_TEXT + 1)


class Slow:
    """An encoder that makes a token of each character, after it has asked."""

    dropped, most_bytes = b"", 1

    def __init__(self, ask: Callable[[], object]) -> None:
        self._ask = ask
        self.steps = 0

    def pieces(self, text: str, trusted: Runs) -> Iterator[list[int]]:
        for character in text:
            self.steps += 1
            self._ask()
            yield [ord(character)]


def tokenizer_of(encoder: Slow) -> Tokenizer:
    return Tokenizer(
        encoder,
        lambda id_: bytes([id_]),
        vocab_size=256,
        special_ids=frozenset(),
        bos_id=None,
        eos_ids=frozenset(),
        prefix_ids=(),
        suffix_ids=(),
        strip_space=False,
        chat_template=lambda: None,
    )


async def test_the_loop_runs_between_two_steps() -> None:
    seen = 0

    async def here() -> None:
        nonlocal seen
        await trio.lowlevel.checkpoint()
        seen += 1

    encoder = Slow(lambda: trio.from_thread.run(here))
    prompts = PromptEncoder(tokenizer_of(encoder), 1 << 20)
    assert list(await prompts.tokenise(LETTERS, None, add_special=False)) == list(LETTERS.encode())
    assert seen == len(LETTERS)


async def test_a_cancelled_prompt_is_not_read_on() -> None:
    stepped, go_on, left = trio.Event(), threading.Event(), threading.Event()

    class Stops(Slow):
        def pieces(self, text: str, trusted: Runs) -> Iterator[list[int]]:
            try:
                yield from super().pieces(text, trusted)
            finally:
                left.set()

    def ask() -> None:
        if encoder.steps == 3:
            trio.from_thread.run_sync(stepped.set)
            go_on.wait()

    encoder = Stops(ask)
    prompts = PromptEncoder(tokenizer_of(encoder), 1 << 20)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: prompts.tokenise(LETTERS, None, add_special=False))
        await stepped.wait()
        nursery.cancel_scope.cancel()  # returns at once, though the step goes on
    go_on.set()
    await trio.to_thread.run_sync(left.wait)
    assert encoder.steps == 3


async def test_it_stops_where_the_context_is_full() -> None:
    encoder = Slow(lambda: None)
    encoder.most_bytes = 1 << 20  # says nothing
    prompts = PromptEncoder(tokenizer_of(encoder), 100)
    with pytest.raises(
        pi2rt.ContextOverflowError, match=r"^prompt of at least 91 tokens plus max_tokens=10 "
    ) as info:
        await prompts.tokenise(LETTERS, 10, add_special=False)
    assert encoder.steps == 91
    error = info.value
    assert (error.prompt_tokens, error.max_tokens, error.context, error.at_least) == (91, 10, 100, True)
    assert len(await prompts.tokenise("a" * 99, None, add_special=False)) == 99


async def test_what_cannot_fit_is_not_tokenised_at_all() -> None:
    encoder = Slow(lambda: None)
    prompts = PromptEncoder(tokenizer_of(encoder), 100)
    with pytest.raises(
        pi2rt.ContextOverflowError, match=r"^prompt of at least \d+ tokens plus max_tokens=1 "
    ):
        await prompts.tokenise("a" * (10 << 20), None, add_special=False)
    rendered = []
    messages = [{"role": "user", "content": [{"type": "text", "text": LETTERS}]}]
    with pytest.raises(pi2rt.ContextOverflowError):
        await prompts.render(messages, None, lambda: rendered.append(1) or "")  # type: ignore[func-returns-value]
    assert (encoder.steps, rendered) == (0, [])


async def test_long_prompts_go_one_at_a_time_and_short_ones_pass() -> None:
    running = most = 0
    lock = threading.Lock()
    together = trio.Event()

    class Counting(Slow):
        def pieces(self, text: str, trusted: Runs) -> Iterator[list[int]]:
            nonlocal running, most
            with lock:
                running += len(text) > LONG_TEXT
                most = max(most, running)
            if len(text) > LONG_TEXT:
                trio.from_thread.run(together.wait)
            yield from super().pieces(text, trusted)
            with lock:
                running -= len(text) > LONG_TEXT

    prompts = PromptEncoder(tokenizer_of(Counting(lambda: None)), 1 << 20)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(lambda: prompts.tokenise(LETTERS, None, add_special=False))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert list(await prompts.tokenise("hi", None, add_special=False)) == [104, 105]
        together.set()
    assert most == 1


async def test_long_conversations_are_rendered_beside_the_loop() -> None:
    prompts = PromptEncoder(tokenizer_of(Slow(lambda: None)), 1 << 20)
    loop = threading.get_ident()
    beside: list[bool] = []
    messages: list[dict[str, Any]]
    many = LONG_TEXT // MESSAGE + 1
    for messages in (
        [{"content": "hi"}] * 3,
        [{"content": LETTERS}],
        [{"content": ""}] * many,
        [{}] * many,
        [{"content": []}] * many,
        [{"content": [{"type": "text", "text": ""}] * many}],
    ):
        await prompts.render(
            messages,
            None,
            lambda: beside.append(threading.get_ident() != loop) or "",  # type: ignore[func-returns-value]
        )
    assert beside == [False, True, True, True, True, True]


async def test_the_runtime_refuses_what_is_too_long(tiny: Path) -> None:
    async with pi2rt.open_runtime(tiny, executor="simulated") as runtime:
        for prompt in ("so it goes " * 10_000, [{"role": "user", "content": "so it goes " * 10_000}]):
            with pytest.raises(pi2rt.ContextOverflowError, match="prompt of at least") as info:
                await runtime.generate(prompt, max_tokens=24)
            assert info.value.prompt_tokens > 1000
        with pytest.raises(pi2rt.ContextOverflowError, match=r"prompt of 1010 tokens plus max_tokens=24"):
            await runtime.generate([5] * 1010, max_tokens=24)
        with pytest.raises(pi2rt.ContextOverflowError, match=r"prompt of at least 1025 tokens"):
            await runtime.generate(repeat(5), max_tokens=24)


def test_a_budget_counts_the_text_of_a_prompt() -> None:
    tokenizer = load_tokenizer(byte_level_file(control=["<|im_end|>"]))
    assert prompt_bytes(tokenizer, 1000) == 1000 * (4 * 10 + 16)
    long = load_tokenizer(byte_level_file(control=["x" * 2000]))
    assert prompt_bytes(long, 1000) == 1000 * (4 * MOST_BYTES + 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", ["some words ", "a", " ", "\U0001f468\u200d\U0001f469", "\u4e2d", " \n"], ids=repr
)
async def test_the_loop_hardly_waits(part: str) -> None:
    """In real time, so generously: at once, such a text takes seconds. 25 ms were measured on a busy machine."""
    with open_model_file(smollm2()) as file:
        prompts = PromptEncoder(load_tokenizer(file), 1 << 24)
    text = part * (500_000 // len(part))
    longest = 0.0

    async def look() -> None:
        nonlocal longest
        while True:
            before = trio.current_time()
            await trio.lowlevel.checkpoint()
            longest = max(longest, trio.current_time() - before)
            await trio.sleep(0.001)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        ids = await prompts.tokenise(text, None, add_special=False)
        nursery.cancel_scope.cancel()
    assert len(ids) > 5000
    assert longest < 0.5
