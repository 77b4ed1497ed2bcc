"""What machines hear (inputs) and what they ask of their driver (effects).

A machine is `handle(input, now) -> list[Effect]` and nothing else touches it. The live driver
performs effects with a real engine, transport and clock; a simulator turns them into future inputs.
The order of effects is the order in which the driver performs them.

What a worker says to an engine that batches for itself, and hears from it, is in
``core.engine_work``; what operators ask of the router, and hear, is in ``core.commands``.
"""

from __future__ import annotations

from pdserve.core.commands import (
    Answer,
    ChangeRole,
    DrainOne,
    RoleChanged,
    RolesJudged,
    UndrainOne,
)
from pdserve.core.engine_work import (
    EngineAbort,
    EngineAborted,
    EngineAdopt,
    EngineAdopted,
    EngineExport,
    EngineExported,
    EngineFailed,
    EngineStepped,
    EngineSubmit,
)
from pdserve.core.events import LifeEvent
from pdserve.core.ids import AttemptId, BlockId, Epoch, RequestId, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.messages import ChunkDigest, Message, Ticket, TokenDelta
from pdserve.core.request import Request, Role
from pdserve.core.step import StepPlan, StepResult
from pdserve.core.values import value

# --- inputs of any node -----------------------------------------------------------------------


@value()
class Received:
    """A message from another node; links deliver in order, each at most once."""

    sender: WorkerId
    sender_epoch: Epoch
    message: Message


@value()
class TimerFired:
    """A timer set by `SetTimer` ran out. A replaced or cancelled timer never fires."""

    timer: str


# --- inputs of a worker -----------------------------------------------------------------------


@value()
class Started:
    """First input of every machine: the driver is ready."""


@value()
class StepDone:
    """Answer to `RunStep`."""

    result: StepResult
    elapsed_s: float


@value()
class StepsDone:
    """Answer to `RunStep` of a driver that computes nothing: ``num_steps`` steps are done, the
    running one and others just like it, in ``elapsed_s`` seconds all together.

    Whoever drew a token drew `SILENT_TOKEN`, of which the router is told later or never
    (`TokenDelta.skipped`); but in the last step the rows that ``ended`` names (row, token id) drew
    that, and what a prompt draws first is told as well. Only as many steps may pass in one go as
    `WorkerNode.steady_steps` says.
    """

    num_steps: int
    elapsed_s: float
    ended: tuple[tuple[int, int], ...] = ()


@value(kw_only=True)
class TransferSent:
    """Answer to `BindTransfer`: every block is written. No write will follow."""

    attempt: AttemptId
    chunks: tuple[ChunkDigest, ...]
    num_bytes: int


@value(kw_only=True)
class TransferFailed:
    """A write failed. No write will follow."""

    attempt: AttemptId
    detail: str


@value()
class TransferStopped:
    """Answer to `StopTransfer`: no write will follow."""

    attempt: AttemptId


@value(kw_only=True)
class TransferVerified:
    """Answer to `VerifyTransfer`. ``detail`` is None if every digest matched."""

    attempt: AttemptId
    detail: str | None


@value()
class PeerLost:
    """The link to a peer process closed. It may still be alive, and may still write."""

    worker: WorkerId
    epoch: Epoch


@value()
class PeerUp:
    """A link to a peer process is open (again)."""

    worker: WorkerId
    epoch: Epoch


# --- inputs of the router ---------------------------------------------------------------------


@value()
class Submit:
    request: Request


@value()
class ClientGone:
    """The client went away, or a stop string ended these choices (None: all)."""

    request_id: RequestId
    choices: tuple[int, ...] | None = None


@value(kw_only=True)
class WorkerUp:
    """A worker process is ready. A higher epoch of a known id replaces the old one."""

    worker: WorkerId
    epoch: Epoch
    role: Role
    layout: KvLayout | None
    num_blocks: int
    max_model_tokens: int
    pid: int
    device: str
    engine: str


@value()
class WorkerLost:
    """The worker process is dead (child exit seen, or killed). It will not write again."""

    worker: WorkerId
    epoch: Epoch
    detail: str


