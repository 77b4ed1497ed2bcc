"""Everything that nodes say to each other.

Router and workers, and workers among themselves, exchange these frozen values and nothing else.
They hold ids and numbers only; `transport.wire` gives them a versioned, size-limited encoding.

The hand-off of one attempt, from prefill worker P to decode worker D::

    P -> D  Header     the attempt is next to run; here is all that D must know
    D -> P  Ticket     blocks to write into (or TicketRefused)
    P => D  bytes      one-sided, layer by layer, while later layers compute
    P -> D  Trailer    token 0 of each choice, digests of the bytes
    D -> P  Accepted   verified: D owns the attempt (or HandoffRejected); the router hears it too

A foreign engine's hand-off is the same, but D owns the memory that the bytes go to: they travel as
messages (`OpaquePayload`, each answered by `PayloadTaken`) after the ticket, which names no blocks.

Either side may end it early. P says `HandoffAbort`, and only once it will write no more. D says
`Revoke` when the lease runs out, quarantines the blocks, and waits for `RevokeAck` or P's death.
"""

from __future__ import annotations

from enum import StrEnum

from pdserve.core.events import LifeEvent
from pdserve.core.ids import AttemptId, BlockHash, BlockId, Epoch, RequestId, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.request import FinishReason, Job, Role, SamplingParams
from pdserve.core.step import PromptNews, StepSample, TokenLogprobs, TransferSample
from pdserve.core.token_ids import TokenIds
from pdserve.core.values import value


@value(kw_only=True)
class TokenDelta:
    """Output token ``index`` of one choice. ``finish`` ends the choice with this token. ``skipped``
    tokens right before it were drawn and not told, all of them `SILENT_TOKEN` (see `StepsDone`). A
    request's first token tells news of its ``prompt``, if there are any."""

    request_id: RequestId
    epoch: Epoch
    choice: int
    index: int
    token_id: int
    finish: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    skipped: int = 0
    prompt: PromptNews | None = None


# --- router -> worker -------------------------------------------------------------------------


@value()
class StartJob:
    """Prefill this, then hand it to ``job.decode_worker`` (or keep it, if local)."""

    job: Job


@value()
class AbortAttempt:
    """Forget the attempt (all of its choices, or only ``choices``) wherever it stands."""

    attempt: AttemptId
    choices: tuple[int, ...] | None = None


@value()
class WorkerGone:
    """The process ``(worker, epoch)`` is known dead: it will neither write nor speak again."""

    worker: WorkerId
    epoch: Epoch


@value()
class DrainWorker:
    """Take no new work; say so in the next report. Running work finishes."""


@value()
class UndrainWorker:
    """Take new work again."""


@value()
class SetRole:
    """Be of this role from the next step on. ``role_epoch`` only grows: an older one is late news
    and changes nothing. The next report confirms it."""

    role: Role
    role_epoch: int


@value(kw_only=True)
class MoveAttempt:
    """Hand the one running choice of this attempt over to another decode worker, KV and all. It is
    a hand-off like any other, of KV that is finished. If it fails before its trailer is sent, the
    choice goes on here (`MoveFailed`); after that, nobody can tell, and it is resumed."""

    attempt: AttemptId
    to: WorkerId
    cache_salt: str
    trace_context: str


@value(kw_only=True)
class SendPrefix:
    """Send what is cached of the full blocks of ``token_ids`` to a worker that lacks it. It travels
    as a hand-off without choices: the receiver indexes the blocks once they are verified, and
    nothing decodes. ``attempt`` names the transfer, not a request's attempt."""

    attempt: AttemptId
    to: WorkerId
    token_ids: TokenIds
    cache_salt: str


# --- worker -> router -------------------------------------------------------------------------


@value()
class Tokens:
    """The tokens of one step."""

    deltas: tuple[TokenDelta, ...]


