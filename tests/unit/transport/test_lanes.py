"""Transfers to several peers: one that stalls holds up nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import pytest

from pdserve.core.effects import (
    BindTransfer,
    Input,
    OpenTransfer,
    TransferFailed,
    TransferSent,
    TransferStopped,
    TransferVerified,
    VerifyTransfer,
)
from pdserve.core.ids import AttemptId, BlockId, Epoch, RequestId, StepId, WorkerId
from pdserve.core.messages import Ticket
from pdserve.core.step import StepPlan
from pdserve.transport.base import PoolExport, RemotePool, Transport
from pdserve.transport.fake import FakeTransport, Faults
from pdserve.transport.inproc import InprocHub, InprocTransport
from pdserve.transport.push import Pusher
from pdserve.transport.tcp import SocketOptions, SocketTransport
from pdserve.transport.transfer import PoolView
from pdserve.transport.verify import verify

NUM_BLOCKS = 16
SECRET = b"s" * 32
HERE = (1, 2, 3)
THERE = (8, 5, 6)


@dataclass
class Peer:
    name: str
    remote: RemotePool

    @property
    def attempt(self) -> AttemptId:
        return AttemptId(RequestId(f"for {self.name}"), Epoch(1))


class Sender:
    """A pusher with one transfer for each of its peers, all computed in one step."""

    def __init__(self, scene: Any, peers: list[Peer]) -> None:
        self.scene = scene
        self.peers = peers
        self.posts: SimpleQueue[Input] = SimpleQueue()
        memory = memoryview(bytearray(os.urandom(scene.layout.pool_bytes(NUM_BLOCKS))))
        self.pool = PoolView(memory, scene.layout, NUM_BLOCKS)
        self.pusher = Pusher(
            runner=scene.runner,
            pool_memory=memory,
            layout=scene.layout,
            num_blocks=NUM_BLOCKS,
            post=self.posts.put,
        )

    def push(self) -> None:
        """Compute for all peers in one step, after everything is bound."""
        for peer in self.peers:
            opened = OpenTransfer(
                attempt=peer.attempt,
                peer=WorkerId(peer.name),
                block_ids=tuple(map(BlockId, HERE)),
                cached_blocks=0,
                one_shot=False,
            )
            self.pusher.open(opened)
            ticket = Ticket(
                attempt=peer.attempt,
                first_block=0,
                block_ids=tuple(map(BlockId, THERE)),
                lease_s=1.0,
            )
            bound = BindTransfer(ticket, WorkerId(peer.name), Epoch(1))
            self.pusher.bind(bound, peer.remote, NUM_BLOCKS)
        rows = [
            self.scene.row(HERE, 0, 12, last=True, name=peer.attempt.request_id)
            for peer in self.peers
        ]
        plan = StepPlan(step_id=StepId(1), rows=tuple(rows))
        self.pusher.begin_step(plan)
        for layer in range(self.scene.layout.num_layers):
            self.pusher.layer_done(plan.step_id, layer)
        self.pusher.end_step(plan.step_id, True)

    def next(self) -> Input:
        return self.posts.get(timeout=self.scene.timeout_s)

    def verified(self) -> Input:
        """What comes of a check, on this side, of what others have written."""
        effect = VerifyTransfer(
            attempt=AttemptId(RequestId("from elsewhere"), Epoch(1)),
            first_block=0,
            block_ids=(),
            chunks=(),
        )
        self.pusher.verify(effect)
        return self.next()


def memory_peer(name: str, faults: Faults) -> tuple[Peer, memoryview]:
    hub = InprocHub()
    transport: Transport = FakeTransport(InprocTransport(hub), faults)
    pool = transport.allocate(NUM_BLOCKS * 3 * 64)
    return Peer(name, transport.attach(pool.export())), pool.memory


def test_a_held_write_holds_up_neither_other_peers_nor_what_arrives(scene: Any) -> None:
    slow, quick = Faults(), Faults()
    slow.hold_writes()
    (first, _), (second, there) = memory_peer("slow", slow), memory_peer("quick", quick)
    sender = Sender(scene, [first, second])
    sender.push()
    sent = sender.next()
    assert isinstance(sent, TransferSent)
    assert sent.attempt == second.attempt
    effect = VerifyTransfer(
        attempt=second.attempt,
        first_block=0,
        block_ids=tuple(map(BlockId, THERE)),
        chunks=sent.chunks,
    )
    assert verify(PoolView(there, scene.layout, NUM_BLOCKS), effect) is None
    assert isinstance(sender.verified(), TransferVerified)
    assert slow.wait_until_held(scene.timeout_s)
    assert slow.num_writes == 1
    slow.release_writes()
    late = sender.next()
    assert isinstance(late, TransferSent)
    assert late.attempt == first.attempt
    assert late.chunks == sent.chunks
    sender.pusher.close()


def test_a_stop_is_answered_by_the_lane_that_still_writes(scene: Any) -> None:
    slow = Faults()
    slow.hold_writes()
    (first, _), (second, _) = memory_peer("slow", slow), memory_peer("quick", Faults())
    sender = Sender(scene, [first, second])
    sender.push()
    assert isinstance(sender.next(), TransferSent)
    assert slow.wait_until_held(scene.timeout_s)
    for peer in (first, second):
        sender.pusher.stop(peer.attempt)
    assert sender.next() == TransferStopped(second.attempt)
    assert sender.posts.empty()
    slow.release_writes()
    assert sender.next() == TransferStopped(first.attempt)
    sender.pusher.close()


def test_an_attempt_that_comes_again_is_not_hurt_by_the_stop_of_the_one_before(scene: Any) -> None:
    slow = Faults()
    slow.hold_writes()
    (first, _), (second, _) = memory_peer("slow", slow), memory_peer("quick", Faults())
    sender = Sender(scene, [first])
    sender.push()
    assert slow.wait_until_held(scene.timeout_s)
    sender.pusher.stop(first.attempt)
    opened = OpenTransfer(
        attempt=first.attempt,
        peer=WorkerId("quick"),
        block_ids=tuple(map(BlockId, HERE)),
        cached_blocks=3,
        one_shot=False,
        is_finished=True,
    )
    sender.pusher.open(opened)
    ticket = Ticket(
        attempt=first.attempt, first_block=0, block_ids=tuple(map(BlockId, THERE)), lease_s=1.0
    )
    sender.pusher.bind(BindTransfer(ticket, WorkerId("quick"), Epoch(1)), second.remote, NUM_BLOCKS)
    assert isinstance(sender.next(), TransferSent)
    slow.release_writes()
    assert sender.next() == TransferStopped(first.attempt)
    sender.pusher.close()


# --- a process that reads no more -------------------------------------------------------------

OWNER = """
    import sys
    from pdserve.transport.base import Writer
    from pdserve.transport.tcp import SocketOptions, SocketTransport

    pool = SocketTransport(SocketOptions(secret=b"s" * 32)).allocate(int(sys.argv[1]))
    export = pool.export(Writer("prefill-0/1", False))
    print(export.token.hex(), flush=True)
    sys.stdin.read(1)
