"""What a request may ask for, and what its chunks say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pytest
import trio
from trio.testing import MockClock

from pi2rt._errors import BusyError, ContextOverflowError, RequestError
from pi2rt.engine import Chunk, Completion, SamplingParams
from pi2rt.executors.simulated.executor import scripted
from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import EOS, continuation, numbers, opened
from tests.support.tiny_models import VOCAB_SIZE


def text(chunks: Iterable[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


async def test_context_overflow_is_an_error_before_anything_runs(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, context=256) as o:
        with pytest.raises(
            ContextOverflowError, match=r"^prompt of 200 tokens plus max_tokens=57 exceeds .* 256"
        ) as info:
            o.engine.stream(numbers(200), SamplingParams(max_tokens=57))
        assert (info.value.prompt_tokens, info.value.max_tokens, info.value.context) == (200, 57, 256)
        with pytest.raises(ContextOverflowError):
            o.engine.stream(numbers(256))
        with pytest.raises(ContextOverflowError):
            await o.engine.score(numbers(257))
        assert o.log.steps == []


async def test_without_max_tokens_the_context_is_the_limit(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, context=256) as o:
        prompt = numbers(200)
        chunks = await o.chunks(prompt)
        assert [chunk.token for chunk in chunks] == continuation(prompt, 56)
        assert chunks[-1].finish_reason == "length"
        assert len(await o.chunks(numbers(255))) == 1


async def test_no_more_of_a_prompt_is_read_than_the_context_holds(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    read = 0

    def endless() -> Iterator[int]:
        nonlocal read
        while True:
            read += 1
            yield 5

    async with opened(tokenizer, context=256) as o:
        with pytest.raises(
            ContextOverflowError, match=r"^prompt of at least 257 tokens plus max_tokens=1 exceeds"
        ):
            o.engine.stream(endless())
        with pytest.raises(
            ContextOverflowError, match=r"^prompt of at least 257 tokens plus max_tokens=0 exceeds"
        ):
            await o.engine.score(endless())
        assert read == 2 * 257
        with pytest.raises(ContextOverflowError, match=r"^prompt of 100000 tokens plus"):
            o.engine.stream([5] * 100_000)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], r"^prompt: empty"),
        (
            [1, VOCAB_SIZE],
            rf"^prompt: token id {VOCAB_SIZE} is outside the vocabulary of {VOCAB_SIZE} tokens",
        ),
        ([1, -1], r"^prompt: token id -1 is outside"),
        ([1, 1 << 40], r"^prompt: token ids are integers"),
        ([1, 1.5], r"^prompt: token ids are integers"),
        (["a"], r"^prompt: token ids are integers"),
    ],
)
async def test_bad_prompts(tokenizer: Tokenizer, prompt: Sequence[int], message: str) -> None:
    async with opened(tokenizer) as o:
        with pytest.raises(RequestError, match=message):
            o.engine.stream(prompt)
        with pytest.raises(RequestError, match=message):
            await o.engine.score(prompt)


async def test_a_bias_on_a_token_that_is_not_there(tokenizer: Tokenizer) -> None:
    async with opened(tokenizer) as o:
        with pytest.raises(RequestError, match=r"^logit_bias: token id 5000 is outside"):
            o.engine.stream([1], SamplingParams(logit_bias={5000: 1.0}))


async def test_the_end_of_text_token_adds_no_text(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    ids = tokenizer.encode("so it ends", add_special=False)
    async with opened(tokenizer, next_token=scripted([*ids, EOS])) as o:
        async with o.engine.stream([1, 2]) as stream:
            chunks = [chunk async for chunk in stream]
        assert [chunk.token for chunk in chunks] == [*ids, EOS]
        assert text(chunks) == "so it ends"
        assert [chunk.finish_reason for chunk in chunks] == [None] * len(ids) + ["stop"]
        assert [chunk.timing is not None for chunk in chunks] == [False] * len(ids) + [True]
        chunks = await o.chunks([1, 2], max_tokens=30, ignore_eos=True)
        assert chunks[-1].finish_reason == "length"
        chunks = await o.chunks([1, 2], max_tokens=30, stop_token_ids=(ids[1],))
        assert (len(chunks), chunks[-1].finish_reason) == (2, "stop")
        assert text(chunks) == tokenizer.decode(ids[:1])


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("ver the l",), "the quick brown fox jumps o"),  # across tokens
        (("the ",), ""),
        (
            ("zebra", "lazier"),
            "the quick brown fox jumps over the lazy dog",
        ),  # its beginning is held back, then shown
        ("dog", "the quick brown fox jumps over the lazy "),
        (("dog!",), "the quick brown fox jumps over the lazy dog"),  # held back until the very end
        (("brown", "quick"), "the "),
    ],
)
async def test_stop_strings(
    tokenizer: Tokenizer, autojump_clock: MockClock, stop: str | tuple[str, ...], expected: str
) -> None:
    sentence = "the quick brown fox jumps over the lazy dog"
    ids = tokenizer.encode(sentence, add_special=False)
    async with opened(tokenizer, next_token=scripted([*ids, EOS])) as o:
        chunks = await o.chunks([1], stop=stop, ignore_eos=False)
        assert text(chunks) == expected
        assert chunks[-1].finish_reason == "stop"
        assert (len(chunks) < len(ids)) == (expected != sentence and "dog" not in stop)


async def test_characters_come_whole(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    ids = tokenizer.encode("né 漢字 🙂", add_special=False)
    async with opened(tokenizer, next_token=scripted(ids)) as o:
        chunks = await o.chunks([1], max_tokens=len(ids))
        assert text(chunks) == "né 漢字 🙂"
        assert "\ufffd" not in text(chunks)
        cut = await o.chunks([1], max_tokens=len(ids) - 1)
        assert text(cut) == "né 漢字 \ufffd"  # the rest of the character never came


async def test_log_probabilities(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer) as o:
        completion = Completion.of(await o.chunks(numbers(5), max_tokens=4, logprobs=2))
        assert len(completion.logprobs) == len(completion.top_logprobs) == 4
        for token, logprob, top in zip(
            completion.tokens, completion.logprobs, completion.top_logprobs, strict=True
        ):
            assert (len(top), top[0]) == (2, (token, logprob))
            assert logprob < 0
        chosen_only = Completion.of(await o.chunks(numbers(5), max_tokens=4, logprobs=0))
        assert chosen_only.logprobs == completion.logprobs
        assert chosen_only.top_logprobs == ((),) * 4
        none = await o.chunks(numbers(5), max_tokens=4)
        assert [chunk.logprob for chunk in none] == [None] * 4
        assert Completion.of(none).logprobs == Completion.of(none).top_logprobs == ()


async def test_progress_of_prefill(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, context=2048) as o:
        prompt = numbers(1200)
        calls: list[tuple[int, int]] = []
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        for _ in range(2):
            async with o.engine.stream(
                prompt, params, on_prefill=lambda done, total: calls.append((done, total))
            ) as chunks:
                async for _chunk in chunks:
                    pass
        assert calls == [(512, 1200), (1024, 1200), (1200, 1200), (1200, 1200)]


async def test_progress_that_raises_ends_its_request_only(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    def raises(done: int, total: int) -> None:
        raise LookupError("no bar")

    async with opened(tokenizer) as o:
        async with o.engine.stream(numbers(5), on_prefill=raises) as chunks:
            with pytest.raises(LookupError, match="no bar"):
                await anext(chunks)
        assert len(await o.tokens(numbers(5), 5)) == 5


async def test_a_token_without_a_spelling_fails_its_request_only(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    """Embeddings are often padded: the model can say what the tokenizer does not know."""

    class Short(Tokenizer):
        def __init__(self) -> None:
            self.__dict__.update(tokenizer.__dict__)
            self.vocab_size = 100

    async with opened(Short(), next_token=scripted([5, 200])) as o:
        async with o.engine.stream([1]) as chunks:
            assert (await anext(chunks)).token == 5
            with pytest.raises(RequestError, match="token id 200"):
                await anext(chunks)
        assert len(await o.tokens([1], 1)) == 1


async def test_two_tasks_cannot_read_one_stream(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, seconds_per_step=1) as o:
        async with o.engine.stream(numbers(5)) as chunks, trio.open_nursery() as nursery:
            nursery.start_soon(anext, chunks)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(BusyError):
                await anext(chunks)
            nursery.cancel_scope.cancel()


async def test_a_cancelled_read_loses_no_chunk(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, seconds_per_step=1) as o:
        prompt = numbers(5)
        got = []
        async with o.engine.stream(prompt, SamplingParams(max_tokens=20, ignore_eos=True)) as chunks:
            while len(got) < 20:
                with trio.move_on_after(0.3):
                    got.append((await anext(chunks)).token)
        assert got == continuation(prompt, 20)


async def test_every_read_is_a_checkpoint(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer) as o:
        async with o.engine.stream(numbers(5), SamplingParams(max_tokens=3, ignore_eos=True)) as chunks:
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(3):
                with trio.testing.assert_checkpoints():
                    await anext(chunks)
            with trio.testing.assert_checkpoints(), pytest.raises(StopAsyncIteration):
                await anext(chunks)


async def test_scores_and_logits(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, max_tokens=100) as o:
        prompt = numbers(20)
        tokens = [*prompt, *continuation(prompt, 200)]
        scores = await o.engine.score(tokens)
        assert (scores.shape, str(scores.dtype)) == ((219,), "float32")
        assert (scores[19:] > -1).all()  # the greedy continuation is the likeliest
        assert (scores[:19] < -1).all()
        logits = await o.engine.logits(tokens)
        assert (logits.shape, str(logits.dtype)) == ((220, VOCAB_SIZE), "float32")
        assert logits[19:-1].argmax(1).tolist() == continuation(prompt, 200)
        assert (await o.engine.score([7])).shape == (0,)


async def test_reading_beside_writing(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, seconds_per_step=0.01) as o:
        prompt = numbers(20)
        tokens = [*prompt, *continuation(prompt, 300)]
        alone = await o.engine.score(tokens)
        async with o.engine.stream(numbers(5)) as chunks:
            await anext(chunks)
            assert ((await o.engine.score(tokens)) == alone).all()
            with trio.move_on_after(0.01) as scope:
                await o.engine.score(tokens)
            assert scope.cancelled_caught
