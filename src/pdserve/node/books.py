"""What the router knows of each worker: its last report, and what it has promised since.

The books never drift. A job sent to a worker counts until a report says that it is included (jobs
and reports are numbered, links keep order). Blocks promised on a decode worker count until that
worker says `TicketGranted` (a local job: until its prefill has started); from then until the next
report the granted blocks count instead.

A policy's view of a worker is kept until a report or a debit changes its book, and the tuple of all
views until one of them is replaced: a decision among a thousand workers makes one or two new ones.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from pdserve.core.effects import WorkerUp
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.messages import LoadReport
from pdserve.core.request import Request, Role
from pdserve.cost.step import StepModel
from pdserve.cost.store import KnownCosts
from pdserve.node.learned import LearnedCosts, WorkerSteps
from pdserve.policy.cluster import ClusterView, WorkerView

NO_LIMIT = 1 << 62


@dataclass(slots=True)
class WorkerBook:
    """One live worker process. ``unreported``: (route_seq, prompt tokens) of jobs that no
    report includes yet. ``held``: prompt tokens of jobs that will be sent. ``promised``: blocks
    by attempt, not yet granted. ``role`` and ``drains`` are what the pools say (`node.pools`),
    ``silent`` what the watch does: such a worker gets no work. ``stale`` is the cluster's:
    workers whose view is not what their book says. ``given``: what the router has given it to do
    (`node.assigned`), as `WorkerView` names it. All but ``heard_at_s`` is set by methods, which
    make the view stale."""

    stale: dict[WorkerId, None]
    up: WorkerUp
    heard_at_s: float
    role: Role
    learned: WorkerSteps
    drains: bool = False
    silent: bool = False
    report: LoadReport | None = None
    route_seq: int = 0
    killed: bool = False
    unreported: list[tuple[int, int]] = field(default_factory=list)
    held: dict[AttemptId, int] = field(default_factory=dict)
    promised: dict[AttemptId, int] = field(default_factory=dict)
    granted_blocks: int = 0
    num_granted: int = 0
    role_since_s: float = 0.0
    given: tuple[int, int, int, int] = (0, 0, 0, 0)
    _view: WorkerView | None = None

    def changed(self) -> None:
        """Views that were made of it show no longer what it says."""
        self._view = None
        self.stale[self.up.worker] = None

    @property
    def accepts(self) -> bool:
        draining = self.drains or (self.report is not None and self.report.draining)
        return not self.killed and not self.silent and not draining

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
        promised = sum(self.promised.values()) if self.promised else 0
        return free - self.granted_blocks - promised

    @property
    def pending_tokens(self) -> int:
        reported = 0 if self.report is None else self.report.pending_prefill_tokens
        held = sum(self.held.values()) if self.held else 0
        unreported = sum([tokens for _, tokens in self.unreported]) if self.unreported else 0
        return reported + held + unreported

    @property
    def num_decoding(self) -> int:
        report = self.report
        reported = 0 if report is None else report.num_decoding + report.open_leases
        return reported + len(self.promised) + self.num_granted

    @property
    def context_tokens(self) -> int:
        """Of those sequences; what is promised is counted in whole blocks."""
        reported = 0 if self.report is None else self.report.context_tokens
        promised = sum(self.promised.values()) if self.promised else 0
        coming_blocks = self.granted_blocks + promised
        return reported + coming_blocks * self.block_size

    @property
    def steps(self) -> StepModel:
        """How long its steps take."""
        return self.learned.model()

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
            and not self.held
        )

    @property
    def is_busy(self) -> bool:
        """Something runs or waits there, as far as it has reported."""
        report = self.report
        return report is not None and report.num_running + report.num_left_out > 0

    def set_role(self, role: Role, now: float) -> None:
        """From the next view on."""
        self.role = role
        self.role_since_s = now
        self.changed()

    def set_drains(self, drains: bool) -> None:
        """Take nothing new from the next view on, or take work again."""
        self.drains = drains
        self.changed()

    def set_silent(self, silent: bool) -> None:
        """Nothing has been heard of it for too long, or something has."""
        self.silent = silent
        self.changed()

    def set_killed(self, killed: bool = True) -> None:
        """It is to die."""
        self.killed = killed
        self.changed()

    def has_work_against(self, home: Role) -> bool:
        """True while it has work that a worker of this home role is not for."""
        if home is Role.PREFILL:
            decoding = 0 if self.report is None else self.report.num_decoding
            return bool(decoding or self.promised or self.num_granted)
        return home is Role.DECODE and self.pending_tokens > 0

    def assign(self, prompt_tokens: int, num: int, num_local: int, kv_tokens: int) -> None:
        """More of each to do, or less."""
        prompts, all_given, local, kv = self.given
        self.given = (
            prompts + prompt_tokens,
            all_given + num,
            local + num_local,
            kv + kv_tokens,
        )
        self.changed()

    def debit_job(self, num_tokens: int) -> int:
        """A job is sent: its number."""
        self.route_seq += 1
        self.unreported.append((self.route_seq, num_tokens))
        self.changed()
        return self.route_seq

    def hold_job(self, attempt: AttemptId, num_tokens: int) -> None:
        """A job will be sent later."""
        self.held[attempt] = num_tokens
        self.changed()

    def let_job_go(self, attempt: AttemptId) -> None:
        """It is sent now, or never."""
        del self.held[attempt]
        self.changed()

    def promise(self, attempt: AttemptId, num_blocks: int) -> None:
        """Blocks are promised to an attempt that is to decode here."""
        self.promised[attempt] = num_blocks
        self.changed()

    def take_back(self, attempt: AttemptId) -> None:
        """What was promised to the attempt and is not granted yet, is free again."""
        if self.promised.pop(attempt, None) is not None:
            self.changed()

    def grant(self, attempt: AttemptId, num_blocks: int | None = None) -> None:
        """The worker has reserved blocks for the attempt (None: as many as were promised)."""
        promised = self.promised.pop(attempt, 0)
        granted = promised if num_blocks is None else num_blocks
        self.granted_blocks += granted
        self.num_granted += 1
        self.changed()

    def take_report(self, report: LoadReport, now: float) -> None:
        self.report = report
        self.heard_at_s = now
        self.silent = False
        self.granted_blocks = self.num_granted = 0
        if self.unreported:
            last = report.last_route_seq
            self.unreported = [job for job in self.unreported if job[0] > last]
        self.learned.take(report.steps)
        self.changed()

    def view(self) -> WorkerView:
        """What policies see: the same object until something in the book changes."""
        if self._view is None:
            report, up = self.report, self.up
            layout = up.layout
            prompts, num_given, num_local, kv_tokens = self.given
            self._view = WorkerView(
                worker=up.worker,
                role=self.role,
                home_role=up.role,
                pending_tokens=self.pending_tokens,
                num_decoding=self.num_decoding,
                context_tokens=self.context_tokens,
                free_blocks=self.free_blocks,
                total_blocks=up.num_blocks,
                block_size=1 if layout is None else layout.block_size,
                numerics="" if layout is None else layout.numerics,
                steps=self.learned.model(),
                mixes=layout is not None,
                role_since_s=self.role_since_s,
                num_left_out=0 if report is None else report.num_left_out,
                given_prompt_tokens=prompts,
                num_given=num_given,
                num_given_local=num_local,
                given_kv_tokens=kv_tokens,
            )
        return self._view


class ClusterBooks:
    """All live workers, by id. ``_slots``: the latest process of each id that ever came, dead or
    alive. ``_listed``, ``_views``, ``_limits``: ids of the workers that take work, sorted, their
    views, and the longest request of each, but for those that are ``_stale``."""

    def __init__(self, known: KnownCosts | None = None) -> None:
        self.workers: dict[WorkerId, WorkerBook] = {}
        self.learned = LearnedCosts(known or KnownCosts())
        self._slots: dict[WorkerId, WorkerBook] = {}
        self._stale: dict[WorkerId, None] = {}
        self._listed: list[WorkerId] = []
        self._views: list[WorkerView] = []
        self._limits: list[int] = []
        self._shared: tuple[WorkerView, ...] = ()
        self._shortest_tokens = NO_LIMIT  # at most what any worker can hold
        self.longest_tokens = 0
        """Longest prompt and answer that some live worker can hold."""
        self._longest_ever = 0  # of those that have ever lived, as are the next two
        self._most_blocks = 0
        self._largest_block = 1

    def add(self, up: WorkerUp, now: float) -> WorkerBook:
        """A worker process is ready."""
        learned = self.learned.of_worker(up)
        book = WorkerBook(self._stale, up, heard_at_s=now, role=up.role, learned=learned)
        self.workers[up.worker] = self._slots[up.worker] = book
        self._stale[up.worker] = None
        self._shortest_tokens = min(self._shortest_tokens, book.longest_tokens)
        self._measure()
        return book

    def remove(self, worker: WorkerId) -> None:
        """The worker's process is dead."""
        del self.workers[worker]
        self._stale[worker] = None
        self._measure()

    def take_report(self, book: WorkerBook, report: LoadReport, now: float) -> None:
        """A worker says what it holds, and how long its steps and hand-offs have taken."""
        book.take_report(report, now)
        self.learned.take_transfers(book.up.worker, report.transfers)

    def view(self, now: float, num_tokens: int) -> ClusterView:
        """Workers that take work and can hold that many tokens of one choice."""
        if self._stale:
            self._renew()
        workers = self._shared
        if num_tokens > self._shortest_tokens:
            pairs = zip(self._views, self._limits, strict=True)
            workers = tuple(view for view, limit in pairs if limit >= num_tokens)
        learned = self.learned
        return ClusterView(now, workers, learned.link, learned.links, learned.token_bytes)

    def _renew(self) -> None:
        """Put in new views where a book has changed, and out who takes no work any more."""
        for worker in self._stale:
            book = self.workers.get(worker)
            place = bisect_left(self._listed, worker)
            is_listed = place < len(self._listed) and self._listed[place] == worker
            if book is None or not book.accepts:
                if is_listed:
                    del self._listed[place], self._views[place], self._limits[place]
            elif is_listed:
                self._views[place] = book.view()
                self._limits[place] = book.longest_tokens
            else:
                self._listed.insert(place, worker)
                self._views.insert(place, book.view())
                self._limits.insert(place, book.longest_tokens)
        self._stale.clear()
        self._shared = tuple(self._views)

    def misfit(self, request: Request) -> str | None:
        """Why no worker could ever serve the request, also none that may come back; None if one
        could, or if there was none yet."""
        if not self._slots:
            return None
        num_tokens, limit = request.max_tokens_total, self._longest_ever
        if num_tokens > limit:
            return f"prompt and max_tokens are {num_tokens} tokens; at most {limit} can be served"
        num_blocks = self.blocks_for(len(request.prompt_token_ids), request.num_choices)
        limit = self._most_blocks
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
            book.take_back(attempt)

    def blocks_for(self, num_tokens: int, num_choices: int) -> int:
        """Blocks that hold the tokens and one more of each choice; they share the full ones."""
        return num_tokens // self._largest_block + num_choices

    def _measure(self) -> None:
        """Workers have come or gone: how large the largest are."""
        ever = self._slots.values()
        self.longest_tokens = max((b.longest_tokens for b in self.workers.values()), default=0)
        self._longest_ever = max(book.longest_tokens for book in ever)
        self._most_blocks = max(book.up.num_blocks for book in ever)
        self._largest_block = max(book.block_size for book in ever)
