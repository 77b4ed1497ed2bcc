"""Saved fits on disk: the next server knows them, and a broken file costs a log line."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from pdserve.core.effects import Received, Started, WorkerUp
from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.messages import LoadReport
from pdserve.core.request import Role
from pdserve.core.step import StepSample, StepShape, TransferSample
from pdserve.cost.step import StepModel
from pdserve.cost.store import KnownCosts, SavedLink, SavedSteps
from pdserve.node.router import RouterNode
from pdserve.node.settings import RouterSettings
from pdserve.serve.fits import MAX_FITS, FitFiles
from pdserve.serve.recorder import recorder_of
from pdserve.serve.replay import replay_file

WORKER = WorkerId("decode-0")
UP = WorkerUp(
    worker=WORKER,
    epoch=Epoch(1),
    role=Role.DECODE,
    layout=KvLayout(
        num_layers=2,
        num_kv_heads=1,
        head_dim=4,
        block_size=16,
        dtype="fp32",
        numerics="class",
        weights_digest="digest",
    ),
    num_blocks=64,
    max_model_tokens=512,
    pid=1,
    device="cpu",
    engine="torch",
)
REPORT = LoadReport(
    seq=1,
    last_route_seq=0,
    pending_prefill_tokens=0,
    num_waiting=0,
    num_running=0,
    free_blocks=64,
    total_blocks=64,
    cached_blocks=0,
    quarantined_blocks=0,
    open_leases=0,
    num_preemptions=0,
    num_steps=0,
    prefix_queries_tokens=0,
    prefix_hits_tokens=0,
    transfer_bytes=0,
    step_age_s=0.0,
    step_expected_s=0.0,
    draining=False,
    steps=tuple(StepSample(StepShape(0, 0, n, 50 * n), 0.5 + 0.01 * n) for n in range(1, 33)),
    transfers=(TransferSample(WorkerId("decode-1"), 1_000_000, 0.02),),
)


def learned_router(settings: RouterSettings) -> RouterNode:
    router = RouterNode(settings)
    for event in (Started(), UP, Received(WORKER, Epoch(1), REPORT)):
        router.handle(event, 1.0)
    return router


def known(files: FitFiles) -> KnownCosts:
    saved = files.load()
    (link,) = [fit for fit in saved if isinstance(fit, SavedLink)]
    return KnownCosts(
        transport="shm", steps=tuple(f for f in saved if isinstance(f, SavedSteps)), link=link
    )


def steps_of(router: RouterNode) -> StepModel:
    (view,) = router.books.view(1.0, 1).workers
    assert view.steps is not None
    return view.steps


def test_a_restarted_server_knows_what_the_last_one_has_learned(tmp_path: Path) -> None:
    files = FitFiles(tmp_path)
    first = learned_router(RouterSettings(costs=KnownCosts(transport="shm")))
    files.save(first.books.learned.saved())
    second = RouterNode(RouterSettings(costs=known(files)))
    second.handle(UP, 1.0)
    assert steps_of(second).decode_s(4, 200) == pytest.approx(0.54, rel=0.05)
    assert second.books.view(1.0, 1).link == first.books.view(1.0, 1).link
    assert second.books.learned.saved() == first.books.learned.saved()


def test_another_numerics_class_starts_from_its_own_prior(tmp_path: Path) -> None:
    files = FitFiles(tmp_path)
    files.save(learned_router(RouterSettings()).books.learned.saved())
    second = RouterNode(RouterSettings(costs=known(files)))
    assert UP.layout is not None
    second.handle(replace(UP, layout=replace(UP.layout, numerics="other")), 1.0)
    assert steps_of(second).decode_s(4, 200) < 0.3


def test_a_replay_starts_from_the_same_costs(tmp_path: Path) -> None:
    """The recording holds them, whatever has become of the cache."""
    files = FitFiles(tmp_path / "cache")
    files.save(
        learned_router(RouterSettings(costs=KnownCosts(transport="shm"))).books.learned.saved()
    )
    settings = RouterSettings(costs=known(files))
    assert msgspec.json.decode(msgspec.json.encode(settings), type=RouterSettings) == settings
    recorder = recorder_of(str(tmp_path / "rec"), "shortest_queue", router=settings)
    assert recorder is not None
    router = RouterNode(settings)
    for event in (Started(), UP, Received(WORKER, Epoch(1), REPORT)):
        recorder.write_input(event, 1.0)
        recorder.write_effects(router.handle(event, 1.0))
    recorder.close()
    outcome = replay_file(tmp_path / "rec" / "router.rec")
    assert (outcome.num_inputs, outcome.difference) == (3, None)


def test_broken_and_foreign_files_are_ignored_with_a_line_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = FitFiles(tmp_path)
    files.save(learned_router(RouterSettings()).books.learned.saved())
    (tmp_path / "fits" / "broken.json").write_text('{"format": 1, "kind": "steps"')
    (tmp_path / "fits" / "foreign.json").write_bytes(b"\xff\xfe")
    with caplog.at_level(logging.WARNING):
        assert len(files.load()) == 2
    named = [r.getMessage().split(":")[0].rsplit("/", 1)[1] for r in caplog.records]
    assert sorted(named) == ["broken.json", "foreign.json"]


def test_a_cache_that_cannot_be_used_costs_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "fits").write_text("not a folder")
    files = FitFiles(tmp_path)
    assert files.load() == []
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            files.save(learned_router(RouterSettings()).books.learned.saved())
    assert len(caplog.records) == 1


def test_only_the_latest_files_are_read(tmp_path: Path) -> None:
    files = FitFiles(tmp_path)
    (link,) = [
        fit
        for fit in learned_router(RouterSettings()).books.learned.saved()
        if isinstance(fit, SavedLink)
    ]
    files.save(SavedLink(f"transport {number}", link.fit) for number in range(MAX_FITS + 3))
    assert len(files.load()) == MAX_FITS
