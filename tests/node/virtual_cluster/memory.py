"""The KV pool of one worker process, one number per slot and layer."""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.core.ids import BlockId

GARBAGE = 0


class Memory:
    """``layers[layer][block][position]`` is the chain that the KV there stands for."""

    def __init__(self, num_layers: int, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.layers = [
            [[GARBAGE] * block_size for _ in range(num_blocks)] for _ in range(num_layers)
        ]

    def read(self, layer: int, block_ids: Sequence[BlockId], end: int) -> tuple[int, ...]:
        """The first ``end`` slots of a sequence."""
        blocks = self.layers[layer]
        values: list[int] = []
        for block in block_ids[: -(-end // self.block_size)]:
            values += blocks[block]
        return tuple(values[:end])

    def write(
        self, layer: int, block_ids: Sequence[BlockId], start: int, values: Sequence[int]
    ) -> None:
        """Slots ``start``, ``start`` + 1, ... of a sequence."""
        blocks = self.layers[layer]
        for position, value in enumerate(values, start):
            index, offset = divmod(position, self.block_size)
            blocks[block_ids[index]][offset] = value

    def copy(self, source: BlockId, target: BlockId) -> None:
        """One block, all layers."""
        for blocks in self.layers:
            blocks[target] = list(blocks[source])

    def digest(self, layer: int, block_ids: Sequence[BlockId]) -> bytes:
        """What a writer sends of its blocks, and a receiver finds in its own."""
        content = tuple(tuple(self.layers[layer][block]) for block in block_ids)
        return hash(content).to_bytes(8, "little", signed=True)
