"""Digests of the bytes that a transfer carries, by the name that stands in its header.

They guard against accidents (a lost fence, a wrong address, a broken copy), not against a peer that
lies: peers prove the cluster secret before they may write at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import xxhash

DIGEST_ALGORITHM = "xxh3_128"
"""What this build writes into headers: 16 bytes, several times faster than the copy it guards."""


class Digest(Protocol):
    def update(self, data: memoryview, /) -> None: ...

    def digest(self) -> bytes: ...


DIGESTS: dict[str, Callable[[], Digest]] = {"xxh3_128": xxhash.xxh3_128}