"""


@dataclass
class Process:
    """The owner of a pool, which can be stopped: it does not read any more."""

    process: subprocess.Popen[str]
    peer: Peer

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@pytest.fixture
def start() -> Iterator[Callable[[str, float], Process]]:
    started: list[Process] = []

    def start(name: str, stall_s: float) -> Process:
        num_bytes = NUM_BLOCKS * 3 * 64
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(OWNER), str(num_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        token = bytes.fromhex(process.stdout.readline())
        options = SocketOptions(secret=SECRET, stall_s=stall_s)
        remote = SocketTransport(options).attach(PoolExport("tcp", token, num_bytes))
        started.append(Process(process, Peer(name, remote)))
        return started[-1]

    yield start
    for owner in started:
        owner.peer.remote.close()
        owner.process.kill()
        owner.process.communicate()


def test_a_process_that_stops_reading_holds_up_nobody_else(
    scene: Any, start: Callable[[str, float], Process]
) -> None:
    stopped, other = start("stopped", 60.0), start("other", 60.0)
    sender = Sender(scene, [stopped.peer, other.peer])
    stopped.stop()
    sender.push()
    sent = sender.next()
    assert isinstance(sent, TransferSent)
    assert sent.attempt == other.peer.attempt
    assert isinstance(sender.verified(), TransferVerified)
    stopped.go_on()
    late = sender.next()
    assert isinstance(late, TransferSent)
    assert late.attempt == stopped.peer.attempt
    assert late.chunks == sent.chunks
    sender.pusher.close()


def test_a_process_that_reads_no_more_is_given_up_and_nobody_else(
    scene: Any, start: Callable[[str, float], Process]
) -> None:
    stopped, other = start("stopped", 1.0), start("other", 60.0)
    sender = Sender(scene, [stopped.peer, other.peer])
    stopped.stop()
    sender.push()
    outcomes = {type(event): event for event in (sender.next(), sender.next())}
    assert outcomes[TransferSent].attempt == other.peer.attempt
    assert outcomes[TransferFailed].attempt == stopped.peer.attempt
    stopped.go_on()
    sender.pusher.stop(stopped.peer.attempt)
    assert sender.next() == TransferStopped(stopped.peer.attempt), "the link is there again"
    sender.pusher.close()
