"""Philox4x32-10, a random number generator without state (Salmon et al., SC 2011, section 3.3).

``philox(counter, key)`` is four random 32-bit words. A token's random number is that of the counter
(index, choice) under the request's seed, so a resumed request draws what the first attempt would
have drawn, on any worker and in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
"""32-bit words, each in a 64-bit integer so that products do not overflow."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10


def philox(counter: Words, key: Words) -> Words:
    """``counter [4, n]`` and ``key [2, n]`` -> ``[4, n]``, all of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = _MULTIPLIERS[0] * c0
        product1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> _HALF) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return np.stack((c0, c1, c2, c3))


def uniforms(
    seeds: Sequence[int], choices: Sequence[int], indexes: Sequence[int]
) -> NDArray[np.float64]:
    """A number in [0, 1) per (seed, choice, index): a multiple of 2**-53. Seeds count mod 2**64."""
    seed = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], dtype=np.uint64)
    index = np.array(indexes, dtype=np.uint64)
    choice = np.array(choices, dtype=np.uint64)
    zero = np.zeros_like(index)
    words = philox(np.stack((index, choice, zero, zero)), np.stack((seed & _MASK, seed >> _HALF)))
    mantissa = (words[0] << np.uint64(21)) | (words[1] >> np.uint64(11))
    numbers: NDArray[np.float64] = mantissa.astype(np.float64) * 2.0**-53
    return numbers
