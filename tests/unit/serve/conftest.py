"""Clusters within the test's own process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.api.gateway import ModelCard
from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.request import Role
from pdserve.node.settings import RouterSettings
from pdserve.serve.inproc import InprocCluster
from pdserve.serve.start import WorkerStart

NUM_BLOCKS = 96


@pytest.fixture(scope="session")
def start_template(tiny_model_path: Path) -> WorkerStart:
    """All of a small worker that does not depend on which one it is."""
    return WorkerStart(
        worker=WorkerId(""),
        epoch=Epoch(0),
        role=Role.MIXED,
        secret=b"",
        gateway_address="",
        address="",
        launcher_pid=0,
        model_path=str(tiny_model_path),
        engine="torch",
        device="cpu",
        dtype="fp32",
        numerics="exact",
        threads=1,
        transport="inproc",
        block_size=16,
        num_blocks=NUM_BLOCKS,
        max_model_tokens=1024,
        max_step_tokens=2048,
        record=None,
        log_format="text",
    )


@pytest.fixture(scope="session")
def make_cluster(
    tiny_model_path: Path, start_template: WorkerStart
) -> Callable[..., InprocCluster]:
    """``make_cluster(workers, engine=..., model=..., record=..., router=..., policy=...)``, not
    entered yet. It splits what can be split, whatever that is predicted to cost."""

    def make(
        workers: Sequence[tuple[WorkerId, Role]],
        *,
        engine: str = "torch",
        model: Path = tiny_model_path,
        record: Path | None = None,
        router: RouterSettings | None = None,
        policy: str = "shortest_queue",
    ) -> InprocCluster:
        template = replace(start_template, model_path=str(model), engine=engine)
        card = ModelCard(
            name="tiny", max_model_tokens=1024, vocab_size=384, eos_token_ids=(2,), created=0
        )
        folder = None if record is None else str(record)
        return InprocCluster(card, workers, template, record=folder, router=router, policy=policy)

    return make