class FailureKind(StrEnum):
    """Why an attempt ended without an answer. Each leads to the same resume by the router."""

    REFUSED = "refused"
    """The decode worker refused the ticket, or did not grant it in time."""
    HANDOFF = "handoff"
    """The transfer failed, or its digest did not match."""
    OUT_OF_BLOCKS = "out_of_blocks"
    """A decode-role worker ran out of blocks and gives back its youngest choice."""
    DRAINING = "draining"
    ENGINE = "engine"
    """The engine failed in a step of this attempt."""
    INVALID = "invalid"
    """The job can never run on this worker. Not retried: the client gets the detail."""


@value(kw_only=True)
class AttemptFailed:
    """The worker has let go of these choices. ``choices`` None: all choices of the attempt."""

    attempt: AttemptId
    kind: FailureKind
    detail: str
    choices: tuple[int, ...] | None = None


@value(kw_only=True)
class TicketGranted:
    """The decode worker reserved ``num_blocks`` for the attempt. Replaces the router's credit."""

    attempt: AttemptId
    num_blocks: int


@value(kw_only=True)
class MoveFailed:
    """The choice that was to move stays where it is and goes on decoding."""

    attempt: AttemptId
    detail: str


@value(kw_only=True)
class PrefixSent:
    """A `SendPrefix` has ended; ``num_blocks`` of it lie at the receiver now (0: it failed)."""

    attempt: AttemptId
    num_blocks: int


@value(kw_only=True)
class CacheChanged:
    """Blocks that entered and left the worker's prefix index, ahead of a `LoadReport` that cannot
    name them all."""

    stored: tuple[BlockHash, ...]
    evicted: tuple[BlockHash, ...]


@value()
class Life:
    """Life events of a worker, oldest first."""

    events: tuple[LifeEvent, ...]


@value(kw_only=True)
class LoadReport:
    """What a worker holds now. Sent on change, at most every few ms, and as a heartbeat.
    ``last_route_seq`` is the `Job.route_seq` of the last job that the figures include; the router
    re-applies only later ones. ``step_age_s`` is the age of the running step (0 when idle) and
    ``step_expected_s`` how long the worker thinks that it takes. Blocks: ``free_blocks`` can be
    allocated at once (unused, or cached and unreferenced: ``cached_blocks`` of them);
    ``quarantined_blocks`` wait for a writer's word. ``pending_prefill_tokens`` leaves out what was
    cached when its prompt came. ``num_running`` counts prompts too; ``num_decoding`` sequences
    decode here, or will once their prompt, which is being computed, is done; ``context_tokens`` is
    their length, all together. ``steps`` and ``transfers`` are what ended since the last report, at
    most a few dozen of each. ``role_epoch`` is that of the last `SetRole` (0: none came).
    ``is_empty``: no request, lease or unsent KV is left. ``num_left_out``: sequences that are here,
    prompts and decodes, and have no part in the running step. ``stored`` and ``evicted``: blocks
    that entered and left the prefix index since the last report, but for those that a
    `CacheChanged` has named meanwhile."""

    seq: int
    last_route_seq: int
    pending_prefill_tokens: int
    num_waiting: int
    num_running: int
    free_blocks: int
    total_blocks: int
    cached_blocks: int
    quarantined_blocks: int
    open_leases: int
    num_preemptions: int
    num_steps: int
    prefix_queries_tokens: int
    prefix_hits_tokens: int
    transfer_bytes: int
    step_age_s: float
    step_expected_s: float
    draining: bool
    num_decoding: int = 0
    context_tokens: int = 0
    role: Role = Role.MIXED
    role_epoch: int = 0
    is_empty: bool = False
    num_left_out: int = 0
    steps: tuple[StepSample, ...] = ()
    transfers: tuple[TransferSample, ...] = ()
    stored: tuple[BlockHash, ...] = ()
    evicted: tuple[BlockHash, ...] = ()


# --- worker <-> worker: the hand-off ----------------------------------------------------------


