"""What the router knows of each worker: its last report, and what it has promised since.

The books never drift. A job sent to a worker counts until a report says that it is included (jobs
and reports are numbered, links keep order). Blocks promised on a decode worker count until that
worker says `TicketGranted` (a local job: until its prefill has started); from then until the next
report the granted blocks count instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pdserve.core.effects import WorkerUp
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.messages import LoadReport
from pdserve.core.request import Request, Role
from pdserve.policy.cluster import ClusterView, WorkerView


@dataclass(slots=True)
class WorkerBook:
    """One live worker process. ``unreported``: (route_seq, prompt tokens) of jobs that no report
    includes yet. ``promised``: blocks by attempt, not yet granted. ``role`` and ``drains`` are
    what the pools say (`node.pools`)."""

    up: WorkerUp
    heard_at_s: float
    role: Role
    drains: bool = False
    report: LoadReport | None = None
    route_seq: int = 0
    killed: bool = False
    unreported: list[tuple[int, int]] = field(default_factory=list)
    promised: dict[AttemptId, int] = field(default_factory=dict)
    granted_blocks: int = 0
    num_granted: int = 0

    @property
    def accepts(self) -> bool:
        draining = self.drains or (self.report is not None and self.report.draining)
        return not self.killed and not draining

    @property
    def block_size(self) -> int:
        """Tokens per block; 1 if the engine keeps its blocks to itself."""
        return 1 if self.up.layout is None else self.up.layout.block_size

    @property
    def longest_tokens(self) -> int:
        """Longest prompt and answer that fit the model, and the worker's pool if it is empty."""
        if self.up.layout is None:
            return self.up.max_model_tokens
        return min(self.up.max_model_tokens, self.up.num_blocks * self.block_size)

    @property
    def free_blocks(self) -> int:
        free = self.up.num_blocks if self.report is None else self.report.free_blocks
        return free - self.granted_blocks - sum(self.promised.values())

    @property
    def pending_tokens(self) -> int:
        reported = 0 if self.report is None else self.report.pending_prefill_tokens
        return reported + sum(tokens for _, tokens in self.unreported)

    @property
    def num_decoding(self) -> int:
        report = self.report
        reported = 0 if report is None else report.num_running + report.open_leases
        return reported + len(self.promised) + self.num_granted

    @property
    def mixes(self) -> bool:
        """True if it can prefill and decode at once: every engine that we batch for can."""
        return self.up.layout is not None

    @property
    def is_drained(self) -> bool:
        """True if it takes nothing new, and holds nothing that was ever sent there."""
        report = self.report
        return (
            self.drains
            and report is not None
            and report.draining
            and report.is_empty
            and report.last_route_seq >= self.route_seq
            and not self.promised
        )

    def set_role(self, role: Role) -> None:
        """From the next view on."""
        self.role = role

    def set_drains(self, drains: bool) -> None:
        """Take nothing new from the next view on, or take work again."""
        self.drains = drains

    def has_work_against(self, home: Role) -> bool:
        """True while it has work that a worker of this home role is not for."""
        if home is Role.PREFILL:
            decoding = 0 if self.report is None else self.report.num_decoding
            return bool(decoding or self.promised or self.num_granted)
        return home is Role.DECODE and self.pending_tokens > 0

    def debit_job(self, num_tokens: int) -> int:
        """A job is sent: its number."""
        self.route_seq += 1
        self.unreported.append((self.route_seq, num_tokens))
        return self.route_seq

    def grant(self, attempt: AttemptId, num_blocks: int | None = None) -> None:
        """The worker has reserved blocks for the attempt (None: as many as were promised)."""
        promised = self.promised.pop(attempt, 0)
        self.granted_blocks += promised if num_blocks is None else num_blocks
        self.num_granted += 1

    def take_report(self, report: LoadReport, now: float) -> None:
        self.report = report
        self.heard_at_s = now
        self.granted_blocks = self.num_granted = 0
        self.unreported = [job for job in self.unreported if job[0] > report.last_route_seq]

    def view(self) -> WorkerView:
        return WorkerView(
            worker=self.up.worker,
            role=self.role,
            home_role=self.up.role,
            pending_tokens=self.pending_tokens,
            num_decoding=self.num_decoding,
            free_blocks=self.free_blocks,
            numerics="" if self.up.layout is None else self.up.layout.numerics,
        )


class ClusterBooks:
    """All live workers, by id. ``_slots``: the latest process of each id that ever came, dead or
    alive."""

    def __init__(self) -> None:
        self.workers: dict[WorkerId, WorkerBook] = {}
        self._slots: dict[WorkerId, WorkerBook] = {}

    def add(self, up: WorkerUp, now: float) -> WorkerBook:
        """A worker process is ready."""
        book = WorkerBook(up, heard_at_s=now, role=up.role)
        self.workers[up.worker] = self._slots[up.worker] = book
        return book

    def view(self, now: float, num_tokens: int) -> ClusterView:
        """Workers that take work and can hold that many tokens of one choice."""
        books = sorted(self.workers.values(), key=lambda book: book.up.worker)
        able = (book for book in books if book.accepts and book.longest_tokens >= num_tokens)
        return ClusterView(now, tuple(book.view() for book in able))

    def misfit(self, request: Request) -> str | None:
        """Why no worker could ever serve the request, also none that may come back; None if one
        could, or if there was none yet."""
        books = self._slots.values()
        num_tokens = request.max_tokens_total
        limit = max((book.longest_tokens for book in books), default=num_tokens)
        if num_tokens > limit:
            return f"prompt and max_tokens are {num_tokens} tokens; at most {limit} can be served"
        num_blocks = self.blocks_for(len(request.prompt_token_ids), request.num_choices)
        limit = max((book.up.num_blocks for book in books), default=num_blocks)
        if num_blocks > limit:
            return (
                f"prompt and {request.num_choices} choices need {num_blocks} KV blocks; "
                f"the largest worker has {limit}"
            )
        return None

    def forget(self, attempt: AttemptId, worker: WorkerId) -> None:
        """The attempt is over: what was promised for it on the worker is free again."""
        book = self.workers.get(worker)
        if book is not None:
            book.promised.pop(attempt, None)

    @property
    def longest_tokens(self) -> int:
        """Longest prompt and answer that some live worker can hold."""
        return max((book.longest_tokens for book in self.workers.values()), default=0)

    def blocks_for(self, num_tokens: int, num_choices: int) -> int:
        """Blocks that hold the tokens and one more of each choice; they share the full ones."""
        block_size = max((book.block_size for book in self._slots.values()), default=1)
        return num_tokens // block_size + num_choices
