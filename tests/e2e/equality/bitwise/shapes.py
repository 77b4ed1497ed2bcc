"""The ways in which a cluster can compute an answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.request import Role, RoutePreference
from pdserve.serve.start import WorkerStart

MAX_MODEL_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """Workers, how they cut prompts, and which route a request takes if it does not say so.

    ``prefill``, ``decode`` and ``mixed`` count workers; bounds are those of `WorkerSettings`.
    """

    name: str
    prefill: int = 0
    decode: int = 0
    mixed: int = 0
    route: RoutePreference = RoutePreference.AUTO
    max_step_tokens: int = 2048
    mixed_chunk_tokens: int = 512
    one_shot_tokens: int = 512
    num_blocks: int = 1024

    @property
    def workers(self) -> tuple[tuple[WorkerId, Role], ...]:
        counts = (
            (Role.PREFILL, self.prefill),
            (Role.DECODE, self.decode),
            (Role.MIXED, self.mixed),
        )
        return tuple(
            (WorkerId(f"{role.value}-{number}"), role)
            for role, count in counts
            for number in range(count)
        )

    @property
    def splits(self) -> bool:
        """True if a request that asks for no other route is handed from one worker to another."""
        return bool(self.prefill and self.decode) or self.route is RoutePreference.SPLIT

    def start(self, model: Path, dtype: str) -> WorkerStart:
        """What all workers of such a cluster have in common; the cluster fills in the rest."""
        return WorkerStart(
            worker=WorkerId(""),
            epoch=Epoch(0),
            role=Role.MIXED,
            secret=b"",
            gateway_address="",
            address="",
            launcher_pid=0,
            model_path=str(model),
            engine="torch",
            device="cpu",
            dtype=dtype,
            numerics="exact",
            threads=1,
            transport="inproc",
            block_size=16,
            num_blocks=self.num_blocks,
            max_model_tokens=MAX_MODEL_TOKENS,
            max_step_tokens=self.max_step_tokens,
            mixed_chunk_tokens=self.mixed_chunk_tokens,
            one_shot_tokens=self.one_shot_tokens,
            record=None,
            log_format="text",
        )
