"""The receiver's side: what arrived is taken only if every digest is there and matches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pdserve.core.effects import TransferSent, TransferVerified, VerifyTransfer
from pdserve.core.ids import BlockId
from pdserve.core.messages import ChunkDigest, Ticket
from pdserve.transport import verify as verify_module
from pdserve.transport.progress import LayersWritten
from pdserve.transport.transfer import PoolView
from pdserve.transport.verify import Arrivals, verify

HERE = (5, 6, 9, 2)
THERE = (30, 31, 32, 7)


def receive(scene: Any, first_block: int = 0) -> VerifyTransfer:
    """A finished transfer of two chunks, as the receiver is asked to verify it."""
    scene.open(HERE)
    scene.bind(first_block, THERE[first_block:])
    scene.step(scene.row(HERE, 0, 8, last=False))
    scene.step(scene.row(HERE, 8, 14, last=True))
    (event,) = scene.drain()
    assert isinstance(event, TransferSent)
    return VerifyTransfer(
        attempt=scene.attempt(),
        first_block=first_block,
        block_ids=tuple(map(BlockId, THERE[first_block:])),
        chunks=event.chunks,
    )


def test_what_was_sent_is_verified_and_then_taken(scene: Any) -> None:
    effect = receive(scene, first_block=1)
    there = scene.make_pusher(scene.there)
    there.verify(effect)
    event = scene.posts.get(timeout=scene.timeout_s)
    there.close()
    assert event == TransferVerified(attempt=scene.attempt(), detail=None)
    assert scene.runner.taken == [THERE[1:]]


def test_a_byte_that_changed_is_found_and_nothing_is_taken(scene: Any) -> None:
    effect = receive(scene)
    scene.there.memory[scene.there.offset(1, 7) + 63] ^= 1
    there = scene.make_pusher(scene.there)
    there.verify(effect)
    event = scene.posts.get(timeout=scene.timeout_s)
    there.close()
    assert event.detail == "layer 1 of blocks 2 to 3 is not what was sent"
    assert scene.runner.taken == []


def test_a_device_that_cannot_take_the_blocks_fails_the_verification(scene: Any) -> None:
    effect = receive(scene)
    scene.runner.error = RuntimeError("out of memory")
    there = scene.make_pusher(scene.there)
    there.verify(effect)
    event = scene.posts.get(timeout=scene.timeout_s)
    there.close()
    assert event.detail == "RuntimeError: out of memory"


def change(chunk: ChunkDigest, **fields: Any) -> ChunkDigest:
    return replace(chunk, **fields)


@pytest.mark.parametrize(
    ("garble", "what"),
    [
        (lambda a, b: (a,), "digests of 2 blocks, of 4"),
        (lambda a, b: (), "digests of 0 blocks, of 4"),
        (lambda a, b: (b, a), "where block 0 is next"),
        (lambda a, b: (a, a), "where block 2 is next"),
        (lambda a, b: (a, b, change(b, first_block=4)), "only 4 were granted"),
        (lambda a, b: (a, change(b, num_blocks=3)), "only 4 were granted"),
        (lambda a, b: (a, change(b, num_blocks=0)), "where block 2 is next"),
        (lambda a, b: (a, change(b, num_blocks=-1)), "where block 2 is next"),
        (lambda a, b: (a, change(b, layers=b.layers[:2])), "2 digests of blocks 2 to 3"),
        (lambda a, b: (a, change(b, layers=a.layers)), "layer 0 of blocks 2 to 3"),
        (lambda a, b: (change(a, num_blocks=1), b), "layer 0 of blocks 0 to 0"),
    ],
)
def test_digests_that_do_not_cover_the_blocks_are_refused(
    scene: Any, garble: Callable[..., tuple[ChunkDigest, ...]], what: str
) -> None:
    effect = receive(scene)
    assert verify(scene.there, effect) is None
    detail = verify(scene.there, replace(effect, chunks=garble(*effect.chunks)))
    assert detail is not None
    assert what in detail


# --- digests that are made while the rest is still written ------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers that were hashed, on either side, in order."""
    layers: list[int] = []
    digest = PoolView.digest

    def noted(pool: PoolView, layer: int, runs: Any) -> bytes:
        layers.append(layer)
        return digest(pool, layer, runs)

    monkeypatch.setattr(PoolView, "digest", noted)
    return layers


def news_in(scene: Any) -> list[LayersWritten]:
    return [event for event in scene.log if isinstance(event, LayersWritten)]


def ticket(scene: Any, first_block: int = 0) -> Ticket:
    blocks = tuple(map(BlockId, THERE[first_block:]))
    return Ticket(attempt=scene.attempt(), first_block=first_block, block_ids=blocks, lease_s=1.0)