@value(kw_only=True)
class Header:
    """Opens a hand-off. The KV of all of ``token_ids`` will come; the next token index follows.
    ``block_hashes`` has one chained hash per full block of ``token_ids``, made with the salt of the
    sender's numerics class. ``opaque`` marks a payload that only an engine of the same kind reads:
    no blocks, no layers, the bytes come as `OpaquePayload` messages, in ``payload_format``.
    ``number`` and ``answer_tokens`` are the `Job`'s."""

    attempt: AttemptId
    choices: tuple[int, ...]
    token_ids: TokenIds
    num_prompt_tokens: int
    params: SamplingParams
    cache_salt: str
    trace_context: str
    block_hashes: tuple[BlockHash, ...]
    layout: KvLayout
    digest_algorithm: str
    opaque: bool = False
    payload_format: str = ""
    number: int = 0
    answer_tokens: int = 0


@value(kw_only=True)
class Ticket:
    """Write block i of the sequence, for i >= ``first_block``, into ``block_ids[i - first_block]``.
    Blocks before ``first_block`` are already here and pinned. The lease is a duration on the
    granter's own clock, renewed by `LeaseRenew`."""

    attempt: AttemptId
    first_block: int
    block_ids: tuple[BlockId, ...]
    lease_s: float


@value(kw_only=True)
class TicketRefused:
    attempt: AttemptId
    detail: str


@value()
class LeaseRenew:
    """The writer is alive and still computing."""

    attempt: AttemptId


@value(kw_only=True)
class ChunkDigest:
    """Digests of blocks ``[first_block, first_block + num_blocks)`` as sent, one per layer."""

    first_block: int
    num_blocks: int
    layers: tuple[bytes, ...]


@value(kw_only=True)
class Trailer:
    """All bytes are written. ``tokens`` holds the next token of each choice that goes on."""

    attempt: AttemptId
    tokens: tuple[TokenDelta, ...]
    chunks: tuple[ChunkDigest, ...]


@value(kw_only=True)
class OpaquePayload:
    """A slice of a foreign engine's payload; ``last`` closes it and is followed by the trailer."""

    attempt: AttemptId
    offset: int
    data: bytes
    last: bool


@value()
class PayloadTaken:
    """So many bytes of a slice have left the link, whatever became of them: send the next ones.

    Without it a payload could fill a link's buffers, and what is urgent would wait behind it."""

    attempt: AttemptId
    num_bytes: int


@value()
class Accepted:
    """The decode worker owns the attempt now. Goes to the prefill worker and to the router; to the
    latter with the first ``tokens`` again, on this link and before the next ones: should the
    prefill worker's copy be late or lost, the router still takes them in order."""

    attempt: AttemptId
    tokens: tuple[TokenDelta, ...] = ()


@value(kw_only=True)
class HandoffRejected:
    """What arrived is not what was sent. The blocks are freed: the writer had finished."""

    attempt: AttemptId
    detail: str


@value(kw_only=True)
class HandoffAbort:
    """The writer gives up and promises that it will write no more."""

    attempt: AttemptId
    detail: str


@value()
class Revoke:
    """The lease ran out or the attempt was aborted here: stop writing, and say when you have."""

    attempt: AttemptId


@value()
class RevokeAck:
    attempt: AttemptId


Message = (
    StartJob
    | AbortAttempt
    | WorkerGone
    | DrainWorker
    | UndrainWorker
    | SetRole
    | MoveAttempt
    | SendPrefix
    | Tokens
    | AttemptFailed
    | TicketGranted
    | MoveFailed
    | PrefixSent
    | CacheChanged
    | Life
    | LoadReport
    | Header
    | Ticket
    | TicketRefused
    | LeaseRenew
    | Trailer
    | OpaquePayload
    | PayloadTaken
    | Accepted
    | HandoffRejected
    | HandoffAbort
    | Revoke
    | RevokeAck
)
