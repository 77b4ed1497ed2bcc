"""What a virtual cluster is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.request import Role
from pdserve.node.settings import RouterSettings, WorkerSettings
from pdserve.policy.registry import DEFAULT_BATCHING

NUM_LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """``workers`` counts prefill, decode and mixed ones. Durations in seconds.

    ``numerics`` gives the numerics class of each worker in turn; ``fewer_blocks`` makes the pool of
    each worker smaller in turn.
    """

    workers: tuple[int, int, int] = (1, 1, 0)
    num_blocks: int = 20
    block_size: int = 4
    max_model_tokens: int = 64
    max_step_tokens: int = 32
    mixed_chunk_tokens: int = 8
    max_running: int = 8
    policy: str = "shortest_queue"
    batching: str = DEFAULT_BATCHING
    one_shot_tokens: int = 12
    lease_s: float = 1.0
    ticket_timeout_s: float = 1.0
    prefix_cache: bool = True
    numerics: tuple[str, ...] = ("class a",)
    fewer_blocks: tuple[int, ...] = (0,)
    router: RouterSettings = field(default_factory=lambda: RouterSettings(max_attempts=10_000))

    @property
    def slots(self) -> list[tuple[WorkerId, Role]]:
        """Every worker slot with its role."""
        return [
            (WorkerId(f"{role}-{number}"), role)
            for role, count in zip(Role, self.workers, strict=True)
            for number in range(count)
        ]

    @property
    def longest_tokens(self) -> int:
        """Longest prompt and answer that the largest worker can hold."""
        num_blocks = max(self.blocks_of(number) for number in range(sum(self.workers)))
        return min(self.max_model_tokens, num_blocks * self.block_size)

    def blocks_of(self, number: int) -> int:
        """Blocks of the worker with that number among the slots."""
        return self.num_blocks - self.fewer_blocks[number % len(self.fewer_blocks)]

    def settings(self, worker: WorkerId, epoch: Epoch) -> WorkerSettings:
        """Settings of one process."""
        number = [slot for slot, _ in self.slots].index(worker)
        role = dict(self.slots)[worker]
        layout = KvLayout(
            num_layers=NUM_LAYERS,
            num_kv_heads=1,
            head_dim=4,
            block_size=self.block_size,
            dtype="fp32",
            numerics=self.numerics[number % len(self.numerics)],
            weights_digest="w",
        )
        return WorkerSettings(
            worker=worker,
            epoch=epoch,
            role=role,
            layout=layout,
            num_blocks=self.blocks_of(number),
            max_model_tokens=self.max_model_tokens,
            max_step_tokens=self.max_step_tokens,
            mixed_chunk_tokens=self.mixed_chunk_tokens,
            max_running=self.max_running,
            one_shot_tokens=self.one_shot_tokens,
            lease_s=self.lease_s,
            ticket_timeout_s=self.ticket_timeout_s,
            prefix_cache=self.prefix_cache,
        )
