"""Failure scenarios: read with errors that say where, cast by seed, scored the same everywhere."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pdserve.core.effects import Refusal
from pdserve.core.errors import ConfigError
from pdserve.core.ids import WorkerId
from pdserve.core.request import Role
from pdserve.workload.outcome import Ending, Outcome
from pdserve.workload.scenario import EVERYBODY_ELSE, Event, Kind, Scenario, parse_scenario
from pdserve.workload.scenario_cast import Cast, Hit, Member
from pdserve.workload.scenario_score import BlocksLeft, ScenarioScore, lines_of
from pdserve.workload.slo import parse_slo

GOOD = """
seed = 7

[[event]]
at_s = 20
kind = "hang"
worker = "prefill/random"
for_s = 2

[[event]]
at_s = 10
kind = "kill"
worker = "decode-0"
restart_after_s = inf

[[event]]
at_s = 30
kind = "slow_link"
between = ["prefill", "decode-1"]
factor = 8
for_s = 5
every_s = 100
times = 2

[[event]]
at_s = 40.5
kind = "partition"
worker = "decode/1"

[[event]]
at_s = 50
kind = "role"
worker = "random"
role = "mixed"
"""

W = WorkerId


def test_a_scenario_says_what_happens_in_the_order_of_time() -> None:
    scenario = parse_scenario(GOOD, "chaos.toml")
    assert (scenario.name, scenario.seed) == ("chaos.toml", 7)
    assert [(event.at_s, event.kind) for event in scenario.events] == [
        (10, Kind.KILL), (20, Kind.HANG), (30, Kind.SLOW_LINK), (40.5, Kind.PARTITION),
        (50, Kind.ROLE), (130, Kind.SLOW_LINK),
    ]  # fmt: skip
    kill, hang, slow, cut, role, again = scenario.events
    assert kill.restart_after_s == math.inf
    assert hang == Event(at_s=20, kind=Kind.HANG, targets=("prefill/random",), for_s=2)
    assert (slow.targets, slow.factor, slow.for_s) == (("prefill", "decode-1"), 8, 5)
    assert (cut.targets, cut.for_s) == (("decode/1", EVERYBODY_ELSE), math.inf)
    assert role.role is Role.MIXED
    assert again.factor == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = x", "s.toml is not TOML: .*line 1"),
        ("", "has no event: write"),
        ("event = 3", "has no event: write"),
        ("workers = 3\n[[event]]", "s.toml has workers; a scenario has seed and"),
        ("seed = 'x'\n[[event]]", "seed is 'x'; it must be a whole number"),
        ("[[event]]", "line 1 \\(event 1\\): kind is missing; it must be one of kill, hang"),
        ("\n\n[[event]]\nkind='kil'", "line 3 \\(event 1\\): kind is 'kil'; it must be one of"),
        ("event = [{kind='kil'}]", "s.toml, event 1: kind is 'kil'"),
        ("[[event]]\nkind='kill'\nworker='decode-0'", "at_s is missing; it must be a number 0 or"),
        ("[[event]]\nkind='kill'\nworker='decode-0'\nat_s=-1", "at_s is -1; it must be a number 0"),
        ("[[event]]\nkind='kill'\nworker='decode-0'\nat_s=inf", "at_s is inf; it must be a number"),
        ("[[event]]\nkind='kill'\nworker='decode-0'\nat_s=true", "at_s is True"),
        ("[[event]]\nkind='kill'\nat_s=1", "worker is missing; it must be a worker: decode-0"),
        ("[[event]]\nkind='kill'\nat_s=1\nworker='the first'", "worker is 'the first'; it must be"),
        ("[[event]]\nkind='kill'\nat_s=1\nworker='decode-0'\nfor_s=3", "a kill has no for_s; it"),
        ("[[event]]\nkind='hang'\nat_s=1\nworker='decode-0'\nfors=3", "no fors; did you mean for"),
        ("[[event]]\nkind='hang'\nat_s=1\nworker='decode-0'\nfor_s=0", "for_s is 0; .* above 0, "),
        ("[[event]]\nkind='slow_link'\nat_s=1\nworker='decode-0'", "factor is missing; .* above 1"),
        ("[[event]]\nkind='partition'\nat_s=1", "between is missing; it must be two sides"),
        ("[[event]]\nkind='partition'\nat_s=1\nbetween=['decode']", "between is .*two sides"),
        ("[[event]]\nkind='partition'\nat_s=1\nbetween=['decode', 3]", "between is 3; it must be"),
        ("[[event]]\nkind='partition'\nat_s=1\nbetween=['decode', 'decode']", "on both sides"),
        (
            "[[event]]\nkind='partition'\nat_s=1\nworker='decode'\nbetween=['decode', 'prefill']",
            "worker and between: give one of them",
        ),
        ("[[event]]\nkind='role'\nat_s=1\nworker='decode-0'", "role is missing; .*prefill"),
        ("[[event]]\nkind='kill'\nat_s=1\nworker='random'\ntimes=2", "every_s and times go"),
        (
            "[[event]]\nkind='kill'\nat_s=1\nworker='random'\nevery_s=1\ntimes=0",
            "times is 0; it must be a whole number",
        ),
        (
            "[[event]]\nkind='kill'\nat_s=1\nworker='random'\nevery_s=1\ntimes=20000",
            "more than 10000 events",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place_and_what_may_be_there(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_scenario(text, "s.toml")


# --- who is hit -------------------------------------------------------------------------------

MEMBERS = (
    Member(W("decode-0"), Role.DECODE, up=False),
    Member(W("decode-1"), Role.DECODE, up=True),
    Member(W("decode-2"), Role.DECODE, up=True),
    Member(W("prefill-0"), Role.PREFILL, up=True),
    Member(W("prefill-1"), Role.DECODE, up=True),
)


def event(kind: str, *targets: str, **more: Any) -> Event:
    return Event(at_s=1, kind=Kind(kind), targets=targets, **more)


@pytest.mark.parametrize(
    ("target", "workers"),
    [
        ("decode-0", ["decode-0"]),  # by its id: up or not
        ("decode-7", []),
        ("decode", ["decode-1", "decode-2", "prefill-1"]),  # in the pool now, and up
        ("decode/0", ["decode-1"]),
        ("decode/2", ["prefill-1"]),
        ("decode/3", []),
        ("mixed/random", []),
    ],
)
def test_selectors_mean_who_is_there_now(target: str, workers: list[str]) -> None:
    scenario = Scenario(name="s", events=())
    hit = Cast(scenario).hit(0, event("kill", target), MEMBERS[::-1], 1.5)
    assert list(hit.workers) == workers
    assert (hit.over_s, bool(hit.detail)) == ((None, False) if workers else (1.5, True))


def test_random_ones_depend_on_the_seed_and_the_event_and_nothing_else() -> None:
    def hits(seed: int, target: str) -> list[WorkerId]:
        cast = Cast(Scenario(name="s", events=(), seed=seed))
        return [
            cast.hit(number, event("kill", target), MEMBERS, 0.0).workers[0] for number in range(40)
        ]

    assert hits(1, "random") == hits(1, "random") != hits(2, "random")
    assert set(hits(1, "random")) == {"decode-1", "decode-2", "prefill-0", "prefill-1"}
    assert set(hits(1, "decode/random")) == {"decode-1", "decode-2", "prefill-1"}


def test_links_are_between_all_of_one_side_and_all_of_the_other() -> None:
    cast = Cast(Scenario(name="s", events=()))
    hit = cast.hit(0, event("partition", "prefill", "decode"), MEMBERS, 0.0)
    assert hit.pairs == (
        ("decode-1", "prefill-0"), ("decode-2", "prefill-0"), ("prefill-0", "prefill-1"),
    )  # fmt: skip
    assert set(hit.workers) == {"decode-1", "decode-2", "prefill-0", "prefill-1"}
    hit = cast.hit(1, event("partition", "decode-1", EVERYBODY_ELSE), MEMBERS, 0.0)
    assert [pair for pair in hit.pairs if "decode-1" not in pair] == []
    assert len(hit.pairs) == 4  # also to who is down, and will come back
    hit = cast.hit(2, event("partition", "prefill-0", "prefill-0"), MEMBERS, 0.0)
    assert hit.detail


def test_an_event_is_over_when_every_worker_that_it_hit_is_back() -> None:
    hit = Hit(event("kill", "decode"), 1.0, workers=(W("a"), W("b")), waits_for={W("a"), W("b")})
    hit.worker_up(W("c"), 2.0)
    hit.worker_up(W("a"), 3.0)
    assert hit.over_s is None
    hit.worker_up(W("b"), 4.0)
    hit.worker_up(W("b"), 5.0)
    assert hit.over_s == 4.0


# --- what it cost -----------------------------------------------------------------------------


def outcome(index: int, sent_s: float, *, took_s: float = 0.5, **more: Any) -> Outcome:
    made = {"ending": Ending.COMPLETED, "first_s": sent_s + 0.1, "last_s": sent_s + took_s}
    fields = made | {"output_tokens": 10, "asked_tokens": 10, "ended_s": sent_s + took_s} | more
    return Outcome(index=index, due_s=sent_s, sent_s=sent_s, **fields)


def failed(index: int, sent_s: float, failure: str, first_s: float | None = None) -> Outcome:
    return outcome(
        index, sent_s, ending=Ending.FAILED, failure=failure, first_s=first_s, output_tokens=3
    )


def score(*hits: Hit, slo: str = "e2e:1000") -> ScenarioScore:
    return ScenarioScore(Scenario(name="s.toml", events=(), seed=3), parse_slo([slo]), hits)


def test_lost_is_what_neither_ended_whole_nor_was_refused_cleanly() -> None:
    added = score()
    added.add(outcome(0, 1.0))
    added.add(outcome(1, 1.0, ending=Ending.CANCELLED))
    for number, refusal in enumerate(("429", "503", Refusal.OVERLOADED, Refusal.UNAVAILABLE)):
        added.add(failed(2 + number, 1.0, refusal))
    added.add(failed(6, 1.0, "503", first_s=1.1))  # after a token it is no clean refusal
    added.add(failed(7, 1.0, "500"))
    added.add(failed(8, 1.0, "disconnected"))
    added.add(outcome(9, 1.0, output_tokens=9))  # shorter than it had to be
    added.add(outcome(10, 1.0, output_tokens=9, finish_reason="stop"))
    added.never_ended(11, 1.0)
    found = added.document([], settled=True)
    assert (found["sent"], found["completed"], found["cancelled"]) == (12, 2, 1)
    assert (found["refused"], found["lost"], found["wrong"]) == (4, 5, None)
    assert [lost["index"] for lost in found["lost_requests"]] == [6, 7, 8, 9, 11]
    assert found["lost_requests"][3]["failure"] == "9 of 10 tokens"
    assert found["attainment"]["before"] == {"judged": 11, "good": 2, "share": 2 / 11}


def test_requests_are_of_before_during_or_after_by_their_whole_life() -> None:
    hits = [
        Hit(event("kill", "decode-0"), 10.0, workers=(W("decode-0"),), over_s=12.0),
        Hit(event("kill", "decode-7"), 14.0, over_s=14.0),  # nobody was hit
        Hit(event("kill", "decode-0"), 20.0, workers=(W("decode-0"),)),
    ]
    added = score(*hits)
    lives = [(1, 2), (9, 9.9), (9.9, 10), (11, 11.5), (12, 13), (12.1, 15), (14, 14.1), (19, 21)]
    for number, (sent_s, ended_s) in enumerate(lives):
        added.add(outcome(number, sent_s, took_s=ended_s - sent_s, ended_s=ended_s))
    found = added.document([], settled=True)["attainment"]
    assert {phase: share["judged"] for phase, share in found.items()} == {
        "before": 2, "during": 4, "after": 2,
    }  # fmt: skip
    assert found["during"]["good"] == 3  # one took two seconds
    assert found["after"]["good"] == 1


def test_recovery_is_when_as_many_are_good_as_before() -> None:
    hit = Hit(event("kill", "decode-0"), 10.0, workers=(W("decode-0"),), over_s=13.0)
    added = score(hit)
    for number in range(300):
        sent_s = number / 10
        slow = 10 <= sent_s < 16
        added.add(outcome(number, sent_s, took_s=3.0 if slow else 0.5))
    (shown,) = added.document([], settled=True)["events"]
    assert shown["recovery_s"] == 6.0
    assert (shown["done_s"], shown["over_s"], shown["workers"]) == (10.0, 13.0, ["decode-0"])


def test_without_recovery_there_is_no_time_to_it() -> None:
    hit = Hit(event("kill", "decode-0"), 2.0, workers=(W("decode-0"),))
    added = score(hit)
    for number in range(100):
        added.add(outcome(number, number / 10, took_s=0.5 if number < 20 else 3.0))
    (shown,) = added.document([], settled=True)["events"]
    assert shown["recovery_s"] is None


def test_blocks_leak_if_nobody_has_them_and_they_are_not_free() -> None:
    left = [
        BlocksLeft(W("a"), up=True, total=100, free=97, quarantined=1),
        BlocksLeft(W("b"), up=False),
        BlocksLeft(W("c"), up=True, total=50, free=50),
    ]
    added = score()
    added.add(outcome(0, 1.0), wrong=False)
    added.add(outcome(1, 1.0), wrong=True)
    found = added.document(left, settled=False)
    assert (found["leaked_blocks"], found["quarantined_blocks"]) == (2, 1)
    assert (found["workers_down"], found["settled"], found["wrong"]) == (["b"], False, 1)
    told = "\n".join(lines_of(found))
    assert "2 blocks leaked, 1 in quarantine; down: b" in told
    assert "0 lost, 0 refused, 2 of 2 completed, 1 wrong" in told
