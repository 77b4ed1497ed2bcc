"""The nameless pool has as many blocks, at any time, as a `BlockPool` without prefix cache."""

from __future__ import annotations

import random

import pytest

from pdserve.core.errors import OutOfBlocksError
from pdserve.kv.nameless import NamelessPool
from pdserve.kv.pool import BlockPool

COUNTS = ("num_free", "num_referenced", "num_quarantined", "num_cached", "num_releases")


@pytest.mark.parametrize("seed", range(20))
def test_same_calls_same_counts(seed):
    rng = random.Random(seed)
    pools = BlockPool(60, 4, prefix_cache=False), NamelessPool(60, 4)
    held, promised = [], []
    for _ in range(300):
        kind = rng.choice(("allocate", "allocate", "release", "promise", "break"))
        number = rng.randint(0, 20)
        if kind == "allocate" and number > pools[0].num_free:
            for pool in pools:
                with pytest.raises(OutOfBlocksError, match="can be had"):
                    pool.allocate(number)
        elif kind == "allocate":
            held.append([pool.allocate(number) for pool in pools])
        elif kind == "release" and held:
            both = held.pop(rng.randrange(len(held)))
            for pool, blocks in zip(pools, both, strict=True):
                pool.release(blocks)
        elif kind == "promise" and held:
            both = held.pop()
            for pool, blocks in zip(pools, both, strict=True):
                pool.quarantine(blocks)
            promised.append(both)
        elif kind == "break" and promised:
            for pool, blocks in zip(pools, promised.pop(), strict=True):
                pool.release_quarantine(blocks)
        named, nameless = pools
        for count in COUNTS:
            assert getattr(named, count) == getattr(nameless, count), count
        for first, second in held:
            assert len(first) == len(second)
            assert named.num_sole(first) == nameless.num_sole(second)
            assert named.num_shared(first) == nameless.num_shared(second)
        for pool in pools:
            pool.check()
    assert pools[1].match([]) == []
