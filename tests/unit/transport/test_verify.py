"""The receiver's side: what arrived is taken only if every digest is there and matches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pdserve.core.effects import TransferSent, TransferVerified, VerifyTransfer
from pdserve.core.ids import BlockId
from pdserve.core.messages import ChunkDigest
from pdserve.transport.verify import verify

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


def test_a_transfer_without_blocks_is_verified(scene: Any) -> None:
    effect = VerifyTransfer(attempt=scene.attempt(), first_block=4, block_ids=(), chunks=())
    assert verify(scene.there, effect) is None
