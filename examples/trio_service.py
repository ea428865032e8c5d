"""Two answers at the same time in a Trio program; the longer one is cancelled by a deadline."""

import trio

import pi2rt


async def answer(runtime: pi2rt.Runtime, name: str, question: str, tokens: int, seconds: float) -> None:
    text = ""
    with trio.move_on_after(seconds) as deadline:
        messages = [{"role": "user", "content": question}]
        async with runtime.stream(messages, max_tokens=tokens) as chunks:
            async for chunk in chunks:
                text += chunk.text
                if chunk.timing is not None:
                    print(f"{name}: {chunk.timing.decode_tokens_per_s:.0f} tokens/s")
    # Whatever ends the block frees the request's memory: the end, an error, a cancelled scope.
    print(f"{name}{' (cut off)' if deadline.cancelled_caught else ''}: {text.strip()}\n")


async def main() -> None:
    async with pi2rt.open_runtime("smollm2") as runtime:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer, runtime, "short", "What is rain?", 40, 60)
            nursery.start_soon(answer, runtime, "long", "Tell me a very long story about the sea.", 4000, 3)
        statistics = runtime.statistics().engine
        print(f"{statistics.finished} finished, {statistics.cancelled} cancelled")


trio.run(main)