@pytest.mark.parametrize("first_block", [0, 1, 3])
def test_what_was_announced_is_not_hashed_again(
    scene: Any, hashed: list[int], first_block: int
) -> None:
    effect = receive(scene, first_block)
    arrivals = Arrivals(scene.there)
    arrivals.expect(ticket(scene, first_block))
    hashed.clear()
    for news in news_in(scene):
        arrivals.written(news)
        arrivals.written(news)
    assert hashed == [0, 1, 2] * len(effect.chunks)
    assert arrivals.verify(effect) is None
    assert hashed == [0, 1, 2] * len(effect.chunks)


def test_what_was_not_announced_is_hashed_at_the_end(scene: Any, hashed: list[int]) -> None:
    effect = receive(scene)
    arrivals = Arrivals(scene.there)
    arrivals.expect(ticket(scene))
    arrivals.written(replace(news_in(scene)[0], first_layer=1, num_layers=1))
    hashed.clear()
    assert arrivals.verify(effect) is None
    assert hashed == [0, 2, 0, 1, 2]


def test_a_byte_that_came_wrong_is_found_though_it_was_announced(scene: Any) -> None:
    effect = receive(scene)
    scene.there.memory[scene.there.offset(1, 7) + 63] ^= 1
    arrivals = Arrivals(scene.there)
    arrivals.expect(ticket(scene))
    for news in news_in(scene):
        arrivals.written(news)
    assert arrivals.verify(effect) == "layer 1 of blocks 2 to 3 is not what was sent"


def test_news_that_came_too_early_do_no_harm(scene: Any) -> None:
    effect = receive(scene)
    place = scene.there.offset(1, 7)
    right = scene.there.memory[place]
    scene.there.memory[place] ^= 1
    arrivals = Arrivals(scene.there)
    arrivals.expect(ticket(scene))
    for news in news_in(scene):
        arrivals.written(news)
    scene.there.memory[place] = right
    assert arrivals.verify(effect) is None


@pytest.mark.parametrize("again", [True, False])
def test_what_was_hashed_for_an_earlier_ticket_counts_no_more(scene: Any, again: bool) -> None:
    """The client may use a request's name again: same tokens, same digests, other bytes there."""
    effect = receive(scene)
    arrivals = Arrivals(scene.there)
    arrivals.expect(ticket(scene))
    for news in news_in(scene):
        arrivals.written(news)
    scene.there.memory[scene.there.offset(0, 30)] ^= 1
    if again:
        arrivals.expect(ticket(scene))
    else:
        assert arrivals.verify(replace(effect, first_block=1)) is not None
    assert arrivals.verify(effect) == "layer 0 of blocks 0 to 1 is not what was sent"


@pytest.mark.parametrize(
    "wrong",
    [
        {"first_block": -1},
        {"first_block": 0},
        {"first_block": 3},
        {"num_blocks": 0},
        {"num_blocks": 4},
        {"num_blocks": -2},
        {"first_layer": -1},
        {"first_layer": 1},
        {"num_layers": 0},
        {"num_layers": 1 << 60},
    ],
)
def test_news_of_what_was_not_granted_are_ignored(
    scene: Any, hashed: list[int], wrong: dict[str, int]
) -> None:
    arrivals = Arrivals(scene.there)
    arrivals.expect(ticket(scene, first_block=1))
    news = LayersWritten(
        attempt=scene.attempt(), first_block=2, num_blocks=2, first_layer=0, num_layers=3
    )
    arrivals.written(replace(news, **wrong))
    arrivals.written(replace(news, attempt=scene.attempt("other")))
    assert hashed == []
    arrivals.written(news)
    assert hashed == [0, 1, 2]


def test_transfers_that_never_end_are_forgotten(
    scene: Any, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "MAX_EXPECTED", 1)
    effect = receive(scene)
    arrivals = Arrivals(scene.there)
    arrivals.expect(ticket(scene))
    arrivals.expect(replace(ticket(scene), attempt=scene.attempt("other")))
    hashed.clear()
    for news in news_in(scene):
        arrivals.written(news)
    assert hashed == []
    assert arrivals.verify(effect) is None


def test_the_pusher_hashes_what_it_is_told_of(scene: Any, hashed: list[int]) -> None:
    effect = receive(scene)
    hashed.clear()
    there = scene.make_pusher(scene.there)
    there.expect(ticket(scene))
    for news in news_in(scene):
        there.written(news)
    there.verify(effect)
    event = scene.posts.get(timeout=scene.timeout_s)
    there.close()
    assert event == TransferVerified(attempt=scene.attempt(), detail=None)
    assert hashed == [0, 1, 2] * 2


def test_a_transfer_without_blocks_is_verified(scene: Any) -> None:
    effect = VerifyTransfer(attempt=scene.attempt(), first_block=4, block_ids=(), chunks=())
    assert verify(scene.there, effect) is None
