"""How payloads of an engine that batches for itself leave this worker.

A hand-off's `PayloadCargo` is bound when the peer has granted its ticket. It then waits in the lane
to that peer until the prefill is done and it is its turn to be *exported*: turned into bytes by the
engine. The bytes leave in slices, in order, as far as the lane's window goes; each `PayloadTaken`
moves the window on. When the last slice is on its way the hand-off's trailer follows it on the same
link.

One link carries everything for a peer, so the window belongs to the lane and not to the payload:
what is under way stays bounded whatever the number of hand-offs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pdserve.core.effects import TransferSent
from pdserve.core.engine_work import EngineExport, EngineExported
from pdserve.core.ids import AttemptId, Epoch, WorkerId
from pdserve.core.messages import ChunkDigest, Header, OpaquePayload, Ticket
from pdserve.core.request import Job
from pdserve.node.cargo import DIGEST_ALGORITHM, Cargo
from pdserve.node.engine_tasks import EngineTask, EngineTasks, TaskState
from pdserve.node.outbox import Outbox
from pdserve.node.settings import WorkerSettings


@dataclass(slots=True)
class _Parcel:
    """One payload: ``payload`` once the engine has made it, ``num_sent`` bytes of it sent."""

    task: EngineTask
    exporting: bool = False
    payload: bytes | None = None
    digest: bytes = b""
    num_sent: int = 0


@dataclass(slots=True)
class _Lane:
    """What goes to one peer. ``num_untaken`` bytes are under way."""

    num_untaken: int = 0
    parcels: dict[AttemptId, _Parcel] = field(default_factory=dict)


class PayloadSender:
    """All payloads that leave this worker."""

    def __init__(self, settings: WorkerSettings) -> None:
        assert settings.foreign is not None
        self._settings = settings.foreign
        self._lanes: dict[WorkerId, _Lane] = {}

    @property
    def is_empty(self) -> bool:
        return not any(lane.parcels for lane in self._lanes.values())

    @property
    def is_exporting(self) -> bool:
        """True if the engine has been asked for a payload and has not given it."""
        return any(p.exporting for lane in self._lanes.values() for p in lane.parcels.values())

    def bind(self, task: EngineTask, peer: WorkerId) -> None:
        """Send the task's payload to the peer as soon as there is one."""
        self._lanes.setdefault(peer, _Lane()).parcels[task.attempt] = _Parcel(task)

    def drop(self, attempt: AttemptId) -> None:
        """Send no more of it."""
        for lane in self._lanes.values():
            lane.parcels.pop(attempt, None)

    def exported(self, event: EngineExported) -> str | None:
        """The engine has made a payload. Says why it cannot be sent, or None."""
        parcel = self._find(event.attempt)
        if parcel is None or not parcel.exporting:
            return None
        parcel.exporting = False
        limit = self._settings.max_payload_bytes
        if len(event.payload) > limit:
            return f"a payload of {len(event.payload)} bytes is over the limit of {limit}"
        parcel.payload, parcel.digest = event.payload, event.digest
        return None

    def taken(self, peer: WorkerId, num_bytes: int) -> None:
        """The peer has taken so many bytes off the link."""
        lane = self._lanes.get(peer)
        if lane is not None:
            lane.num_untaken = max(0, lane.num_untaken - num_bytes)

    def peer_lost(self, peer: WorkerId) -> None:
        """What was under way is gone. The hand-offs' own ends drop the payloads."""
        lane = self._lanes.get(peer)
        if lane is not None:
            lane.num_untaken = 0

    def advance(self, out: Outbox) -> list[TransferSent]:
        """Ask for exports and send slices as far as possible; gives what is now all sent."""
        sent = []
        for peer, lane in self._lanes.items():
            for attempt, parcel in list(lane.parcels.items()):
                if parcel.payload is not None and self._send(peer, lane, parcel, out):
                    del lane.parcels[attempt]
                    sent.append(_sent(attempt, parcel))
            self._ask_exports(lane, out)
        return sent

    def _ask_exports(self, lane: _Lane, out: Outbox) -> None:
        in_memory = sum(p.exporting or p.payload is not None for p in lane.parcels.values())
        for attempt, parcel in lane.parcels.items():
            if in_memory >= self._settings.max_exports:
                return
            waits = parcel.payload is None and not parcel.exporting
            if waits and parcel.task.state is TaskState.HELD:
                parcel.exporting = True
                in_memory += 1
                out.add(EngineExport(attempt))

    def _send(self, peer: WorkerId, lane: _Lane, parcel: _Parcel, out: Outbox) -> bool:
        """Slices of the payload as far as the window goes. True if it is all sent."""
        payload, settings = parcel.payload, self._settings
        assert payload is not None
        while True:
            offset = parcel.num_sent
            data = payload[offset : offset + settings.payload_slice_bytes]
            if lane.num_untaken and lane.num_untaken + len(data) > settings.payload_window_bytes:
                return False
            lane.num_untaken += len(data)
            parcel.num_sent += len(data)
            last = parcel.num_sent == len(payload)
            attempt = parcel.task.attempt
            out.send(peer, OpaquePayload(attempt=attempt, offset=offset, data=data, last=last))
            if last:
                return True

    def _find(self, attempt: AttemptId) -> _Parcel | None:
        for lane in self._lanes.values():
            if attempt in lane.parcels:
                return lane.parcels[attempt]
        return None


class PayloadCargo(Cargo):
    """What the engine has computed of one attempt, as bytes that only its kind reads."""

    def __init__(
        self,
        settings: WorkerSettings,
        tasks: EngineTasks,
        sender: PayloadSender,
        job: Job,
        task: EngineTask,
    ) -> None:
        self._settings = settings
        self._tasks = tasks
        self._sender = sender
        self._job = job
        self._task = task

    def header(self) -> Header:
        assert self._settings.foreign is not None
        job = self._job
        return Header(
            attempt=job.attempt,
            choices=self._task.choices,
            token_ids=job.token_ids,
            num_prompt_tokens=job.num_prompt_tokens,
            params=job.params,
            cache_salt=job.cache_salt,
            trace_context=job.trace_context,
            block_hashes=(),
            layout=self._settings.layout,
            digest_algorithm=DIGEST_ALGORITHM,
            opaque=True,
            payload_format=self._settings.foreign.payload_format,
        )

    def open(self, out: Outbox) -> None:
        """Nothing to prepare: the engine computes, and is asked when it has."""

    def bind(self, ticket: Ticket, peer_epoch: Epoch, out: Outbox) -> None:
        self._sender.bind(self._task, self._job.decode_worker)

    def stop(self, out: Outbox, *, keeps: bool) -> None:
        """`EngineAborted` answers."""
        assert not keeps, "an engine that batches for itself does not turn a hand-off around"
        self._sender.drop(self._job.attempt)
        self._tasks.stop(self._job.attempt, out)

    def let_go(self, out: Outbox) -> None:
        self._sender.drop(self._job.attempt)
        self._tasks.end(self._job.attempt, out)


def _sent(attempt: AttemptId, parcel: _Parcel) -> TransferSent:
    """As if a native transfer had ended: one digest, of no blocks."""
    digests = ChunkDigest(first_block=0, num_blocks=0, layers=(parcel.digest,))
    return TransferSent(attempt=attempt, chunks=(digests,), num_bytes=parcel.num_sent)
