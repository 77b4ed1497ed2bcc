"""What a worker's batch policy is shown: the queues and the pool, lazily."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from pdserve.core.request import Role
from pdserve.node.queues import Queues
from pdserve.node.sequence import Sequence
from pdserve.node.settings import WorkerSettings
from pdserve.node.tables import BlockTables
from pdserve.node.turns import in_turn
from pdserve.policy.batch import BatchPolicy, BatchView, DecodeView, PromptView


class Lookout:
    """Makes the views of one worker's batch machine. ``memory``: what its policy wants to be
    reminded of."""

    def __init__(
        self, settings: WorkerSettings, policy: BatchPolicy, queues: Queues, tables: BlockTables
    ) -> None:
        self.memory: object = None
        self._settings = settings
        self._policy = policy
        self._queues = queues
        self._tables = tables

    def view(self, role: Role, free_blocks: int) -> BatchView:
        """As things are now. ``free_blocks``: those that can be given away."""
        queues, settings = self._queues, self._settings
        is_mixed = role is Role.MIXED
        new_first = self._policy.new_first and is_mixed
        turns = in_turn(queues.waiting, queues.resuming, settings, new_first=new_first)
        return BatchView(
            num_decoding=min(len(queues.decoding), settings.max_running),
            prompts=map(self._prompt_view, chain(list(queues.admitted.values()), turns)),
            num_admitted=len(queues.admitted),
            free_blocks=free_blocks,
            block_size=settings.layout.block_size,
            max_step_tokens=settings.max_step_tokens,
            mixed_chunk_tokens=settings.mixed_chunk_tokens,
            max_running=settings.max_running,
            preemptible=self._preemptible() if is_mixed else (),
            waiting=queues.waiting,
            decodes=queues.decoding,
            unused_blocks=self._tables.pool.num_free,
            num_arrivals=queues.num_arrivals,
            num_departures=queues.num_departures,
            departed_at=queues.departed_at,
            memory=self.memory,
        )

    def _prompt_view(self, sequence: Sequence) -> PromptView:
        key = sequence.key
        waits = key not in self._queues.admitted
        return PromptView(
            key=key,
            num_computed=sequence.num_computed,
            num_tokens=sequence.num_tokens,
            blocks_missing=self._tables.missing_blocks(sequence) if waits else 0,
            is_new=key in self._queues.waiting,
        )

    def _preemptible(self) -> Iterator[DecodeView]:
        for sequence in sorted(self._queues.decoding.values(), key=lambda s: -s.arrival):
            if not sequence.reserved_tokens:
                yield DecodeView(key=sequence.key, blocks_freed=self._tables.freed_by(sequence))
