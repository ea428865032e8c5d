"""Requests beside each other, with a real model."""

from __future__ import annotations

import pytest
import trio

import pi2rt
from tests.support.real_model import smollm2


def said(completion: pi2rt.Completion) -> tuple[object, ...]:
    return completion.tokens, completion.logprobs, completion.top_logprobs


@pytest.mark.slow
async def test_short_prompts_and_bad_parameters_beside_a_long_prompt() -> None:
    async with pi2rt.open_runtime(smollm2(), context=2048, max_sequences=12) as runtime:
        ids = runtime.tokenizer.encode(
            "The quick brown fox jumps over the lazy dog. " * 150, add_special=False
        )
        long, short = ids[:1200], [[50 + i] for i in range(5)]
        expected = [(await runtime.generate(prompt, max_tokens=1, logprobs=5)) for prompt in short]
        ended: list[str] = []
        prefilled: list[int] = []  # of the long prompt, when a short one ended
        got: list[pi2rt.Completion] = []

        done = 0

        def on_prefill(now: int, total: int) -> None:
            nonlocal done
            done = now

        async def ask_long() -> None:
            got.append(await runtime.generate([7, *long], max_tokens=8, logprobs=5, on_prefill=on_prefill))
            ended.append("long")

        async def ask_short(i: int) -> None:
            assert said(await runtime.generate(short[i], max_tokens=1, logprobs=5)) == said(expected[i])
            ended.append("short")
            prefilled.append(done)

        async def ask_badly() -> None:
            bias = {7: 1e9}
            with pytest.raises(pi2rt.RequestError, match=r"^repetition_penalty=1\.2e-38: "):
                await runtime.generate([7, 8], logit_bias=bias, repetition_penalty=1.2e-38, max_tokens=5)
            ended.append("bad")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_long)
            while runtime.statistics().engine.steps_in_flight < 2:  # noqa: ASYNC110 - real steps
                await trio.sleep(0.001)
            for i in range(5):
                nursery.start_soon(ask_short, i)
            for _ in range(6):
                nursery.start_soon(ask_badly)
        assert ended[-1] == "long"
        assert ended.count("bad") == 6
        assert max(prefilled) < len(long)
        assert runtime.statistics().actors[0].generation == 0
        assert said(got[0]) == said(await runtime.generate([7, *long], max_tokens=8, logprobs=5))
