"""Early rejection: who is let in, why not, and when it is worth trying again."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role, RoutePreference, ServiceClass
from pdserve.cost.step import StepModel
from pdserve.policy.admission import (
    ADMISSION_POLICIES,
    TPOT_MARGIN,
    Admission,
    AdmissionPolicy,
    EarlyRejection,
    NoRejection,
    PredictedRejection,
)
from pdserve.policy.cluster import ClusterView, RouteAsk, WorkerView
from pdserve.policy.course import Flight, Newcomers
from pdserve.policy.forecast import DecodeForecast, LoadView

MS = 0.001
STEPS = StepModel(
    prompt_base_s=10 * MS,
    per_prompt_token_s=1 * MS,
    per_pair_s=0.0,
    decode_base_s=10 * MS,
    per_sequence_s=1 * MS,
    per_context_token_s=0.0,
)
"""A prompt of 100 tokens takes 110 ms; a step that decodes n sequences 10 + n ms."""
CLASS = ServiceClass(name="quick", ttft_s=0.5, tpot_s=20 * MS / TPOT_MARGIN)
"""A step may take 20 ms."""
ASK = RouteAsk(num_tokens=100, num_blocks=7, output_tokens=50, service=CLASS)


def worker(name: str, *, pending: int = 0, decoding: int = 0, free: int = 1000) -> WorkerView:
    roles = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}
    return WorkerView(
        worker=WorkerId(name),
        role=roles[name[0]],
        pending_tokens=pending,
        num_decoding=decoding,
        free_blocks=free,
        numerics="",
        steps=STEPS,
    )


def view(
    *workers: WorkerView,
    flights: Mapping[str, Sequence[Flight]] | None = None,
    newcomers: Mapping[str, Newcomers] | None = None,
    waiting: float = 0.0,
) -> LoadView:
    return LoadView(
        cluster=ClusterView(0.0, workers),
        flights={WorkerId(name): there for name, there in (flights or {}).items()},
        newcomers={WorkerId(name): there for name, there in (newcomers or {}).items()},
        waiting_tokens=waiting,
    )


def decoding(number: int, *, left: float = 1000.0, starts_in_s: float = 0.0) -> list[Flight]:
    return [Flight(context_tokens=64, tokens_left=left, starts_in_s=starts_in_s)] * number


def judge(seen: LoadView, ask: RouteAsk = ASK) -> Admission:
    return PredictedRejection().judge(seen, ask)


def test_an_idle_cluster_lets_in() -> None:
    verdict = judge(view(worker("p0"), worker("d0")))
    assert verdict == Admission(True, "expected: 110 ms to the first token, 11 ms per token")


@pytest.mark.parametrize(
    ("pending", "accepted", "retry_after_s"),
    [(380, True, 0.0), (381, False, 0.001), (2000, False, 1.62)],
)
def test_a_first_token_that_would_be_late_is_refused_until_the_backlog_has_shrunk(
    pending: int, accepted: bool, retry_after_s: float
) -> None:
    """The backlog takes 10 ms and its tokens, the prompt 110 ms, and 500 ms are promised."""
    verdict = judge(view(worker("p0", pending=pending), worker("d0")))
    assert verdict.accepted is accepted
    assert verdict.retry_after_s == pytest.approx(retry_after_s)


def test_the_best_prefill_worker_counts() -> None:
    workers = (worker("p0", pending=2000), worker("p1", pending=100), worker("d0"))
    assert judge(view(*workers)).accepted


def test_a_cached_prefix_counts_wherever_it_lies() -> None:
    """Nine workers are free sooner, but need a second for the prompt."""
    busy = tuple(worker(f"p{i}", pending=100 + i) for i in range(9))
    seen = view(*busy, worker("p9", pending=200), worker("d0"))
    long = replace(ASK, num_tokens=1000, service=replace(CLASS, ttft_s=1.05))
    assert not judge(seen, long).accepted
    assert judge(seen, replace(long, cached_tokens={WorkerId("p9"): 990})).accepted
    assert not judge(seen, replace(long, cached_tokens={WorkerId("p9"): 10})).accepted


def test_what_waits_in_the_router_counts_for_its_share() -> None:
    workers = (worker("p0"), worker("p1"), worker("d0"), worker("d1"))
    assert judge(view(*workers, waiting=4 * 380)).accepted
    assert not judge(view(*workers, waiting=4 * 382)).accepted


def test_a_pace_that_would_be_too_slow_is_refused_until_enough_have_ended() -> None:
    """With it 11 decode, 21 ms a step; the first ends after 10 of its steps of 20 ms."""
    flights = decoding(9) + decoding(1, left=20)
    verdict = judge(view(worker("p0"), worker("d0"), flights={"d0": flights}))
    assert not verdict.accepted
    assert verdict.reason == (
        "class quick promises 22 ms per token, a tenth of which is kept back; "
        "expected now: 110 ms to the first token, 21 ms per token"
    )
    assert verdict.retry_after_s == pytest.approx(20 * 20 * MS - 110 * MS)
    elsewhere = view(worker("p0"), worker("d0"), worker("d1"), flights={"d0": flights})
    assert judge(elsewhere).accepted


def test_those_that_will_have_finished_do_not_count_and_those_on_their_way_do() -> None:
    """The prefill ends in 110 ms: 5 steps of 20 ms from now."""
    workers = (worker("p0"), worker("d0"))
    ending = view(*workers, flights={"d0": decoding(5) + decoding(5, left=5)})
    assert PredictedRejection().judge(ending, ASK).accepted
    assert not EarlyRejection().judge(ending, ASK).accepted
    coming = view(*workers, flights={"d0": decoding(5) + decoding(5, starts_in_s=0.1)})
    assert not PredictedRejection().judge(coming, ASK).accepted
    assert EarlyRejection().judge(coming, ASK).accepted
    later = view(*workers, flights={"d0": decoding(5) + decoding(5, starts_in_s=0.2)})
    assert PredictedRejection().judge(later, ASK).accepted


def test_those_who_will_come_later_and_be_ready_sooner_count_where_somebody_is() -> None:
    """A prompt of 2 s: five decode now, and as many come every second, each for two."""
    ask = replace(ASK, num_tokens=2000, service=replace(CLASS, ttft_s=5.0))
    late = Newcomers(decoding(5, left=125, starts_in_s=0.5), 1.0)
    ending = view(worker("p0"), worker("d0"), flights={"d0": decoding(5, left=20)})
    assert judge(ending, ask).reason == "expected: 2010 ms to the first token, 11 ms per token"
    steady = replace(ending, newcomers={WorkerId("d0"): late})
    assert not judge(steady, ask).accepted
    assert EarlyRejection().judge(steady, ask).accepted
    empty = view(worker("p0"), worker("d0"), newcomers={"d0": late})
    assert judge(empty, ask).accepted


def test_choices_count_one_by_one() -> None:
    workers = (worker("p0"), worker("d0"))
    assert judge(view(*workers), replace(ASK, num_choices=10)).accepted
    some = view(*workers, flights={"d0": decoding(1)})
    assert not judge(some, replace(ASK, num_choices=10)).accepted


def test_no_room_is_waited_for() -> None:
    """7 blocks are needed, 2 are free, and each sequence holds 4 and some when it ends."""
    flights = decoding(1, left=10) + decoding(1, left=20) + decoding(1, left=900)
    seen = view(worker("p0"), worker("d0", free=2), flights={"d0": flights})
    verdict = judge(seen, replace(ASK, service=replace(CLASS, ttft_s=0.2)))
    assert not verdict.accepted
    second_end_s = 10 * 13 * MS + 10 * 12 * MS  # once the first has ended they are faster
    assert verdict.retry_after_s == pytest.approx(second_end_s + 0.11 - 0.2)
    assert judge(seen).accepted
    full = judge(view(worker("p0"), worker("d0", free=0)))
    assert not full.accepted
    assert full.retry_after_s == math.inf
    assert "no room in sight" in full.reason


def test_a_mixed_worker_prefills_beside_its_decodes() -> None:
    """One chunk beside 8 sequences: 8 ms more for the prompt, and the same for the backlog."""
    busy = worker("m0", decoding=8, pending=300)
    verdict = judge(view(busy, flights={"m0": decoding(8)}))
    assert verdict.accepted
    assert verdict.reason == "expected: 436 ms to the first token, 19 ms per token"


def test_prompts_that_wait_where_it_will_decode_slow_it_down() -> None:
    """It prefills at p0 and decodes at m0, which works on 2,000 tokens for 2 s meanwhile."""
    ask = replace(ASK, output_tokens=200)
    crowded = view(worker("p0"), worker("m0", pending=2000), worker("m1", free=0))
    slowed = judge(crowded, ask)
    assert slowed.reason.startswith("class quick promises 22 ms per token")
    assert judge(crowded, replace(ask, output_tokens=2000)).accepted


def test_a_local_route_is_judged_where_it_will_go() -> None:
    workers = (worker("p0"), worker("d0"), worker("m0", pending=5000))
    assert judge(view(*workers)).accepted
    assert not judge(view(*workers), replace(ASK, preference=RoutePreference.LOCAL)).accepted


def test_a_bound_that_nobody_could_keep_refuses_only_while_something_is_in_the_way() -> None:
    ask = replace(ASK, service=ServiceClass(name="dream", ttft_s=0.01, tpot_s=0.001))
    assert judge(view(worker("p0"), worker("d0")), ask).accepted
    assert not judge(view(worker("p0", pending=1), worker("d0")), ask).accepted
    assert not judge(view(worker("p0"), worker("d0"), flights={"d0": decoding(1)}), ask).accepted


@pytest.mark.parametrize("policy", [EarlyRejection(), PredictedRejection(), NoRejection()])
def test_without_bounds_or_figures_nobody_is_refused(policy: AdmissionPolicy) -> None:
    overrun = view(worker("p0", pending=10**6), worker("d0", free=0))
    assert policy.judge(overrun, replace(ASK, service=ServiceClass())).accepted
    unknown = tuple(replace(one, steps=None) for one in overrun.cluster.workers)
    assert policy.judge(view(*unknown), ASK).accepted
    assert policy.judge(view(), ASK).accepted


def test_one_bound_alone_is_enough() -> None:
    slow = view(worker("p0", pending=2000), worker("d0"), flights={"d0": decoding(30)})
    only_ttft = replace(ASK, service=ServiceClass(ttft_s=1.0))
    only_tpot = replace(ASK, service=ServiceClass(tpot_s=0.02))
    assert not judge(slow, only_ttft).accepted
    assert judge(slow, replace(ASK, service=ServiceClass(ttft_s=3.0))).accepted
    assert not judge(slow, only_tpot).accepted
    assert judge(slow, replace(ASK, service=ServiceClass(tpot_s=0.05))).accepted


def test_a_forecast_of_nobody_is_the_request_alone() -> None:
    forecast = DecodeForecast(worker("d0"), STEPS, ())
    assert forecast.tpot_s(3.0, 100) == pytest.approx(11 * MS)
    assert forecast.room_in_s(5) == 0.0
    assert forecast.calm_in_s(0.001, 100, 1, 2.0) == 2.0


# --- the two loads over time ----------------------------------------------------------------------


LENGTHS = 60, 140


@dataclass
class _Served:
    ready_s: float
    tokens_left: float
    tokens: float = 0.0

    def may_have_left(self, number: int) -> float:
        """Of all answers as long as this one that went on, one here, one there."""
        least = max(self.tokens, LENGTHS[0])
        return least + (0.5 + 0.618 * number) % 1.0 * (LENGTHS[1] - least) - self.tokens


@dataclass
class _Loop:
    """A small cluster in steps of 20 ms: prefill workers with queues, one decode worker, and a
    load of which it can serve about half. Prompts take a second, answers about three. How long each
    answer will be is known, or only how long answers are (``knows``)."""

    policy: AdmissionPolicy
    seed: int
    knows: bool = True
    now: float = 0.0
    queues_s: list[float] = field(default_factory=lambda: [0.0] * 12)
    running: list[_Served] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)
    num_accepted: int = 0

    TICK_S = 0.02
    ASK = RouteAsk(
        num_tokens=990,
        num_blocks=62,
        output_tokens=100,
        service=ServiceClass(name="quick", ttft_s=5.0, tpot_s=30 * MS / TPOT_MARGIN),
    )

    def run(self, num_ticks: int) -> _Loop:
        draw = random.Random(self.seed)
        for _ in range(num_ticks):
            if draw.random() < 0.25:
                self._arrive(draw)
            self._tick()
        return self

    def _arrive(self, draw: random.Random) -> None:
        flights = [
            Flight(
                context_tokens=990,
                tokens_left=max(1.0, one.tokens_left if self.knows else one.may_have_left(i)),
                starts_in_s=max(0.0, one.ready_s - self.now),
            )
            for i, one in enumerate(self.running)
        ]
        prefills = [
            worker(f"p{i:02}", pending=round(queue / MS)) for i, queue in enumerate(self.queues_s)
        ]
        seen = view(*prefills, worker("d0", free=10**6), flights={"d0": flights})
        if self.policy.judge(seen, self.ASK).accepted:
            self.num_accepted += 1
            shortest = min(range(len(self.queues_s)), key=lambda i: self.queues_s[i])
            self.queues_s[shortest] += STEPS.prefill_s(990)
            answer = draw.uniform(*LENGTHS)
            self.running.append(_Served(self.now + self.queues_s[shortest], answer))

    def _tick(self) -> None:
        self.now += self.TICK_S
        self.queues_s = [max(0.0, queue - self.TICK_S) for queue in self.queues_s]
        decodes = [one for one in self.running if one.ready_s <= self.now]
        for one in decodes:
            more = self.TICK_S / STEPS.decode_s(len(decodes), 0)
            one.tokens_left -= more
            one.tokens += more
        self.running = [one for one in self.running if one.tokens_left > 0]
        self.loads.append(len(decodes))


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_predicted_load_damps_the_swing_that_todays_load_makes(seed: int, knows: bool) -> None:
    """Mooncake's experiment (technical report, sec. 7): as many are let in, but by today's load
    they come in waves, which overshoot the 20 sequences that 30 ms per token allow. Not to know how
    long each answer will be costs a part of that, not the most of it."""
    swing, overshoot, accepted = {}, {}, {}
    for policy in (EarlyRejection(), PredictedRejection()):
        loop = _Loop(policy, seed, knows).run(3000)
        settled = loop.loads[500:]
        swing[type(policy)] = statistics.pstdev(settled)
        overshoot[type(policy)] = max(settled)
        accepted[type(policy)] = loop.num_accepted
    assert swing[PredictedRejection] < 0.4 * swing[EarlyRejection]
    assert overshoot[PredictedRejection] <= (22 if knows else 26) < 30 <= overshoot[EarlyRejection]
    assert accepted[PredictedRejection] > 0.95 * accepted[EarlyRejection]


def test_the_same_history_is_judged_alike() -> None:
    one, two = (_Loop(PredictedRejection(), 5).run(500) for _ in range(2))
    assert one.loads == two.loads
    assert 0 < one.num_accepted < 125


def test_policies_have_names() -> None:
    assert sorted(ADMISSION_POLICIES) == ["early", "none", "predicted"]
    for make in ADMISSION_POLICIES.values():
        assert make().judge(view(worker("p0"), worker("d0")), ASK).accepted
