"""Random histories of a virtual cluster: what goes wrong, and in which order things happen.

A history is a `Scenario` and a list of numbers, one for each thing that happens; a number alone
decides what, so that leaving out numbers leaves a history that can still happen. After the last
number everything is healed, and the cluster must come to rest with every request ended and nothing
left behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from pdserve.core.commands import ChangeRole, DrainOne
from pdserve.core.effects import Refusal
from pdserve.core.ids import AttemptId, Epoch, RequestId, WorkerId
from pdserve.core.messages import DrainWorker, SendPrefix
from pdserve.core.request import Role, RoutePreference
from pdserve.policy.cluster import ClusterView, Route, RouteAsk, RoutePolicy, WorkerView
from pdserve.policy.rebalance import Movable, Move
from virtual_cluster.checks import check_books_restored, check_caches_known
from virtual_cluster.client import Answer
from virtual_cluster.cluster import BACKGROUND_TIMERS, VirtualCluster
from virtual_cluster.oracle import make_ask
from virtual_cluster.process import Process
from virtual_cluster.scenario import CLASSES, FAULTS, Scenario

NUMBERS = 1 << 24
REST_S = 120.0
"""Virtual time within which a healed cluster must have answered everything."""


class Number:
    """One number, used up digit by digit; what comes after its last digit follows from it too."""

    def __init__(self, value: int) -> None:
        self._seed = value
        self._value = value
        self._room = NUMBERS

    def below(self, bound: int) -> int:
        if self._room < bound:
            self._seed = self._value = hash((self._seed, 77)) % (1 << 60)
            self._room = 1 << 60
        self._room //= bound
        self._value, digit = divmod(self._value, bound)
        return digit


class Restless:
    """Moves the youngest request wherever there is room, whatever it costs."""

    def may_be_crowded(self, worker: WorkerView, num_sequences: int) -> bool:
        return num_sequences > 0

    def propose(
        self, view: ClusterView, crowded: WorkerView, movable: tuple[Movable, ...]
    ) -> Move | None:
        for target in sorted(view.workers, key=lambda worker: worker.num_decoding):
            if target.worker != crowded.worker and target.free_blocks > 2:
                youngest = movable[-1].attempt
                return Move(attempt=youngest, to=target.worker, pause_s=0.0, saves_s=0.0, reason="")
        return None


class Fetching:
    """Has prefixes fetched for most routes, from whoever has any of them, whatever it costs."""

    def __init__(self, policy: RoutePolicy) -> None:
        self._policy = policy

    def choose(self, view: ClusterView, ask: RouteAsk) -> Route | None:
        route = self._policy.choose(view, ask)
        holders = list(ask.cached_tokens)
        if route is None or not holders or ask.number % 5 == 0:
            return route
        return replace(route, fetch_from=holders[ask.number % len(holders)])


@dataclass
class History:
    """A cluster under a schedule. ``engine_hits``: steps of one row that broke, by request."""

    scenario: Scenario
    cluster: VirtualCluster = field(init=False)
    num_requests: int = 0
    num_faults: int = 0
    num_commands: int = 0
    draining: bool = False
    drained: set[Process] = field(default_factory=set)
    too_long: set[RequestId] = field(default_factory=set)
    hits: dict[RequestId, int] = field(default_factory=dict)
    no_worker: bool = False

    def __post_init__(self) -> None:
        self.cluster = VirtualCluster(self.scenario.spec)
        self.cluster.late_peer_lost = self.scenario.late_peer_lost
        if self.scenario.restless:
            self.cluster.router.moves._policy = Restless()
        if self.scenario.fetching:
            dispatch = self.cluster.router.dispatch
            dispatch._policy = Fetching(dispatch._policy)
        self.cluster.run()

    # --- one thing after the other ----------------------------------------------------------------

    def play(self, numbers: Sequence[int]) -> None:
        """Everything, from the first number to rest."""
        for number in numbers:
            self.step(Number(number))
        self.heal()
        self.rest()
        self.check_end()

    def step(self, number: Number) -> None:
        cluster = self.cluster
        cluster.below = number.below
        if number.below(100) >= 100 - self.scenario.percent:
            if number.below(2):
                self._submit(number)
            else:
                faults = FAULTS[self.scenario.faults]
                getattr(self, "_" + faults[number.below(len(faults))])(number)
                self.num_faults += 1
            return
        events = cluster.events()
        if events:
            event = events[number.below(len(events))]
            if event.kind == "step" and event.process is not None:
                self._remember_hit(event.process)
            cluster.do(event)
        else:
            self._advance(number)
        self._look_for_workers()

    def _look_for_workers(self) -> None:
        """Remember if there was ever nobody who could hold any request."""
        live_tokens = self.cluster.router.books.longest_tokens
        self.no_worker |= live_tokens < self.scenario.spec.longest_tokens

    def _remember_hit(self, process: Process) -> None:
        run = process.engine
        if run is not None and run.broken and len(run.plan.rows) == 1:
            request_id = run.plan.rows[0].attempt.request_id
            self.hits[request_id] = self.hits.get(request_id, 0) + 1

    def _submit(self, number: Number) -> None:
        spec = self.scenario.spec
        self.num_requests += 1
        longest = spec.longest_tokens
        is_too_long = number.below(40) == 0
        family = number.below(3)
        num_tokens = 1 + number.below(longest - 1)
        prompt = tuple((family + 1) * (7 + i) % 19 for i in range(num_tokens))
        if number.below(4) == 0:  # of its own from some block on
            tail = number.below(num_tokens)
            prompt = prompt[:tail] + tuple(100 + self.num_requests for _ in prompt[tail:])
        room = longest - num_tokens
        max_tokens = longest if is_too_long else 1 + number.below(min(room, 10))
        ask = make_ask(
            f"r{self.num_requests}",
            prompt,
            max_tokens=max_tokens,
            num_choices=(1, 1, 1, 2, 3)[number.below(5)],
            seed=number.below(2),
            salt=("", "", "salt")[number.below(3)],
            route=list(RoutePreference)[number.below(3)],
            eos=number.below(2) == 0,
            min_tokens=number.below(3) if max_tokens > 2 else 0,
            penalty=number.below(4) == 0,
            poison=self.scenario.poison and number.below(8) == 0,
            longest_tokens=longest,
            service=CLASSES[number.below(len(CLASSES))],
            tenant=("", "x", "y")[number.below(3)],
        )
        if is_too_long:
            self.too_long.add(ask.request_id)
        self.cluster.submit(ask)

    def _open(self) -> list[Answer]:
        return [answer for answer in self.cluster.client.answers.values() if not answer.is_over]

    def _alive(self) -> list[Process]:
        return [p for p in self.cluster.current.values() if p.alive]

    # --- what goes wrong --------------------------------------------------------------------------

    def _advance(self, number: Number) -> None:
        """Time passes, to the next timer or a little less far."""
        at_s = self.cluster.next_timer_s()
        if at_s is not None:
            self.cluster.now = max(self.cluster.now, at_s - (number.below(2) * 0.001))

    def _far(self, number: Number) -> None:
        """Everybody slept for long."""
        self.cluster.now += (0.3, 1.1, 3.0, 40.0)[number.below(4)]

    def _leave(self, number: Number) -> None:
        answers = self._open()
        if answers:
            answer = answers[number.below(len(answers))]
            running = sorted(answer.wanted - answer.finished)
            whole = number.below(2) == 0
            choices = None if whole else (running[number.below(len(running))],)
            self.cluster.leave(answer.ask.request_id, choices)

    def _kill(self, number: Number) -> None:
        alive = self._alive()
        if alive:
            self.cluster.kill(alive[number.below(len(alive))])

    def _stop(self, number: Number) -> None:
        alive = self._alive()
        if alive:
            alive[number.below(len(alive))].stopped = True

    def _continue(self, number: Number) -> None:
        stopped = [p for p in self._alive() if p.stopped]
        if stopped:
            stopped[number.below(len(stopped))].stopped = False

    def _cut(self, number: Number, *, for_good: bool = False) -> None:
        links = [link for link in self.cluster.links() if all(p.alive for p in link.sides)]
        if links:
            self.cluster.cut(links[number.below(len(links))], for_good=for_good)

    def _cut_for_good(self, number: Number) -> None:
        self._cut(number, for_good=True)

    def _heal(self, number: Number) -> None:
        links = [link for link in self.cluster.links() if link.cut]
        if links:
            links[number.below(len(links))].cut = False

    def _give_up(self, number: Number) -> None:
        found = [
            (link, side)
            for link in self.cluster.links()
            for side in link.sides
            if side.runs and link.can_give_up(side)
        ]
        if found:
            link, side = found[number.below(len(found))]
            link.give_up(side)

    def _corrupt(self, number: Number) -> None:
        alive = self._alive()
        if alive:
            alive[number.below(len(alive))].pusher.corrupt_next = True

    def _fail_write(self, number: Number) -> None:
        alive = self._alive()
        if alive:
            alive[number.below(len(alive))].pusher.fail_next = True

    def _break_step(self, number: Number) -> None:
        """The step fails once; one of many rows, or that of one alone."""
        runs = [p.engine for p in self._alive() if p.engine is not None]
        if runs:
            runs[number.below(len(runs))].broken = True

    def _ghost(self, number: Number) -> None:
        """A message of a process that is known dead arrives once more."""
        dead = [p for p in self.cluster.processes if not p.alive and p.said]
        dead = [p for p in dead if p not in self.cluster.unreaped]
        if dead:
            process = dead[number.below(len(dead))]
            to, message = process.said[number.below(len(process.said))]
            receiver = self.cluster.current.get(to)
            if receiver is None or (
                receiver.runs and receiver.node._gone.get(process.worker, -1) >= process.epoch
            ):
                self.cluster.ghost(process, to, message)

    def _drain(self, number: Number) -> None:
        """The server shuts down: seldom, for nothing new comes after it."""
        if number.below(20) == 0:
            self.draining = True
            self.cluster.drain()

    def _drain_worker(self, number: Number) -> None:
        """One worker is to take no new work, unless it is the last one that does."""
        members = [p for w, p in self.cluster.members.items() if p.alive and self._takes_work(w)]
        if len(members) > 1:
            process = members[number.below(len(members))]
            self.drained.add(process)
            process.to_worker.append(DrainWorker())

    def _change_role(self, number: Number) -> None:
        """An operator moves a worker to another pool, wherever it stands."""
        workers = sorted(self.cluster.current)
        role = list(Role)[number.below(len(Role))]
        worker = workers[number.below(len(workers))]
        self.num_commands += 1
        self.cluster.command(ChangeRole(command=self.num_commands, worker=worker, role=role))

    def _drain_one(self, number: Number) -> None:
        """An operator has a worker replaced, unless it is the last one that takes work."""
        books = self.cluster.router.books.workers
        taking = [w for w, b in sorted(books.items()) if b.accepts and self._takes_work(w)]
        if len(taking) > 1:
            worker = taking[number.below(len(taking))]
            self.num_commands += 1
            self.cluster.command(DrainOne(command=self.num_commands, worker=worker, restart=True))

    def _share(self, number: Number) -> None:
        """A worker is to send what it has of a prefix to another one; or, seldom, to itself."""
        members = [member for _, member in sorted(self.cluster.members.items()) if member.alive]
        if members:
            self.num_commands += 1
            family = number.below(3)
            asked = SendPrefix(
                attempt=AttemptId(RequestId(f"prefix-{self.num_commands}"), Epoch(1)),
                to=members[number.below(len(members))].worker,
                token_ids=tuple((family + 1) * (7 + i) % 19 for i in range(16)),
                cache_salt=("", "salt")[number.below(2)],
            )
            members[number.below(len(members))].to_worker.append(asked)

    def _takes_work(self, worker: WorkerId) -> bool:
        """Nobody has told it, or the router, that it should not."""
        book = self.cluster.router.books.workers.get(worker)
        is_drained = self.cluster.current[worker] in self.drained
        return book is not None and not book.drains and not is_drained

    # --- the end ----------------------------------------------------------------------------------

    def heal(self) -> None:
        """Nothing goes wrong from now on. Drained workers are replaced."""
        cluster = self.cluster
        cluster.below = lambda number: number - 1
        for process in self._alive():
            process.stopped = False
            process.pusher.corrupt_next = process.pusher.fail_next = False
            if process in self.drained:
                cluster.kill(process)
            elif process.engine is not None and process.engine.broken:
                self._remember_hit(process)
        for link in cluster.links():
            link.cut = False

    def rest(self) -> None:
        """Run until every request is over and every worker is empty."""
        cluster = self.cluster
        end_s = cluster.now + REST_S
        self._run_on()
        while not self._is_at_rest():
            assert cluster.now < end_s, f"stuck: {self._left()}"
            at_s = cluster.next_timer_s()
            assert at_s is not None
            cluster.now = max(cluster.now, at_s)
            self._run_on()
        end_s = cluster.now + 1.2  # two heartbeats: the books follow
        while cluster.now < end_s:
            cluster.now = max(cluster.now, cluster.next_timer_s() or end_s)
            self._run_on()

    def _run_on(self) -> None:
        cluster = self.cluster
        last = -1
        while events := cluster.events():
            last = (last + 1) % len(events)
            event = events[last]
            if event.kind == "step" and event.process is not None:
                self._remember_hit(event.process)
            cluster.do(event)
            self._look_for_workers()

    def _is_at_rest(self) -> bool:
        cluster = self.cluster
        router_rests = cluster.router.num_requests == 0 and not len(cluster.router.dispatch.fetches)
        return router_rests and all(p.alive and p.node.is_empty for p in cluster.current.values())

    def _left(self) -> str:
        router = self.cluster.router
        left = {p: p.node.inbound.handoffs() for p in self.cluster.current.values()}
        lives = list(router.dispatch.lives.values())
        return f"{lives=} waiting={router.dispatch.queue} {left=}"

    def check_end(self) -> None:
        """Every request has its answer or a good reason, and nothing is left."""
        cluster = self.cluster
        for request_id, answer in cluster.client.answers.items():
            assert answer.is_over, f"{request_id} has not ended"
            self._check_reason(request_id, answer)
            if answer.failure is None and not answer.aborted:
                for choice in answer.wanted:
                    assert tuple(answer.tokens[choice]) == answer.ask.answers[choice]
        for process in cluster.current.values():
            pool = process.node.batch.tables.pool
            assert pool.num_free == pool.num_blocks, f"{process}: {pool.num_referenced} held"
            left = [name for name in process.timers if name not in BACKGROUND_TIMERS]
            assert not left, f"{process}: {left}"
            assert not process.pusher._transfers, process.pusher._transfers
        left = [name for name in cluster.router_timers if name not in BACKGROUND_TIMERS]
        assert not [name for name in left if name != "no worker"], left
        check_books_restored(cluster.router)
        check_caches_known(cluster.router, cluster.current.values())

    def _check_reason(self, request_id: RequestId, answer: Answer) -> None:
        failure = answer.failure
        if failure is None:
            return
        match failure.kind:
            case Refusal.TOO_LONG:
                request = answer.ask.request
                fits = request.max_tokens_total <= self.scenario.spec.longest_tokens
                assert not fits or request.num_choices > 1, failure
            case Refusal.INTERNAL:
                assert self.hits.get(request_id, 0) >= 2, failure
            case Refusal.UNAVAILABLE:
                assert self.no_worker, failure
            case Refusal.OVERLOADED:
                assert not answer.has_tokens
                promised = answer.ask.request.service
                assert promised.is_bounded or "promises" not in failure.detail
            case Refusal.DRAINING:
                assert self.draining
                assert not answer.has_tokens
            case _:
                raise AssertionError(failure)


def numbers_of(random: Random, count: int) -> list[int]:
    """A schedule."""
    return [random.randrange(NUMBERS) for _ in range(count)]


def shortest_failure(scenario: Scenario, numbers: Sequence[int]) -> list[int]:
    """What is left of a schedule that fails if everything is left out that it fails without."""

    def fails(some: list[int]) -> bool:
        try:
            History(scenario).play(some)
        except AssertionError:
            return True
        return False

    left = list(numbers)
    size = len(left) // 2
    while size:
        start = 0
        while start < len(left):
            without = left[:start] + left[start + size :]
            if fails(without):
                left = without
            else:
                start += size
        size //= 2
    return left
