"""Tokens that end a turn in well-known chat formats, whatever the file's metadata says about them."""

from __future__ import annotations

from collections.abc import Mapping

END_OF_TURN = (
    "<|im_end|>",  # ChatML: Qwen, SmolLM
    "<|eot_id|>",  # Llama 3
    "<|eom_id|>",
    "<|end|>",  # Phi 3
    "<end_of_turn>",  # Gemma
    "<eos>",
    "<turn|>",  # Gemma 4
    "<|tool_response>",
    "<|endoftext|>",
    "<|end_of_text|>",  # Granite
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<end_of_utterance>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
    "<|return|>",  # Harmony
    "<|call|>",
    "<|calls|>",  # Solar
    "<|flush|>",
    "</s>",
)


def end_of_turn_ids(ids: Mapping[str, int]) -> frozenset[int]:
    """The ids of those that a vocabulary has. The spelling decides, as in llama.cpp: files have them as control tokens,
    as user-defined ones and as plain text.

    Args:
        ids: id by text of all tokens.
    """
    found = {text: ids[text] for text in END_OF_TURN if text in ids}
    if found.keys() >= {"<|return|>", "<|call|>"} or found.keys() >= {"<|calls|>", "<|flush|>"}:
        found.pop("<|end|>", None)  # these formats end messages inside a turn with it
    if "<|tool_response>" in found:
        found.pop("</s>", None)  # Gemma 4 has it as text
    return frozenset(found.values())
