"""Pools: shared memory is computed in directly, a device copies; plans stay in their tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pdserve.core.ids import BlockId
from pdserve.core.layout import KvLayout
from pdserve.engine.torch.pool import DevicePool, HostPool, tensor_over

LAYOUT = KvLayout(
    num_layers=3,
    num_kv_heads=2,
    head_dim=4,
    block_size=8,
    dtype="bf16",
    numerics="n",
    weights_digest="w",
)
NUM_BLOCKS = 5


def blocks(*ids: int) -> list[BlockId]:
    return [BlockId(i) for i in ids]


def memory() -> memoryview:
    """A pool of memory, and a bit more, as a page-aligned mapping has it."""
    return memoryview(bytearray(LAYOUT.pool_bytes(NUM_BLOCKS) + 100))


def test_a_slot_lies_where_the_layout_says() -> None:
    shared = memory()
    pool = HostPool(shared, LAYOUT, NUM_BLOCKS)
    keys = torch.arange(2 * 4, dtype=torch.bfloat16).view(1, 2, 4)
    pool.write(2, torch.tensor([3]), torch.tensor([5]), keys, keys + 100)
    flat = torch.frombuffer(shared, dtype=torch.bfloat16)
    block_start = (2 * NUM_BLOCKS + 3) * LAYOUT.block_bytes // 2
    for kind, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        start = block_start + ((kind * 2 + head) * 8 + 5) * 4
        assert flat[start : start + 4].tolist() == (keys[0, head] + 100 * kind).tolist()
    assert int(flat.count_nonzero()) == 15  # one of the sixteen values is 0


def test_copies_are_done_in_order_in_all_layers() -> None:
    pool = HostPool(memory(), LAYOUT, NUM_BLOCKS)
    for block in range(NUM_BLOCKS):
        pool.blocks[:, block] = block + 1
    pool.copy([(BlockId(0), BlockId(1)), (BlockId(1), BlockId(2))])
    assert [int(pool.blocks[layer, 2].unique()) for layer in range(3)] == [1, 1, 1]
    assert int(pool.blocks[0, 3].unique()) == 4


def test_a_device_pool_moves_only_what_it_is_told() -> None:
    """The logic of a device's pool, on the one device that every machine has."""
    shared = memory()
    staging = tensor_over(shared, LAYOUT, NUM_BLOCKS)
    pool = DevicePool(shared, LAYOUT, NUM_BLOCKS, torch.device("cpu"))
    staging.fill_(7)
    assert int(pool.blocks.count_nonzero()) == 0
    pool.absorb(blocks(1, 4))
    assert [int(pool.blocks[:, i].float().mean()) for i in range(5)] == [0, 7, 0, 0, 7]
    pool.blocks.fill_(9)
    pool.publish(2, blocks(0, 4))
    assert [int(staging[2, i].float().mean()) for i in range(5)] == [9, 7, 7, 7, 9]
    assert int(staging[:2].float().mean()) == 7


def test_closing_lets_go_of_the_memory(
    make_bench: Callable[..., Any], row: Callable[..., Any]
) -> None:
    """A mapping can only be unmapped, and a bytearray only resized, once nothing points into it."""
    bench = make_bench("fp32", "fast", num_layers=1)
    shared = bench.fresh_pool()
    bench.logits([row([1, 2, 3], 0, [4])])
    with pytest.raises(BufferError):
        shared.append(0)
    bench.runner.close()
    shared.append(0)


@pytest.mark.parametrize(
    ("token_ids", "start", "table"),
    [
        ([384], 0, [0]),
        ([-1], 0, [0]),
        ([1], 16, [0]),
        ([1] * 17, 0, [0]),
        ([1], 0, [64]),
        ([1], 0, [-1]),
    ],
)
def test_nothing_is_read_outside_a_table(
    token_ids: list[int],
    start: int,
    table: list[int],
    make_bench: Callable[..., Any],
    row: Callable[..., Any],
) -> None:
    bench = make_bench()
    expected = bench.logits_of([1, 2, 3])
    with pytest.raises(IndexError):
        bench.logits([row(token_ids, start, table)])
    with pytest.raises(IndexError):
        bench.logits([], copies=[(0, 64)])
    assert torch.equal(bench.logits_of([1, 2, 3]), expected)


def test_no_position_beyond_the_model_s_last(
    make_bench: Callable[..., Any], row: Callable[..., Any]
) -> None:
    bench = make_bench(max_model_tokens=40)
    bench.logits([row([1] * 40, 0, range(3))])
    with pytest.raises(IndexError, match="ends at 41"):
        bench.logits([row([1], 40, range(3))])
