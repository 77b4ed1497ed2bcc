"""Draws that anybody can repeat: chance without a source of randomness."""

from __future__ import annotations

from hashlib import blake2b


def draw(number: int, purpose: str, size: int) -> int:
    """One of 0 to ``size`` - 1, all equally likely over the numbers; each purpose draws anew."""
    digest = blake2b(b"%d %s" % (number, purpose.encode()), digest_size=8).digest()
    return int.from_bytes(digest, "big") % size
