"""An asyncio service in small: questions come in through a queue, three workers share one engine."""

import asyncio

import pi2rt

QUESTIONS = ["What is rain?", "What is snow?", "What is wind?", "What is fog?", "What is hail?"]


async def worker(engine: pi2rt.AsyncEngine, questions: asyncio.Queue[str]) -> None:
    while True:
        question = await questions.get()
        messages = [{"role": "user", "content": question}]
        completion = await engine.generate(messages, max_tokens=60, temperature=0.7, seed=1)
        print(f"{question}\n  {completion.text.strip()}")
        print(f"  ({completion.timing.ttft_s * 1000:.0f} ms to the first token)")
        questions.task_done()


async def main() -> None:
    questions: asyncio.Queue[str] = asyncio.Queue()
    for question in QUESTIONS:
        questions.put_nowait(question)
    async with pi2rt.AsyncEngine("smollm2", max_sequences=3) as engine:
        workers = [asyncio.create_task(worker(engine, questions)) for _ in range(3)]
        await questions.join()
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


asyncio.run(main())