@value()
class BeginDrain:
    """Refuse new requests from now on; running ones finish."""


# --- effects of any node ----------------------------------------------------------------------


@value()
class Send:
    """Send to a node. If there is no link, the message is dropped: a `PeerLost` or a worker's
    death says so, never the send itself."""

    to: WorkerId
    message: Message


@value()
class SetTimer:
    """(Re)set the named timer to fire at ``at_s``."""

    timer: str
    at_s: float


@value()
class CancelTimer:
    timer: str


@value()
class Log:
    """A life event. Workers' reach the gateway as `Life`; the router's go straight to its log."""

    event: LifeEvent


# --- effects of a worker ----------------------------------------------------------------------


@value()
class RunStep:
    """Run this step on the engine thread. At most one is under way; `StepDone` answers it."""

    plan: StepPlan


@value(kw_only=True)
class OpenTransfer:
    """From the next step on, remember which layers of the attempt's blocks are finished.

    ``block_ids`` are the sequence's blocks here, ``cached_blocks`` of which (from the front) are
    finished already: prefix hits. ``one_shot``: send nothing before the last layer of the last
    chunk. ``is_finished``: all of them are, and no step follows.
    """

    attempt: AttemptId
    peer: WorkerId
    block_ids: tuple[BlockId, ...]
    cached_blocks: int
    one_shot: bool
    is_finished: bool = False


@value()
class BindTransfer:
    """The destination is known: write what is finished, then each layer as it finishes.

    `TransferSent` answers once the last chunk's last layer is written."""

    ticket: Ticket
    peer: WorkerId
    peer_epoch: Epoch


@value()
class StopTransfer:
    """Write no more for this attempt; `TransferStopped` answers, also if it was unknown."""

    attempt: AttemptId


@value(kw_only=True)
class VerifyTransfer:
    """Compare what lies in the attempt's received blocks with the digests of the trailer.

    ``block_ids[i]`` is block ``first_block + i`` of the sequence. On a device pool this also moves
    the bytes from the landing zone to the device."""

    attempt: AttemptId
    first_block: int
    block_ids: tuple[BlockId, ...]
    chunks: tuple[ChunkDigest, ...]


# --- effects of the router --------------------------------------------------------------------


@value()
class Deliver:
    """Tokens for a client, in index order per choice; these the gateway has *taken*."""

    request_id: RequestId
    deltas: tuple[TokenDelta, ...]


class Refusal:
    """Kinds of `Fail`. The gateway turns them into errors of ``core.errors``: it knows whether
    tokens are out already."""

    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    TOO_LONG = "too_long"
    DRAINING = "draining"
    INTERNAL = "internal"


@value(kw_only=True)
class Fail:
    """The request ends without (or after a part of) its answer. ``retry_after_s`` for overload."""

    request_id: RequestId
    kind: str
    detail: str
    retry_after_s: float | None = None


@value()
class KillWorker:
    """The worker hangs or is silent: kill the process; `WorkerLost` follows."""

    worker: WorkerId
    epoch: Epoch
    detail: str


Input = (
    Started
    | Received
    | TimerFired
    | StepDone
    | StepsDone
    | TransferSent
    | TransferFailed
    | TransferStopped
    | TransferVerified
    | EngineStepped
    | EngineFailed
    | EngineExported
    | EngineAdopted
    | EngineAborted
    | PeerLost
    | PeerUp
    | Submit
    | ClientGone
    | WorkerUp
    | WorkerLost
    | BeginDrain
    | ChangeRole
    | DrainOne
    | UndrainOne
)
Effect = (
    Send
    | SetTimer
    | CancelTimer
    | Log
    | RunStep
    | OpenTransfer
    | BindTransfer
    | StopTransfer
    | VerifyTransfer
    | EngineSubmit
    | EngineAbort
    | EngineExport
    | EngineAdopt
    | Deliver
    | Fail
    | KillWorker
    | Answer
    | RoleChanged
    | RolesJudged
)
