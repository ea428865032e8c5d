"""A mask of tokens: which of them may be sampled next."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

TokenMask: TypeAlias = npt.NDArray[np.uint32]
"""uint32 (ceil(vocab_size / 32),): bit i % 32 of word i // 32, counted from the lowest, allows token i. Bits behind
the vocabulary mean nothing."""


def mask_words(vocab_size: int) -> int:
    """Length of a mask."""
    return -(-vocab_size // 32)


def mask_problem(allowed: object, vocab_size: int) -> str | None:
    """Why something is no mask for that vocabulary; None where it is one."""
    needed = f"uint32 ({mask_words(vocab_size)},)"
    if not isinstance(allowed, np.ndarray):
        return f"{type(allowed).__name__} in place of an array {needed} or None"
    if allowed.dtype != np.uint32 or allowed.shape != (mask_words(vocab_size),):
        return f"an array {allowed.dtype} {allowed.shape} in place of {needed}"
    return None


def allows(allowed: TokenMask, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Whether each token is allowed: bool (vocab_size,)."""
    bits = np.unpackbits(allowed.astype("<u4").view(np.uint8), count=vocab_size, bitorder="little")
    return bits.astype(np.bool_)


def masking(tokens: npt.NDArray[np.bool_]) -> TokenMask:
    """The mask that allows the tokens whose entry in bool (vocab_size,) is true."""
    bits = np.zeros(32 * mask_words(len(tokens)), np.bool_)
    bits[: len(tokens)] = tokens
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
