"""Random bytes by position: any range of an endless stream at once, whatever was read before."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.uint16]

_LENGTHS = (262139, 262133)  # 16-bit words; without a common factor, so their sum repeats after 137 GB


class Noise:
    """The stream of a name, in words of 16 bits.

    Word ``i`` is ``a[i % len(a)] ^ b[i % len(b)]`` of two tables filled by Philox (Salmon et al., 2011), whose raw
    output is the same in every version of numpy. That is several times faster than a generator, and words are uniform
    and independent in pairs, which is all that weights need.

    Args:
        seed: of the model.
        name: of the stream; streams of different names have nothing in common.
    """

    def __init__(self, seed: int, name: str) -> None:
        self._seed, self._name = seed, name

    def fill(self, start: int, out: Words) -> None:
        """Writes words from ``start`` on to ``out``, uint16 (words,)."""
        a, b = _tables(self._seed, self._name)
        done = 0
        while done < len(out):
            i, j = (start + done) % len(a), (start + done) % len(b)
            count = min(len(out) - done, len(a) - i, len(b) - j)
            np.bitwise_xor(a[i : i + count], b[j : j + count], out=out[done : done + count])
            done += count

    def bytes(self, start: int, count: int) -> npt.NDArray[np.uint8]:
        """``count`` bytes from byte ``start`` on, uint8."""
        first = start // 2
        words = np.empty((start + count + 1) // 2 - first, "<u2")
        self.fill(first, words)
        return words.view(np.uint8)[start - 2 * first :][:count]


@lru_cache(maxsize=8)  # of the tensors that are being read; each takes a megabyte
def _tables(seed: int, name: str) -> tuple[Words, Words]:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    raw = np.random.Philox(key=np.frombuffer(digest, np.uint64)).random_raw(sum(_LENGTHS) // 4 + 1)
    words = np.asarray(raw, np.uint64).astype("<u8").view("<u2")
    return words[: _LENGTHS[0]], words[_LENGTHS[0] : sum(_LENGTHS)]
