"""The KV pool as tensors: in the memory that the transport shares, or on a device beside it.

Both have the layout of `KvLayout`: ``[layer, block, key/value, kv head, position, head_dim]``. The
runner writes new tokens with `write`, attention reads `layer`. The engine thread owns a pool; only
`publish` may be called from other threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from threading import Lock

import torch

from pdserve.core.ids import BlockId
from pdserve.core.layout import INT8, KvLayout
from pdserve.engine.torch import kv_int8
from pdserve.engine.torch.numerics import DTYPES


def tensor_over(memory: memoryview, layout: KvLayout, num_blocks: int) -> torch.Tensor:
    """``memory`` seen as a pool ``[layer, block, 2, kv head, position, head_dim]``, not copied.

    One of int8 is ``[layer, block, 2, kv head, bytes of a run]`` (`kv_int8`).

    The tensor keeps the buffer exported: the memory cannot be unmapped before it is gone.
    """
    flat = memory[: layout.pool_bytes(num_blocks)]
    heads = (layout.num_layers, num_blocks, 2, layout.num_kv_heads)
    if layout.dtype == INT8:
        return torch.frombuffer(flat, dtype=torch.int8).view(*heads, -1)
    shape = (*heads, layout.block_size, layout.head_dim)
    return torch.frombuffer(flat, dtype=DTYPES[layout.dtype]).view(shape)


class KvPool(ABC):
    """Blocks that a runner computes on."""

    blocks: torch.Tensor  # as `tensor_over` says
    block_size: int

    @property
    def num_blocks(self) -> int:
        return self.blocks.shape[1]

    def layer(self, layer: int) -> torch.Tensor:
        """``[block, 2, kv head, position in block, head_dim]`` of one layer, or see above."""
        return self.blocks[layer]

    def copy(self, copies: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Copy (source, destination) blocks in all layers, in the order given."""
        for source, destination in copies:
            self.blocks[:, destination] = self.blocks[:, source]

    def write(
        self,
        layer: int,
        block_ids: torch.Tensor,  # [tokens], int64
        offsets: torch.Tensor,  # [tokens], int64: position in block
        keys: torch.Tensor,  # [tokens, kv head, head_dim]
        values: torch.Tensor,  # [tokens, kv head, head_dim]
    ) -> None:
        """Put one token's key and value into each named slot."""
        if self.blocks.dtype == torch.int8:
            kv_int8.write(self.blocks[layer], block_ids, offsets, keys, values)
            return
        slots = self.blocks[layer].permute(0, 3, 1, 2, 4)  # [block, position, 2, kv head, head_dim]
        slots[block_ids, offsets] = torch.stack((keys, values), dim=1).to(slots.dtype)

    def layer_written(self, layer: int) -> None:
        """The step's writes to a layer are issued; `publish` of it must wait for them."""
        del layer

    @abstractmethod
    def publish(self, layer: int, block_ids: Sequence[BlockId]) -> None:
        """Make these blocks of a layer current in the attached memory. Any thread."""

    @abstractmethod
    def absorb(self, block_ids: Sequence[BlockId]) -> None:
        """Take these blocks of all layers from the attached memory."""


class HostPool(KvPool):
    """The attached memory is the pool: what a peer reads or writes is what attention sees."""

    def __init__(self, memory: memoryview, layout: KvLayout, num_blocks: int) -> None:
        self.blocks = tensor_over(memory, layout, num_blocks)
        self.block_size = layout.block_size

    def publish(self, layer: int, block_ids: Sequence[BlockId]) -> None:
        """Nothing to do: the bytes are there when the write returns."""

    def absorb(self, block_ids: Sequence[BlockId]) -> None:
        """Nothing to do: the bytes are already in the pool."""


class DevicePool(KvPool):
    """A pool in device memory; the attached memory is its staging area and landing zone."""

    def __init__(
        self, memory: memoryview, layout: KvLayout, num_blocks: int, device: torch.device
    ) -> None:
        self._staging = tensor_over(memory, layout, num_blocks)
        self.blocks = torch.zeros_like(self._staging, device=device)
        self.block_size = layout.block_size
        self._device = device
        self._lock = Lock()  # one reader at a time on the side stream
        self._reader: torch.cuda.Stream | None = None
        self._written: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._reader = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for _ in range(layout.num_layers):
                self._written.append(torch.cuda.Event())  # type: ignore[no-untyped-call]

    def layer_written(self, layer: int) -> None:
        if self._written:
            self._written[layer].record(torch.cuda.current_stream(self._device))

    def publish(self, layer: int, block_ids: Sequence[BlockId]) -> None:
        """Copies on a stream of its own, so that later layers compute meanwhile."""
        with self._lock, torch.inference_mode():
            index = torch.tensor(block_ids, dtype=torch.int64)
            if self._reader is None:
                copied = self.blocks[layer].index_select(0, index)
            else:
                with torch.cuda.stream(self._reader):
                    self._reader.wait_event(self._written[layer])
                    on_device = index.to(self._device)
                    copied = self.blocks[layer].index_select(0, on_device).to("cpu")
            self._staging[layer].index_copy_(0, index, copied)

    def absorb(self, block_ids: Sequence[BlockId]) -> None:
        with torch.inference_mode():
            index = torch.tensor(block_ids, dtype=torch.int64)
            arrived = self._staging.index_select(1, index).to(self._device)
            self.blocks.index_copy_(1, index.to(self._device), arrived)
            for layer in range(self.blocks.shape[0]):
                self.layer_written(layer)
