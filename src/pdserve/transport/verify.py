"""The receiver's side of a transfer: do the bytes that lie here match the writer's digests?"""

from __future__ import annotations

from pdserve.core.effects import VerifyTransfer
from pdserve.kv.runs import coalesce
from pdserve.transport.transfer import PoolView


def verify(pool: PoolView, effect: VerifyTransfer) -> str | None:
    """None if every received block is covered by a digest that matches, else what is wrong.

    The chunks come from a peer and are not trusted: they must lie one behind the other, cover
    ``effect.block_ids`` from the first to the last, and have a digest for each layer.
    """
    num_layers = pool.layout.num_layers
    covered = 0
    for chunk in effect.chunks:
        end = covered + chunk.num_blocks
        where = f"blocks {chunk.first_block} to {chunk.first_block + chunk.num_blocks - 1}"
        if chunk.first_block != effect.first_block + covered or chunk.num_blocks <= 0:
            return f"digests of {where} where block {effect.first_block + covered} is next"
        if end > len(effect.block_ids):
            return f"digests of {where}, of which only {len(effect.block_ids)} were granted"
        if len(chunk.layers) != num_layers:
            return f"{len(chunk.layers)} digests of {where} for {num_layers} layers"
        blocks = effect.block_ids[covered:end]
        runs = coalesce(blocks, blocks)
        for layer, digest in enumerate(chunk.layers):
            if pool.digest(layer, runs) != digest:
                return f"layer {layer} of {where} is not what was sent"
        covered = end
    if covered != len(effect.block_ids):
        return f"digests of {covered} blocks, of {len(effect.block_ids)} that were to come"
    return None
