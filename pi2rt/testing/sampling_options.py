"""Each field of ``Sampling`` does what ``pi2rt.executors.reference.sampling`` says, at each position of a text.

An executor returns logits beside the token, so that tokens are compared with what the reference picks from the
executor's own logits: errors of its arithmetic do not count, those of its sampling do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pi2rt.runtime.executor import StepExecutor
from pi2rt.runtime.step import Bind, Int32s, Sampling, Slice, Step
from pi2rt.testing.harness import FOLLOW_ON, GREEDY, Harness, in_trio

_COUNT = 16  # tokens of a text; after half of them the distribution is flat, after the others it is peaked


class SamplingOptions(Harness):
    """One test for each field, and for what a slot counts."""

    async def check_texts(
        self,
        executor: StepExecutor,
        samplings: Sequence[Sampling],
        what: str,
        *,
        count: int = _COUNT,
        prompts: Sequence[Int32s] | None = None,
        histories: Sequence[Int32s] | None = None,
    ) -> None:
        """Texts of one slot for each of ``samplings`` (as many as there are slots at most), generated side by side."""
        if prompts is None:
            prompts = [self.prompt(12 + slot, salt=slot) for slot in range(len(samplings))]
        if histories is None:
            histories = prompts
        counts = [np.bincount(each, minlength=self.vocab_size).astype(np.int32) for each in histories]
        at = [len(prompt) for prompt in prompts]
        binds = tuple(Bind(slot, each, histories[slot]) for slot, each in enumerate(samplings))
        slices = tuple(
            Slice(slot, 0, self.pages(slot), prompts[slot], sample=True, logits=True)
            for slot in range(len(samplings))
        )
        for number in range(count):
            outputs = await self.run(executor, Step(number, slices, binds))
            for slot, output in enumerate(outputs):
                token, logits = output.token, output.rows[-1]
                self.check_token(token, logits, samplings[slot], counts[slot], at[slot], what)
                counts[slot][token] += 1
            binds = ()
            slices = tuple(
                Slice(slot, at[slot], self.pages(slot), FOLLOW_ON, sample=True, logits=True)
                for slot in range(len(samplings))
            )
            at = [position + 1 for position in at]

    async def check_field(self, field: str, *values: float) -> None:
        """Texts with ``field`` at each of the values (as many as there are slots at most)."""
        async with self.opened() as executor:
            options: list[dict[str, Any]] = [
                {"temperature": 1.0, "seed": 20 + slot, field: value} for slot, value in enumerate(values)
            ]
            samplings = [Sampling(**each) for each in options]
            await self.check_texts(executor, samplings, field)

    @in_trio
    async def test_greedy(self) -> None:
        async with self.opened() as executor:
            await self.check_texts(executor, [GREEDY] * 4, "temperature 0")

    @in_trio
    async def test_temperature(self) -> None:
        await self.check_field("temperature", 0.3, 0.8, 1.5, 4.0)

    @in_trio
    async def test_seed(self) -> None:
        """Of 64 bits."""
        await self.check_field("seed", 0, 1, 2**32 + 1, 2**64 - 1)

    @in_trio
    async def test_random_numbers_depend_on_seed_and_position_alone(self) -> None:
        """The same text from the same seed in each slice of a step, though each begins at another step."""
        sampling = Sampling(temperature=1.0, seed=11)
        async with self.opened() as executor:
            prompt = self.prompt(10)
            (alone,) = await self.generate(executor, prompt, 12, (3,), sampling)
            texts: dict[int, list[int]] = {}
            for number in range(14):
                begins = (number // 2,) if number % 2 == 0 and number // 2 < 3 else ()
                slices = [
                    Slice(slot, 9 + len(text), self.pages(slot), FOLLOW_ON, sample=True)
                    for slot, text in reversed(texts.items())
                ]
                slices += [Slice(slot, 0, self.pages(slot), prompt, sample=True) for slot in begins]
                binds = tuple(Bind(slot, sampling, prompt) for slot in begins)
                texts |= {slot: [] for slot in begins}
                step = Step(number, tuple(slices), binds)
                for piece, output in zip(step.slices, await self.run(executor, step), strict=True):
                    texts[piece.slot].append(output.token)
            for slot, text in texts.items():
                what = f"slot {slot}, though the random number of a token depends on seed and position alone"
                got = text[: len(alone)]
                await self.check_text(executor, prompt, sampling, got, alone[: len(got)], what)

    @in_trio
    async def test_top_k(self) -> None:
        await self.check_field("top_k", 1, 2, 5, 1000)

    @in_trio
    async def test_top_p(self) -> None:
        await self.check_field("top_p", 0.1, 0.5, 0.9, 1.0)

    @in_trio
    async def test_min_p(self) -> None:
        await self.check_field("min_p", 0.05, 0.3, 0.9, 1.0)

    @in_trio
    async def test_all_cuts_at_once(self) -> None:
        async with self.opened() as executor:
            samplings = [
                Sampling(temperature=1.4, top_k=30, top_p=0.8, min_p=0.02, seed=1),
                Sampling(temperature=0.7, top_k=4, top_p=0.95, seed=2),
                Sampling(temperature=2.5, top_p=0.6, min_p=0.2, seed=3),
                Sampling(temperature=1.0, top_k=200, min_p=0.001, seed=4),
            ]
            await self.check_texts(executor, samplings, "top_k, top_p and min_p together")

    @in_trio
    async def test_repetition_penalty(self) -> None:
        """Of positive logits it divides, negative ones it multiplies."""
        await self.check_field("repetition_penalty", 1.3, 5.0, 0.5, 1.05)

    @in_trio
    async def test_presence_penalty(self) -> None:
        await self.check_field("presence_penalty", 0.5, 3.0, -1.0, 20.0)

    @in_trio
    async def test_frequency_penalty(self) -> None:
        await self.check_field("frequency_penalty", 0.5, 3.0, -1.0, 20.0)

    @in_trio
    async def test_logit_bias(self) -> None:
        """It comes before temperature and penalties, which change it as they change the logits."""
        async with self.opened() as executor:
            half = tuple((token, 4.0) for token in range(0, self.vocab_size, 2))
            forbidden = tuple((token, -np.inf) for token in range(self.vocab_size) if token % 5)
            samplings = [
                Sampling(logit_bias=((7, 100.0),)),
                Sampling(temperature=3.0, seed=1, logit_bias=half),
                Sampling(temperature=0.5, seed=2, logit_bias=forbidden),
                Sampling(temperature=1.0, seed=3, logit_bias=half, repetition_penalty=2.0),
            ]
            await self.check_texts(executor, samplings, "logit_bias")

    @in_trio
    async def test_history_counts(self) -> None:
        """Penalties count the whole of ``Bind.history``, each token as often as it is there, before it was run."""
        async with self.opened() as executor:
            prompts = [self.prompt(8, salt) for salt in range(4)]
            half = np.arange(0, self.vocab_size, 2, dtype=np.int32)
            histories = [
                np.concatenate((prompts[0], half)),
                np.concatenate((prompts[1], half, half, half[: len(half) // 2])),
                np.concatenate((np.repeat(half + 1, 5), prompts[2])),
                prompts[3],
            ]
            samplings = [
                Sampling(temperature=1.0, seed=1, presence_penalty=6.0),
                Sampling(temperature=1.0, seed=2, frequency_penalty=2.0),
                Sampling(temperature=1.0, seed=3, frequency_penalty=1.0),
                Sampling(temperature=1.0, seed=4, repetition_penalty=4.0),
            ]
            await self.check_texts(
                executor,
                samplings,
                "penalties of Bind.history",
                prompts=prompts,
                histories=histories,
            )

    @in_trio
    async def test_generated_tokens_count(self) -> None:
        """As history does, so that a penalty ends a loop."""
        async with self.opened() as executor:
            samplings = [
                Sampling(frequency_penalty=8.0),
                Sampling(presence_penalty=30.0),
                Sampling(repetition_penalty=10.0),
                Sampling(temperature=0.7, seed=1, frequency_penalty=4.0),
            ]
            nothing = np.empty(0, np.int32)
            await self.check_texts(
                executor,
                samplings,
                "penalties of generated tokens",
                count=24,
                histories=[nothing] * len(samplings),
            )

    @in_trio
    async def test_a_bind_replaces_what_the_slot_counted(self) -> None:
        """History, generated tokens and options of the sequence before are gone."""
        async with self.opened() as executor:
            strong = Sampling(
                temperature=1.0,
                seed=1,
                frequency_penalty=5.0,
                logit_bias=tuple((token, 9.0) for token in range(0, self.vocab_size, 3)),
            )
            await self.check_texts(executor, [strong] * 4, "the sequence before")
            mild = [
                Sampling(temperature=1.0, seed=seed, frequency_penalty=penalty)
                for seed, penalty in ((2, 3.0), (3, 0.5), (4, 0.0), (5, -2.0))
            ]
            await self.check_texts(executor, mild, "a slot that was bound again")
