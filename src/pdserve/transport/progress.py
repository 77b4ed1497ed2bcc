"""What a writer says while it still writes: these layers of these blocks have arrived.

It is a frame of the link, not of the machines, and it is a hint: the receiver may hash what is
there while the rest is computed, so that little is left to check when the trailer comes. Nothing
depends on it. What was not announced is hashed after the trailer, and what was is compared with the
trailer's digests all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.ids import AttemptId


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersWritten:
    """``num_layers`` layers from ``first_layer`` on are written, of ``num_blocks`` blocks of the
    sequence from ``first_block`` on. The blocks are a chunk of the trailer that will come."""

    attempt: AttemptId
    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int
