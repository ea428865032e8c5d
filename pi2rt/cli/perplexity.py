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
    return run_until_interrupted(partial(_run, options, read_text(options.file)))


def read_text(path: str) -> str:
    """The text of a file, without a last newline.

    Raises:
        RequestError: it cannot be read, or is not UTF-8.
    """
    from pi2rt._errors import RequestError

    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read().removesuffix("\n")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None


async def _run(options: argparse.Namespace, text: str) -> int:
    import trio

    from pi2rt._errors import RequestError
    from pi2rt.tools.perplexity import cut, perplexity

    size = options.chunk
    async with _runtime.opened(options, context=size, max_sequences=1) as opened:
        encode = opened.runtime.tokenizer.encode
        ids = await trio.to_thread.run_sync(encode, text, abandon_on_cancel=True)
        chunks = cut(opened.runtime.tokenizer, ids, size)
        if not chunks:
            raise RequestError(f"{options.file} has {len(ids)} tokens, fewer than one chunk of {size}")

        def report(done: int, value: float) -> None:
            if sys.stderr.isatty() and not options.json:
                print(f"chunk {done} of {len(chunks)}: perplexity {value:.4f}", file=sys.stderr)

        found = await perplexity(opened.runtime, chunks, report)
    if options.json:
        result = {"perplexity": found.value, "tokens": found.tokens, "chunks": found.chunks, "chunk": size}
        print(json.dumps(result))
    else:
        print(f"perplexity {found.value:.4f} over {found.tokens} tokens ({found.chunks} chunks of {size})")
    return 0
