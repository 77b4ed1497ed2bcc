"""Fewer, larger copies: neighbouring blocks that go to neighbouring blocks are one region.

A layer's blocks lie one after the other in the pool (see `KvLayout`), so a run of consecutive block
numbers is one contiguous region of bytes. A transfer that writes runs instead of blocks makes a
fraction of the calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.core.ids import BlockId


def coalesce(
    source: Sequence[BlockId], target: Sequence[BlockId]
) -> list[tuple[BlockId, BlockId, int]]:
    """Runs ``(first source, first target, count)`` that copy ``source[i]`` to ``target[i]``.

    Both sides of a run are consecutive and ascending. Runs come in the order of the blocks and none
    can be joined to the next.
    """
    assert len(source) == len(target), f"{len(source)} blocks into {len(target)}"
    runs: list[tuple[BlockId, BlockId, int]] = []
    for here, there in zip(source, target, strict=True):
        if runs:
            first_here, first_there, count = runs[-1]
            if here == first_here + count and there == first_there + count:
                runs[-1] = (first_here, first_there, count + 1)
                continue
        runs.append((here, there, 1))
    return runs
