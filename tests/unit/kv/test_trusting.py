"""The trusting pool gives the blocks that a `BlockPool` without prefix cache gives."""

from __future__ import annotations

import random

import pytest

from pdserve.core.errors import OutOfBlocksError
from pdserve.kv.pool import BlockPool
from pdserve.kv.trusting import TrustingPool


@pytest.mark.parametrize("seed", range(20))
def test_same_calls_same_blocks(seed):
    rng = random.Random(seed)
    pools = BlockPool(60, 4, prefix_cache=False), TrustingPool(60, 4)
    held, promised = [], []
    for _ in range(300):
        kind = rng.choice(("allocate", "allocate", "release", "share", "promise", "break"))
        if kind == "allocate":
            number = rng.randint(0, 20)
            if number > pools[0].num_free:
                for pool in pools:
                    with pytest.raises(OutOfBlocksError, match="can be had"):
                        pool.allocate(number)
            else:
                first, second = (pool.allocate(number) for pool in pools)
                assert first == second
                held.append(first)
        elif kind == "release" and held:
            blocks = held.pop(rng.randrange(len(held)))
            for pool in pools:
                pool.release(blocks)
        elif kind == "share" and held:
            blocks = rng.choice(held)
            for pool in pools:
                pool.acquire(blocks)
            held.append(blocks)
        elif kind == "promise" and pools[0].num_free > 5:
            blocks, _ = (pool.allocate(5) for pool in pools)
            for pool in pools:
                pool.quarantine(blocks)
            promised.append(blocks)
        elif kind == "break" and promised:
            blocks = promised.pop()
            for pool in pools:
                pool.release_quarantine(blocks)
        counting, trusting = pools
        assert counting.num_free == trusting.num_free
        assert counting.num_referenced == trusting.num_referenced
        assert counting.num_quarantined == trusting.num_quarantined
        assert counting.num_releases == trusting.num_releases
        for blocks in held:
            assert counting.num_sole(blocks) == trusting.num_sole(blocks)
            assert counting.num_shared(blocks) == trusting.num_shared(blocks)
            assert [counting.ref_count(b) for b in blocks] == [
                trusting.ref_count(b) for b in blocks
            ]
        for pool in pools:
            pool.check()
