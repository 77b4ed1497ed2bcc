"""The rule for the number of KV blocks: conservation, and what the two kinds of memory mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.capacity import (
    DEVICE_POOL,
    HOST_POOL,
    PoolRule,
    longest_request,
    pool_blocks,
    pool_bytes,
)
from pdserve.core.errors import ConfigError

sizes = st.integers(1, 1 << 45)


@given(sizes, st.integers(1, 64), sizes, sizes, sizes)
def test_pools_weights_and_steps_stay_within_the_share(
    memory: int, workers: int, weights: int, step: int, block: int
) -> None:
    for rule in (HOST_POOL, DEVICE_POOL, PoolRule(share=1.0, limit_bytes=1 << 30)):
        inside = weights + step if rule.weights_inside else 0
        each = pool_bytes(rule, memory, num_workers=workers, weight_bytes=weights, step_bytes=step)
        assert (each + inside) * workers <= rule.share * memory * (1 + 1e-12)
        if rule.limit_bytes is not None:
            assert each <= rule.limit_bytes
        if each < block:
            with pytest.raises(ConfigError, match=f"a block takes {block} bytes.*; buy"):
                pool_blocks(each, block, "buy memory")
        else:
            blocks = pool_blocks(each, block, "buy memory")
            assert blocks * block <= each < (blocks + 1) * block


def test_a_host_keeps_most_of_its_memory_for_others() -> None:
    assert pool_bytes(HOST_POOL, 1 << 30, num_workers=2, weight_bytes=1 << 29) == int(0.2 * 2**30)
    assert pool_bytes(HOST_POOL, 1 << 40) == 1 << 30


def test_a_device_is_used_up() -> None:
    assert pool_bytes(DEVICE_POOL, 100, weight_bytes=50, step_bytes=10) == 32
    assert pool_bytes(DEVICE_POOL, 100, weight_bytes=95) < 0


def test_the_longest_request_fits_model_and_pool() -> None:
    assert longest_request(4096, 10, 16) == 160
    assert longest_request(100, 10, 16) == 100
