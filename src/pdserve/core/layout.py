"""Shape of a KV pool, and whether the bytes of one pool mean the same in another."""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"fp32": 4, "bf16": 2}
INT8 = "int8"
"""Dtype of a pool whose numbers are bytes, with one fp32 scale for each token and kv head. How they
lie in a block is the engine's business."""
SCALE_BYTES = 4
KV_DTYPES = ("auto", INT8)
"""What a user can choose for the pool; auto is the model's dtype."""


def pool_dtype(dtype: str, kv_dtype: str) -> str:
    """Dtype of the pool of a model of ``dtype``, ``kv_dtype`` being one of `KV_DTYPES`."""
    return dtype if kv_dtype == "auto" else kv_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """Layout of a pool: ``[layer, block, key/value, head, position in block, head_dim]``.

    Of int8 it is ``[layer, block, key/value, head, run]``: in a run, numbers and then scales.
    A (layer, block) is one contiguous region, and runs of neighbouring blocks of a layer coalesce.
    ``numerics`` is the numerics class that wrote the values; ``weights_digest`` names the model.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    numerics: str
    weights_digest: str

    @property
    def slot_bytes(self) -> int:
        """Bytes of one position's key, or value, of one head, its scale included."""
        if self.dtype == INT8:
            return self.head_dim + SCALE_BYTES
        return self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer, keys and values."""
        return 2 * self.num_kv_heads * self.block_size * self.slot_bytes

    def pool_bytes(self, num_blocks: int) -> int:
        """Bytes of a whole pool."""
        return self.num_layers * num_blocks * self.block_bytes

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def mismatch(self, other: KvLayout) -> str | None:
        """Why blocks of ``other`` cannot be copied here, or None if they can.

        A different numerics class is no obstacle: the values are valid, only not equal bit by bit
        to what this side would have computed.
        """
        if other == self:
            return None
        for name in (
            "num_layers",
            "num_kv_heads",
            "head_dim",
            "block_size",
            "dtype",
            "weights_digest",
        ):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} is {theirs} there and {mine} here"
        return None
