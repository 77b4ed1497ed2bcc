"""Names for full blocks: a chained hash of a block's tokens and of everything before them.

Two blocks with the same hash hold the same KV values, bit for bit, so one may stand in for the
other. The chain starts at a root that separates what must never be shared: another model, another
numerics class, another ``cache_salt``, another block size or dtype. From there each full block
hashes its predecessor's hash and its own token ids. A worker makes the hashes of a prompt when it
arrives, looks them up in its `BlockPool`, and sends them in the `Header` of a hand-off, where they
vouch for the blocks that the decode worker has already.

Other processes rely on equal results for equal input: the encoding below is part of the protocol.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

from pdserve.core.ids import BlockHash
from pdserve.core.layout import KvLayout

HASH_BYTES = 16
_ROOT = b"pdserve-kv-root"
_BLOCK = b"pdserve-kv-block"


def root_hash(layout: KvLayout, cache_salt: str) -> BlockHash:
    """Hash of the empty prefix: the parent of every first block that may share KV.

    Each field is preceded by its length in bytes (u32), so no two settings encode alike.
    """
    hasher = blake2b(digest_size=HASH_BYTES, person=_ROOT)
    for field in (
        layout.weights_digest,
        layout.numerics,
        cache_salt,
        str(layout.block_size),
        layout.dtype,
    ):
        # A client's salt may hold a lone surrogate, which strict UTF-8 refuses.
        encoded = field.encode("utf-8", "surrogatepass")
        hasher.update(struct.pack("<I", len(encoded)))
        hasher.update(encoded)
    return BlockHash(hasher.digest())


def extend_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of a block with ``token_ids`` whose predecessor (or root) has the hash ``parent``.

    Token ids are written as little-endian u32. An id outside of u32 is a bug of the caller (the
    edge checks ids against the vocabulary) and raises `struct.error`.
    """
    assert len(parent) == HASH_BYTES, f"a parent hash of {len(parent)} bytes"
    packed = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return BlockHash(blake2b(parent + packed, digest_size=HASH_BYTES, person=_BLOCK).digest())


def block_hashes(root: BlockHash, token_ids: Sequence[int], block_size: int) -> list[BlockHash]:
    """Hashes of the full blocks of ``token_ids``, in order; a partial last one has none."""
    hashes = []
    parent = root
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = extend_hash(parent, token_ids[start : start + block_size])
        hashes.append(parent)
    return hashes
