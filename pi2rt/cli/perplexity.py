"""Measure how well a model predicts a text.

The method is that of llama.cpp's tool ``llama-perplexity``, so that the numbers can be compared: the text is
cut into chunks of N tokens, each one is evaluated on its own, and the tokens of its second half are scored.
Where the model begins texts with a BOS token, that takes the place of the first token of each chunk. What is
left over at the end is not used. Perplexity is exp of the mean negative log likelihood (natural) of the
scored tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial

from pi2rt.cli import _runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _runtime.add_model_argument(parser)
    parser.add_argument("file", metavar="FILE", help="text in UTF-8")
    parser.add_argument(
        "--chunk", type=_runtime.positive, default=512, metavar="N", help="tokens (default: 512)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _runtime.add_runtime_options(parser)


def main(options: argparse.Namespace) -> int:
    from pi2rt._errors import RequestError
    from pi2rt.cli._interrupt import run_until_interrupted

    if options.chunk < 4:
        raise RequestError(f"--chunk {options.chunk}: at least 4 tokens are needed")
    try:
        with open(options.file, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise RequestError(f"cannot read {options.file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{options.file} is not UTF-8: {error.reason} at byte {error.start}") from None
    return run_until_interrupted(partial(_run, options, text.removesuffix("\n")))


async def _run(options: argparse.Namespace, text: str) -> int:
    from pi2rt._errors import RequestError

    size = options.chunk
    async with _runtime.opened(options, context=size, max_sequences=1) as opened:
        tokenizer = opened.runtime.tokenizer
        bos = tokenizer.bos_id
        adds_bos = bos is not None and tokenizer.encode("")[:1] == [bos]
        ids = tokenizer.encode(text)
        chunks = len(ids) // size
        if chunks < 1:
            raise RequestError(f"{options.file} has {len(ids)} tokens, fewer than one chunk of {size}")
        total, scored = 0.0, 0
        for number in range(chunks):
            chunk = ids[number * size : (number + 1) * size]
            if adds_bos and bos is not None:
                chunk[0] = bos
            logprobs = await opened.runtime.score(chunk)  # of chunk[1:]
            second_half = logprobs[size // 2 :]
            total -= math.fsum(second_half)
            scored += len(second_half)
            if sys.stderr.isatty() and not options.json:
                running = math.exp(total / scored)
                print(f"chunk {number + 1} of {chunks}: perplexity {running:.4f}", file=sys.stderr)
    perplexity = math.exp(total / scored)
    if options.json:
        print(json.dumps({"perplexity": perplexity, "tokens": scored, "chunks": chunks, "chunk": size}))
    else:
        print(f"perplexity {perplexity:.4f} over {scored} tokens ({chunks} chunks of {size})")
    return 0
