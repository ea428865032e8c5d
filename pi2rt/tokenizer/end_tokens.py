"""Tokens that end a turn in well-known chat formats, whatever the file's metadata says about them."""

from __future__ import annotations

from collections.abc import Mapping

END_OF_TURN = (
    "<|im_end|>",  # ChatML: Qwen, SmolLM
    "<|eot_id|>",  # Llama 3
    "<|eom_id|>",
    "<|end|>",  # Phi 3
    "<end_of_turn>",  # Gemma
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
    "</s>",
)


def end_of_turn_ids(control: Mapping[str, int]) -> set[int]:
    """The ids of those that a vocabulary has as control tokens.

    Args:
        control: id by text of the control tokens.
    """
    ids = {control[text] for text in END_OF_TURN if text in control}
    if "<|return|>" in control and "<|call|>" in control:
        ids.discard(control.get("<|end|>", -1))  # Harmony ends messages inside a turn with it
    return ids
