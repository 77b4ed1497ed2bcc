"""What a push writes, and when: one event order at a time. `test_push_races` mixes the threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pdserve.core.effects import (
    TransferFailed,
    TransferSent,
    TransferStopped,
)
from pdserve.core.ids import StepId
from pdserve.transport import transfer
from pdserve.transport.digest import DIGEST_ALGORITHM, DIGESTS
from pdserve.transport.fake import FakeTransport, Faults
from pdserve.transport.inproc import InprocHub, InprocTransport
from pdserve.transport.progress import LayersWritten

HERE = (5, 6, 9, 2)
THERE = (30, 31, 32, 7)
ALL_LAYERS = [0, 1, 2]


def sent(scene: Any) -> TransferSent:
    (event,) = scene.drain()
    assert isinstance(event, TransferSent)
    return event


def written(scene: Any, first_block: int, num_blocks: int, *layers: int) -> LayersWritten:
    """News of ``layers``: the first one, and how many."""
    return LayersWritten(
        attempt=scene.attempt(),
        first_block=first_block,
        num_blocks=num_blocks,
        first_layer=layers[0],
        num_layers=layers[1],
    )


def spans(event: TransferSent) -> list[tuple[int, int]]:
    return [(chunk.first_block, chunk.num_blocks) for chunk in event.chunks]


# --- when layers go ---------------------------------------------------------------------------


def test_each_layer_goes_as_it_finishes(scene: Any) -> None:
    scene.open(HERE)
    scene.bind(0, THERE)
    plan = scene.plan(scene.row(HERE, 0, 14, last=True))
    scene.pusher.begin_step(plan)
    for layer in ALL_LAYERS[:-1]:
        scene.compute(plan, layer)
        assert scene.drain() == []
        assert scene.arrived(HERE, THERE) == ALL_LAYERS[: layer + 1]
    scene.compute(plan, ALL_LAYERS[-1])
    event = sent(scene)
    scene.pusher.end_step(plan.step_id, True)
    assert scene.drain() == []
    assert scene.arrived(HERE, THERE) == ALL_LAYERS
    assert spans(event) == [(0, 4)]
    assert event.num_bytes == scene.num_bytes_there() == 3 * 4 * scene.layout.block_bytes


def test_neighbouring_blocks_go_in_one_region(scene: Any) -> None:
    scene.open(HERE)
    scene.bind(0, THERE)
    scene.step(scene.row(HERE, 0, 16, last=True))
    sent(scene)
    lengths = [[region.length for region in regions] for regions in scene.writes()]
    assert lengths == [[2 * 64, 64, 64]] * 3


def test_a_bind_in_mid_step_catches_up(scene: Any) -> None:
    scene.open(HERE)
    plan = scene.plan(scene.row(HERE, 0, 16, last=True))
    scene.pusher.begin_step(plan)
    scene.compute(plan, 0)
    scene.compute(plan, 1)
    scene.drain()
    assert scene.writes() == []
    scene.bind(0, THERE)
    scene.drain()
    assert scene.arrived(HERE, THERE) == [0, 1]
    scene.compute(plan, 2)
    scene.pusher.end_step(plan.step_id, True)
    assert spans(sent(scene)) == [(0, 4)]
    assert scene.arrived(HERE, THERE) == ALL_LAYERS


def test_a_bind_after_the_last_step_sends_everything_at_once(scene: Any) -> None:
    scene.open(HERE)
    scene.step(scene.row(HERE, 0, 8, last=False))
    scene.step(scene.row(HERE, 8, 15, last=True))
    assert scene.drain() == []
    scene.bind(0, THERE)
    assert spans(sent(scene)) == [(0, 2), (2, 2)]
    assert scene.arrived(HERE, THERE) == ALL_LAYERS


def test_only_the_first_bind_counts(scene: Any) -> None:
    scene.open(HERE)
    scene.bind(0, THERE)
    scene.bind(2, (1, 3))
    scene.step(scene.row(HERE, 0, 16, last=True))
    assert spans(sent(scene)) == [(0, 4)]
    assert scene.arrived(HERE, THERE) == ALL_LAYERS


def test_one_shot_sends_nothing_before_the_last_layer(scene: Any) -> None:
    scene.open(HERE, 1, one_shot=True)
    for layer in ALL_LAYERS:
        scene.fill(layer, HERE[:1])
    scene.bind(0, THERE)
    scene.step(scene.row(HERE, 4, 8, last=False))
    plan = scene.plan(scene.row(HERE, 8, 16, last=True))
    scene.pusher.begin_step(plan)
    scene.compute(plan, 0)
    scene.compute(plan, 1)
    scene.drain()
    assert scene.writes() == []
    scene.compute(plan, 2)
    assert spans(sent(scene)) == [(0, 1), (1, 1), (2, 2)]
    assert scene.arrived(HERE, THERE) == ALL_LAYERS
    scene.pusher.end_step(plan.step_id, True)
    assert scene.drain() == []


def test_a_step_that_breaks_before_its_last_layer_sends_nothing(scene: Any) -> None:
    scene.open(HERE)
    scene.bind(0, THERE)
    plan = scene.plan(scene.row(HERE, 0, 16, last=True))
    scene.pusher.begin_step(plan)
    for layer in ALL_LAYERS[:-1]:
        scene.compute(plan, layer)
    scene.pusher.end_step(plan.step_id, False)
    assert scene.drain() == []


def test_a_step_that_breaks_while_it_draws_tokens_can_still_be_stopped(scene: Any) -> None:
    scene.open(HERE)
    scene.bind(0, THERE)
    plan = scene.plan(scene.row(HERE, 0, 16, last=True))
    scene.pusher.begin_step(plan)
    for layer in ALL_LAYERS:
        scene.compute(plan, layer)
    sent(scene)
    scene.pusher.end_step(plan.step_id, False)
    scene.pusher.stop(scene.attempt())
    assert scene.drain() == [TransferStopped(scene.attempt())]


# --- what the receiver is told ----------------------------------------------------------------


def test_small_layers_are_announced_together_once_all_are_written(scene: Any) -> None:
    scene.open(HERE)
    scene.bind(1, THERE[1:])
    scene.step(scene.row(HERE, 0, 8, last=False))
    scene.step(scene.row(HERE, 8, 14, last=True))
    sent(scene)
    news = [event for event in scene.log if isinstance(event, LayersWritten)]
    assert news == [written(scene, 1, 1, 0, 3), written(scene, 2, 2, 0, 3)]
    kinds = [type(event) for event in scene.log[-2:]]
    assert kinds == [LayersWritten, TransferSent], "news come before the end"


def test_each_layer_is_announced_when_it_is_large_enough(
    scene: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "ANNOUNCED_BYTES", 3 * scene.layout.block_bytes)
    scene.open(HERE)
    plan = scene.plan(scene.row(HERE, 0, 14, last=True))
    scene.pusher.begin_step(plan)
    scene.compute(plan, 0)
    scene.compute(plan, 1)
    scene.bind(0, THERE)
    scene.compute(plan, 2)
    sent(scene)
    layers = [(e.first_layer, e.num_layers) for e in scene.log if isinstance(e, LayersWritten)]
    assert layers == [(0, 1), (1, 1), (2, 1)]
    kinds = [type(event) for event in scene.log]
    assert kinds == [tuple, LayersWritten] * 3 + [TransferSent]


def test_a_runner_that_tells_no_layers_is_served_at_the_step_end(scene: Any) -> None:
    scene.open(HERE)
    scene.bind(0, THERE)
    for layer in ALL_LAYERS:
        scene.fill(layer, HERE)
    plan = scene.plan(scene.row(HERE, 0, 16, last=True))
    scene.pusher.begin_step(plan)
    scene.pusher.end_step(plan.step_id, True)
    assert spans(sent(scene)) == [(0, 4)]
    assert scene.arrived(HERE, THERE) == ALL_LAYERS


def test_the_device_is_asked_for_each_block_once(scene: Any) -> None:
    scene.open(HERE)
    scene.bind(1, THERE[1:])
    scene.step(scene.row(HERE, 0, 8, last=False))
    scene.step(scene.row(HERE, 8, 16, last=True))
    sent(scene)
    assert scene.runner.read == [(layer, (6,)) for layer in ALL_LAYERS] + [
        (layer, (9, 2)) for layer in ALL_LAYERS
    ]


# --- which blocks go --------------------------------------------------------------------------


def test_prefix_hits_of_the_sender_are_a_chunk_of_their_own(scene: Any) -> None:
    for layer in ALL_LAYERS:
        scene.fill(layer, HERE[:2])
    scene.open(HERE, 2)
    scene.bind(0, THERE)
    scene.drain()
    assert scene.arrived(HERE[:2], THERE[:2]) == ALL_LAYERS
    scene.step(scene.row(HERE, 8, 16, last=True))
    assert spans(sent(scene)) == [(0, 2), (2, 2)]
    assert scene.arrived(HERE, THERE) == ALL_LAYERS


@pytest.mark.parametrize("bind_first", [True, False])
@pytest.mark.parametrize(
    ("first_block", "chunks"),
    [
        (0, [(0, 1), (1, 2), (3, 1)]),
        (1, [(1, 2), (3, 1)]),
        (2, [(2, 1), (3, 1)]),
        (3, [(3, 1)]),
        (4, []),
    ],
)
def test_blocks_that_the_receiver_has_are_not_sent(
    scene: Any, first_block: int, chunks: list[tuple[int, int]], bind_first: bool
) -> None:
    for layer in ALL_LAYERS:
        scene.fill(layer, HERE[:1])
    scene.open(HERE, 1)
    if bind_first:
        scene.bind(first_block, THERE[first_block:])
    scene.step(scene.row(HERE, 4, 12, last=False))
    scene.step(scene.row(HERE, 12, 13, last=True))
    if not bind_first:
        assert scene.drain() == []
        scene.bind(first_block, THERE[first_block:])
    event = sent(scene)
    assert spans(event) == chunks
    assert event.num_bytes == scene.num_bytes_there()
    assert scene.arrived(HERE[first_block:], THERE[first_block:]) == ALL_LAYERS


def test_a_last_row_that_completes_no_new_block_ends_the_transfer(scene: Any) -> None:
    for layer in ALL_LAYERS:
        scene.fill(layer, HERE)
    scene.open(HERE, 4, one_shot=True)
    scene.bind(0, THERE)
    scene.step(scene.row(HERE, 15, 16, last=True))
    assert spans(sent(scene)) == [(0, 4)]
    assert scene.arrived(HERE, THERE) == ALL_LAYERS


def test_a_block_begun_in_one_chunk_goes_with_the_next(scene: Any) -> None:
    scene.open(HERE)
    scene.bind(0, THERE)
    scene.step(scene.row(HERE, 0, 6, last=False))
    scene.step(scene.row(HERE, 6, 16, last=True))
    assert spans(sent(scene)) == [(0, 1), (1, 3)]


def test_transfers_in_one_step_do_not_mix(scene: Any) -> None:
    scene.open((0, 1), name="a")
    scene.open((2, 3), name="b")
    scene.bind(0, (10, 11), name="a")
    rows = [scene.row((0, 1), 0, 8, last=True, name="a")]
    rows += [scene.row((2, 3), 0, 7, last=True, name="b")]
    scene.step(*rows)
    (event,) = scene.drain()
    assert event.attempt == scene.attempt("a")
    scene.bind(0, (20, 21), name="b")
    (event,) = scene.drain()
    assert event.attempt == scene.attempt("b")
    assert scene.arrived((0, 1, 2, 3), (10, 11, 20, 21)) == ALL_LAYERS


def test_rows_that_are_not_pushed_are_none_of_its_business(scene: Any) -> None:
    scene.open(HERE)
    scene.bind(0, THERE)
    scene.step(replace(scene.row(HERE, 0, 16, last=True), pushes=False))
    assert scene.drain() == []
    scene.pusher.layer_done(StepId(99), 2)
    scene.pusher.end_step(StepId(99), True)
    assert scene.drain() == []


def test_digests_are_over_the_bytes_sent_in_block_order(scene: Any) -> None:
    scene.open(HERE)
    scene.bind(0, THERE)
    scene.step(scene.row(HERE, 0, 16, last=True))
    (chunk,) = sent(scene).chunks
    for layer in ALL_LAYERS:
        digest = DIGESTS[DIGEST_ALGORITHM]()
        for block in THERE:
            digest.update(memoryview(scene.block_there(layer, block)))
        assert chunk.layers[layer] == digest.digest()
        assert len(chunk.layers[layer]) == 16


# --- ends that are not the good one -----------------------------------------------------------


def test_a_stop_ends_it_and_an_unknown_one_is_answered_too(scene: Any) -> None:
    scene.open(HERE)
    scene.bind(0, THERE)
    plan = scene.plan(scene.row(HERE, 0, 16, last=True))
    scene.pusher.begin_step(plan)
    scene.compute(plan, 0)
    scene.drain()
    scene.pusher.stop(scene.attempt())
    scene.compute(plan, 1)
    scene.compute(plan, 2)
    scene.pusher.end_step(plan.step_id, True)
    scene.bind(0, THERE)
    assert scene.drain() == [TransferStopped(scene.attempt())]
    assert scene.arrived(HERE, THERE) == [0]
    scene.pusher.stop(scene.attempt("never heard of"))
    assert scene.drain() == [TransferStopped(scene.attempt("never heard of"))]


def faulty_scene(make_scene: Callable[..., Any], faults: Faults) -> Any:
    hub = InprocHub()
    return make_scene(FakeTransport(InprocTransport(hub), faults), InprocTransport(hub))


def test_a_stop_is_answered_after_the_write_that_was_under_way(
    make_scene: Callable[..., Any],
) -> None:
    faults = Faults()
    scene = faulty_scene(make_scene, faults)
    scene.open(HERE)
    scene.step(scene.row(HERE, 0, 16, last=True))
    faults.hold_writes()
    scene.bind(0, THERE)
    assert faults.wait_until_held(scene.timeout_s)
    scene.pusher.stop(scene.attempt())
    assert scene.log == []
    faults.release_writes()
    assert scene.drain() == [TransferStopped(scene.attempt())]
    assert len(scene.writes()) == 1
    assert scene.log[0] == scene.writes()[0], "the write comes before the word that it has stopped"
    scene.close()


def test_a_failing_write_is_told_once_and_ends_the_transfer(
    make_scene: Callable[..., Any],
) -> None:
    faults = Faults()
    faults.fail_write(1, "the cable is cut")
    scene = faulty_scene(make_scene, faults)
    scene.open(HERE)
    scene.bind(0, THERE)
    scene.step(scene.row(HERE, 0, 8, last=False))
    scene.step(scene.row(HERE, 8, 16, last=True))
    (event,) = scene.drain()
    assert event == TransferFailed(
        attempt=scene.attempt(), detail="TransferError: the cable is cut"
    )
    assert faults.num_writes == 2
    scene.close()


def test_a_device_that_cannot_be_read_fails_the_transfer(scene: Any) -> None:
    scene.runner.error = RuntimeError("illegal memory access")
    scene.open(HERE)
    scene.bind(0, THERE)
    scene.step(scene.row(HERE, 0, 16, last=True))
    (event,) = scene.drain()
    assert event.detail == "RuntimeError: illegal memory access"
    assert scene.writes() == []


@pytest.mark.parametrize(
    ("blocks", "what"),
    [
        (THERE[:3], "too few for block 3"),
        ((30, 31, 32, 56), "outside a pool of 56"),
        ((30, 31, 32, -1), "outside a pool of 56"),
    ],
)
def test_a_ticket_that_does_not_fit_fails_the_transfer(
    scene: Any, blocks: tuple[int, ...], what: str
) -> None:
    scene.open(HERE)
    scene.bind(0, blocks)
    scene.step(scene.row(HERE, 0, 16, last=True))
    (event,) = scene.drain()
    assert isinstance(event, TransferFailed)
    assert what in event.detail
    assert scene.num_bytes_there() == 0


def test_nothing_is_written_for_a_step_that_failed(scene: Any) -> None:
    scene.open(HERE)
    plan = scene.plan(scene.row(HERE, 0, 16, last=True))
    scene.pusher.begin_step(plan)
    scene.compute(plan, 0)
    scene.pusher.end_step(plan.step_id, False)
    scene.bind(0, THERE)
    assert scene.drain() == []
    assert scene.writes() == []
    scene.pusher.stop(scene.attempt())
    assert scene.drain() == [TransferStopped(scene.attempt())]


def test_a_closed_pusher_neither_writes_nor_posts(make_scene: Callable[..., Any]) -> None:
    faults = Faults()
    scene = faulty_scene(make_scene, faults)
    scene.open(HERE)
    scene.step(scene.row(HERE, 0, 16, last=True))
    faults.hold_writes()
    scene.bind(0, THERE)
    assert faults.wait_until_held(scene.timeout_s)
    closer = threading.Thread(target=scene.close)
    closer.start()
    faults.release_writes()
    closer.join()
    assert "kv-transfer" not in {thread.name for thread in threading.enumerate()}
    done = list(scene.log)
    scene.pusher.stop(scene.attempt())
    assert scene.log == done


def test_a_failed_write_has_stopped_only_when_nothing_of_it_can_land(
    make_scene: Callable[..., Any],
) -> None:
    faults = Faults()
    faults.fail_write(0, "the cable is cut")
    faults.hold_settling()
    scene = faulty_scene(make_scene, faults)
    scene.open(HERE)
    scene.bind(0, THERE)
    scene.step(scene.row(HERE, 0, 16, last=True))
    assert [type(event) for event in scene.drain()] == [TransferFailed]
    scene.pusher.stop(scene.attempt())
    assert scene.drain() == []
    scene.open(HERE, name="other")  # and nobody else waits for that
    scene.pusher.stop(scene.attempt("other"))
    assert scene.drain() == [TransferStopped(scene.attempt("other"))]
    faults.release_settling()
    assert scene.drain() == [TransferStopped(scene.attempt())]
    scene.close()
