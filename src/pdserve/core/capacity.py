"""How many KV blocks a worker's pool has: one rule, for live workers and for simulated ones.

A worker may use a share of the memory that it finds. On a host, where others need memory too, the
pool is a share of what is free when the workers start, and weights come out of the rest. On a
device of its own, weights and the activations of the largest step come out of the share first, and
the pool is what they leave.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRule:
    """``share`` of the memory is used, at most ``limit_bytes`` of it for one worker's pool.
    ``weights_inside``: weights and activations come out of the share."""

    share: float
    limit_bytes: int | None = None
    weights_inside: bool = True


HOST_POOL = PoolRule(share=0.4, limit_bytes=1 << 30, weights_inside=False)
"""Of the memory that is free at start, all pools together take at most this share by default."""
DEVICE_POOL = PoolRule(share=0.92)
"""Of a device that serves one worker. DistServe's pools, weights included, are 0.92 to 0.93 of its
A100s' memory; vLLM's default has long been 0.9."""


def pool_bytes(
    rule: PoolRule,
    memory_bytes: int,
    *,
    num_workers: int = 1,
    weight_bytes: int = 0,
    step_bytes: int = 0,
) -> int:
    """Bytes of one worker's pool; negative if what must lie beside it does not fit.

    ``num_workers`` share the memory alike. ``weight_bytes`` of one worker; ``step_bytes``: its
    activations in the largest step.
    """
    left = int(memory_bytes * rule.share / num_workers)
    if rule.weights_inside:
        left -= weight_bytes + step_bytes
    return left if rule.limit_bytes is None else min(rule.limit_bytes, left)


def pool_blocks(num_bytes: int, block_bytes: int, remedy: str) -> int:
    """Whole blocks in a pool of ``num_bytes``. Raises `ConfigError` if there is not even one."""
    blocks = num_bytes // block_bytes
    if blocks < 1:
        raise ConfigError(
            f"the KV pool of a worker does not hold a single block: a block takes {block_bytes} "
            f"bytes and the pool has {max(0, num_bytes)}; {remedy}"
        )
    return blocks


def longest_request(max_model_tokens: int, num_blocks: int, block_size: int) -> int:
    """Tokens, prompt and answer together, that both the model and a worker's pool hold."""
    return min(max_model_tokens, num_blocks * block_size)
