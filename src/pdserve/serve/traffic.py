"""The document of ``/cluster/traffic``: all that a plan needs of a running server.

What was asked of it lately, what its workers are, and what its router has learned of how long their
steps and hand-offs take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pdserve.api.gateway import ModelCard
from pdserve.core.effects import WorkerUp
from pdserve.node.books import ClusterBooks
from pdserve.obs.life import LifeLog
from pdserve.obs.traffic import recent_traffic


def traffic_document(
    card: ModelCard, log: LifeLog, ups: Sequence[WorkerUp], books: ClusterBooks, policy: str
) -> dict[str, Any]:
    """``ups`` of the workers that are up."""
    link = books.learned.link
    return {
        "model": card.name,
        "max_model_tokens": card.max_model_tokens,
        "policy": policy,
        "workers": [_worker(up, books) for up in ups if up.worker in books.workers],
        "link": {
            "fixed_s": link.fixed_s,
            "per_byte_s": link.per_byte_s,
            "error": books.learned.errors()["transfer"],
        },
        "requests": recent_traffic(log),
    }


def _worker(up: WorkerUp, books: ClusterBooks) -> dict[str, Any]:
    book = books.workers[up.worker]
    group, layout = book.learned.group, up.layout
    learned = [
        error
        for error, num in (
            (group.prompt_error, group.num_prompt_samples),
            (group.decode_error, group.num_decode_samples),
        )
        if num
    ]
    return {
        "id": up.worker,
        "role": book.role.value,
        "device": up.device,
        "engine": up.engine,
        "num_layers": 0 if layout is None else layout.num_layers,
        "block_size": 0 if layout is None else layout.block_size,
        "token_kv_bytes": 0 if layout is None else layout.pool_bytes(1) // layout.block_size,
        "num_blocks": up.num_blocks,
        "steps": asdict(group.model()),
        "error": sum(learned) / len(learned) if learned else None,
        "num_steps": group.num_prompt_samples + group.num_decode_samples,
    }
