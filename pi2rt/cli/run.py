"""Answer a prompt, or chat.

Without a prompt: a chat if standard input is a terminal, else standard input is the prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from pi2rt.cli import _runtime
from pi2rt.cli._streams import write

if TYPE_CHECKING:
    from pi2rt import Chunk, Runtime, SamplingParams
    from pi2rt.cli._prompt import PromptFile


CONTEXT = 4096
"""Tokens, unless the user or a plan says otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _runtime.add_model_argument(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument(
        "-f", "--file", metavar="FILE", help="a file with the prompt; a last newline is dropped"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without the chat template"
    )
    parser.add_argument(
        "--content-control-tokens",
        action="store_true",
        help="let control tokens such as <|im_end|> be control tokens in messages too; without it they are text there",
    )
    parser.add_argument("--json-lines", action="store_true", help="print one JSON object per token")
    parser.add_argument(
        "--context", type=_runtime.positive, metavar="N", help=f"tokens (default: {CONTEXT}, or the plan's)"
    )
    parser.add_argument("--trace", metavar="FILE", help="write a trace that ui.perfetto.dev opens")
    _runtime.add_plan_option(parser)
    _runtime.add_runtime_options(parser)
    _add_sampling_options(parser)


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (default: greedy)")
    group.add_argument("-n", "--max-tokens", type=int, metavar="N", help="default: until the context is full")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy, the default")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K most probable tokens")
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="keep the most probable tokens that reach P together",
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="keep tokens with P of the probability of the top-1 token",
    )
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1 is off")
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="0 is off")
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="0 is off")
    group.add_argument(
        "--logit-bias", type=_bias, action="append", default=[], metavar="ID=X", help="may repeat"
    )
    group.add_argument("--seed", type=int, metavar="N", help="default: a fresh one")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may repeat"
    )
    group.add_argument("--ignore-eos", action="store_true", help="do not end where the model does")
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json-lines: of the N most probable tokens too"
    )


def main(options: argparse.Namespace) -> int:
    from pi2rt._errors import RequestError
    from pi2rt.cli._interrupt import run_until_interrupted
    from pi2rt.cli._prompt import read_prompt
    from pi2rt.engine.sampling_params import SamplingParams

    params = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logit_bias=dict(options.logit_bias),
        seed=options.seed,
        stop=tuple(options.stop),
        ignore_eos=options.ignore_eos,
        logprobs=options.logprobs,
    )
    if options.logprobs is not None and not options.json_lines:
        raise RequestError("--logprobs shows only with --json-lines")
    if options.raw and options.system is not None:
        raise RequestError(
            "--system has no place without the chat template: leave out --raw, or write it into the prompt"
        )
    if options.raw and options.content_control_tokens:
        raise RequestError(
            "--content-control-tokens is about messages; with --raw, control tokens are such in all of the text anyway"
        )
    prompt = read_prompt(options)
    if prompt is None and (options.raw or options.json_lines):
        raise RequestError(
            "a chat takes neither --raw nor --json-lines; give a prompt with -p, -f or standard input"
        )
    try:
        return run_until_interrupted(partial(_run, options, params, prompt))
    finally:
        if prompt is not None and not isinstance(prompt, str):
            prompt.close()


async def _run(options: argparse.Namespace, params: SamplingParams, prompt: str | PromptFile | None) -> int:
    import trio

    from pi2rt._errors import RequestError
    from pi2rt.cli._chat import chat

    async with _runtime.opened(
        options,
        context=options.context or (CONTEXT if options.plan is None else None),
        max_sequences=1 if options.plan is None else None,
        plan=options.plan,
        trace=options.trace,
        content_control_tokens=options.content_control_tokens,
    ) as opened:
        runtime, raw = opened.runtime, options.raw
        if not raw and runtime.tokenizer.chat_template is None:
            if prompt is None or options.system is not None:
                raise RequestError(
                    "the model has no chat template, which chats and system messages need; give a plain one"
                )
            print("pi2rt: the model has no chat template; its text goes on from the prompt", file=sys.stderr)
            raw = True
        if prompt is None:
            return await chat(runtime, params, options.system)
        if not isinstance(prompt, str):
            context, tokenizer = runtime.model.context, runtime.tokenizer
            read = partial(prompt.text, tokenizer, context, params.max_tokens)
            prompt = await trio.to_thread.run_sync(read, abandon_on_cancel=True)
        messages = [{"role": "user", "content": prompt}]
        if options.system is not None:
            messages.insert(0, {"role": "system", "content": options.system})
        last = await _answer(runtime, prompt if raw else messages, params, options.json_lines)
        print(closing_line(last), file=sys.stderr)
    return 0


async def _answer(runtime: Runtime, prompt: Any, params: SamplingParams, json_lines: bool) -> Chunk:
    """Streams one answer to standard output and returns its last chunk."""
    import trio

    try:
        async with runtime.stream(prompt, params) as chunks:
            async for chunk in chunks:
                await write(_json_line(chunk) if json_lines else chunk.text)
                last = chunk
    except trio.Cancelled:
        if not json_lines:
            print(flush=True)
        raise
    if not json_lines:
        await write("\n")
    return last


def closing_line(last: Chunk) -> str:
    """What it took, for the chunk that ended it."""
    from pi2rt.cli._console import duration, size
    from pi2rt.host.memory import peak_rss_bytes

    timing = last.timing
    assert timing is not None
    cached = f" ({timing.cached_tokens} of them cached)" if timing.cached_tokens else ""
    limit = " (the limit)" if last.finish_reason == "length" else ""
    return (
        f"[prompt: {timing.prompt_tokens} tokens{cached}, {timing.prefill_tokens_per_s:.1f} tokens/s; "
        f"generated: {timing.generated_tokens} tokens{limit}, {timing.decode_tokens_per_s:.1f} tokens/s; "
        f"first token: {duration(timing.ttft_s)}; peak memory: {size(peak_rss_bytes())}]"
    )


def _json_line(chunk: Chunk) -> str:
    fields = {name: value for name, value in asdict(chunk).items() if value not in (None, ())}
    if chunk.timing is not None:
        fields["timing"]["prefill_tokens_per_s"] = chunk.timing.prefill_tokens_per_s
        fields["timing"]["decode_tokens_per_s"] = chunk.timing.decode_tokens_per_s
    return json.dumps(fields, ensure_ascii=sys.stdout.encoding.lower() != "utf-8") + "\n"


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=NUMBER") from None
