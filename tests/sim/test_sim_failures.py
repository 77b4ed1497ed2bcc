"""What fails in a simulation fails as live: who hears of it, when it is over, how long it takes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pdserve.core.effects import PeerLost, PeerUp, WorkerLost
from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.request import Role
from pdserve.cost.machine import ClusterTimes, LinkSpec
from pdserve.sim.scenario import ScenarioPlayer
from pdserve.sim.simulation import Simulation
from pdserve.workload.scenario import EVERYBODY_ELSE, Event, Kind, Scenario

pytestmark = pytest.mark.interpreted  # it listens at the machines
SPLIT = "1xm:prefill,2xm:decode"
W = WorkerId
MESSAGE_S = 0.001


def settings_of(lab: Any, cluster: str = SPLIT, **changes: Any) -> Any:
    fields = {"heartbeat_s": 0.5, "load_s": 2.0, "times": ClusterTimes(message_s=MESSAGE_S)}
    return lab.settings(cluster, lab.machine(), **{**fields, **changes})


def steady(lab: Any, seconds: float, per_second: int = 10) -> Any:
    number = int(seconds * per_second)
    return lab.requests(*[(index / per_second, 300, 60) for index in range(number)])


def event(kind: Kind, *targets: str, at_s: float = 2.0, **more: Any) -> Event:
    return Event(at_s=at_s, kind=kind, targets=targets, **more)


def heard_by(lab: Any, settings: Any, load: Any, *events: Event) -> tuple[Any, dict[str, list]]:
    """The score of a run, and what every machine heard of its peers, of losses and when."""
    player = ScenarioPlayer(Scenario(name="test", events=events), None)
    simulation = Simulation(settings, iter(load), [player])
    heard: dict[str, list] = {}

    def listen(name: str, machine: Any) -> None:
        real = machine.handle

        def handle(told: Any, now: float) -> Any:
            if isinstance(told, PeerLost | PeerUp | WorkerLost):
                heard.setdefault(name, []).append((round(now, 6), told))
            return real(told, now)

        machine.handle = handle

    listen("router", simulation.router)
    simulation.at(0.0, lambda: [listen(w, p.node) for w, p in simulation.workers.items()])
    player.begin(simulation)
    simulation.run()
    return player.document, heard


# --- death ------------------------------------------------------------------------------------


def test_a_death_is_heard_of_and_the_slot_gets_a_new_process(lab: Any) -> None:
    score, heard = heard_by(
        lab, settings_of(lab), steady(lab, 8), event(Kind.KILL, "decode-0", restart_after_s=1.5)
    )
    lost_s = 2.0 + MESSAGE_S
    assert heard["router"] == [(lost_s, WorkerLost(W("decode-0"), Epoch(1), "killed"))]
    for peer in ("prefill-0", "decode-1"):
        assert heard[peer] == [(lost_s, PeerLost(W("decode-0"), Epoch(1)))]
    (shown,) = score["events"]
    assert shown["over_s"] == 2.0 + 1.5 + 2.0  # held, then loading
    assert (score["lost"], score["completed"]) == (0, 80)


def test_restarts_follow_the_launchers_rule(lab: Any) -> None:
    deaths = [event(Kind.KILL, "decode-0", at_s=at_s) for at_s in (1.0, 4.0, 8.0)]
    score, _ = heard_by(lab, settings_of(lab), steady(lab, 16), *deaths)
    took_s = [shown["over_s"] - shown["at_s"] for shown in score["events"]]
    assert took_s == pytest.approx([2.5, 3.0, 4.0])  # half a second, doubled each time, and 2 s


def test_a_slot_that_is_never_started_again_comes_back_when_the_load_is_over(lab: Any) -> None:
    score, _ = heard_by(
        lab, settings_of(lab), steady(lab, 6),
        event(Kind.KILL, "decode-0", restart_after_s=math.inf),
    )  # fmt: skip
    (shown,) = score["events"]
    assert shown["over_s"] > 6.0
    assert (score["workers_down"], score["lost"]) == ([], 0)


def test_all_die_at_once_and_requests_wait_for_them(lab: Any) -> None:
    kills = [event(Kind.KILL, role) for role in ("prefill", "decode")]
    score, _ = heard_by(lab, settings_of(lab), steady(lab, 4), *kills)
    assert [shown["workers"] for shown in score["events"]] == [
        ["prefill-0"], ["decode-0", "decode-1"],
    ]  # fmt: skip
    assert (score["lost"], score["completed"]) == (0, 40)


# --- hanging ----------------------------------------------------------------------------------


def test_a_short_hang_costs_its_time_and_nothing_else(lab: Any) -> None:
    """Alone on one worker: everything after it is later by exactly as long as it slept."""
    load = lab.requests((0.0, 300, 200))
    settings = settings_of(lab, "1xm:mixed")
    whole = lab.run(settings, load).in_order[0]
    for at_s in (0.003, 0.7):  # in the prefill, in a decode
        hang = event(Kind.HANG, "mixed-0", at_s=at_s, for_s=0.25)
        hung = lab.run(settings, load, [hang]).in_order[0]
        assert hung.last_s == pytest.approx(whole.last_s + 0.25, abs=1e-9)
        moved_s = 0.25 if at_s < whole.first_s else 0.0
        assert hung.first_s == pytest.approx(whole.first_s + moved_s, abs=1e-9)


def test_a_worker_that_does_not_wake_is_killed_and_replaced(lab: Any) -> None:
    """Nothing was heard of it for three seconds: see `node.watch`."""
    score, heard = heard_by(lab, settings_of(lab), steady(lab, 12), event(Kind.HANG, "decode-0"))
    [(lost_s, lost)] = heard["router"]
    assert lost.detail.startswith("silent for 3.")
    assert 4.5 < lost_s < 6.0
    (shown,) = score["events"]
    assert shown["over_s"] == pytest.approx(lost_s - MESSAGE_S + 0.5 + 2.0)
    assert (score["lost"], score["completed"], score["leaked_blocks"]) == (0, 120, 0)


# --- links ------------------------------------------------------------------------------------


def test_a_cut_link_is_heard_of_at_both_ends_and_again_when_it_is_healed(lab: Any) -> None:
    score, heard = heard_by(
        lab, settings_of(lab), steady(lab, 8),
        event(Kind.PARTITION, "prefill-0", "decode-0", for_s=1.0),
    )  # fmt: skip
    assert "router" not in heard
    assert "decode-1" not in heard
    assert heard["decode-0"][0] == (2.0 + MESSAGE_S, PeerLost(W("prefill-0"), Epoch(1)))
    assert heard["prefill-0"][0] == (2.0 + MESSAGE_S, PeerLost(W("decode-0"), Epoch(1)))
    up_s = 3.0 + 2 * MESSAGE_S
    assert heard["decode-0"][-1] == (up_s, PeerUp(W("prefill-0"), Epoch(1)))
    assert heard["prefill-0"][-1] == (up_s, PeerUp(W("decode-0"), Epoch(1)))
    assert (score["lost"], score["leaked_blocks"], score["quarantined_blocks"]) == (0, 0, 0)


def test_who_sends_over_a_cut_link_hears_after_two_seconds_that_it_is_lost(lab: Any) -> None:
    """The only decode worker is cut off: hand-offs are opened, and given up."""
    score, heard = heard_by(
        lab, settings_of(lab, "1xm:prefill,1xm:decode"), steady(lab, 8),
        event(Kind.PARTITION, "decode-0", EVERYBODY_ELSE, for_s=5.0),
    )  # fmt: skip
    losses = [at_s for at_s, told in heard["prefill-0"] if isinstance(told, PeerLost)]
    assert len(losses) > 1
    assert losses[1] - losses[0] >= 2.0
    assert (score["lost"], score["leaked_blocks"], score["quarantined_blocks"]) == (0, 0, 0)


def test_a_slow_link_carries_so_many_times_less_while_it_lasts(lab: Any) -> None:
    machine = lab.machine(link=LinkSpec(bytes_per_s=1e7))
    settings = lab.settings("1xm:prefill,1xm:decode", machine, one_shot_tokens=1 << 20)
    load = lab.requests((0.0, 1000, 3), (1.0, 1000, 3), (3.0, 1000, 3))
    slow = event(Kind.SLOW_LINK, "prefill", "decode", at_s=0.5, factor=10.0, for_s=1.0)
    run = lab.run(settings, load, [slow])
    alone_s = 1000 * 1024 / 1e7
    first, second, third = (sent.ended_s - sent.begun_s for sent in run.transfers)
    assert first == pytest.approx(third)
    begun_s = 1.0 + lab.linear.prefill_s(1000)
    sent_slowly_s = 1.5 - begun_s  # then the rest at the full rate
    expected_s = sent_slowly_s + (alone_s - sent_slowly_s / 10.0)
    assert run.transfers[1].ended_s - begun_s == pytest.approx(expected_s, rel=1e-6)
    assert second > first


def test_of_two_slow_links_the_worse_counts_and_both_end(lab: Any) -> None:
    machine = lab.machine(link=LinkSpec(bytes_per_s=1e7))
    settings = lab.settings("1xm:prefill,1xm:decode", machine, one_shot_tokens=1 << 20)
    load = lab.requests(*[(float(second), 500, 2) for second in range(6)])
    slow = [
        event(Kind.SLOW_LINK, "prefill", "decode", at_s=0.5, factor=3.0, for_s=4.0),
        event(Kind.SLOW_LINK, "prefill", "decode", at_s=1.5, factor=5.0, for_s=1.5),
    ]
    run = lab.run(settings, load, slow)
    prefill_s = lab.linear.prefill_s(500)
    took_s = [sent.ended_s - (second + prefill_s) for second, sent in enumerate(run.transfers)]
    alone_s = 500 * 1024 / 1e7
    assert [round(each / alone_s, 3) for each in took_s] == [1, 3, 5, 3, 3, 1]


# --- operators --------------------------------------------------------------------------------


def test_operators_act_as_live(lab: Any) -> None:
    score, _ = heard_by(
        lab, settings_of(lab), steady(lab, 8),
        event(Kind.DRAIN, "decode-0", at_s=1.0),
        event(Kind.ROLE, "decode-1", at_s=2.0, role=Role.MIXED),
        event(Kind.UNDRAIN, "decode-0", at_s=4.0),
        event(Kind.KILL, "decode-7", at_s=5.0),
    )  # fmt: skip
    drain, role, undrain, nobody = score["events"]
    assert drain["over_s"] > drain["done_s"]  # once it holds nothing
    assert role["over_s"] == role["done_s"]
    assert not drain["detail"] + role["detail"] + undrain["detail"]
    assert nobody["workers"] == []
    assert "no worker is decode-7" in nobody["detail"]
    assert (score["lost"], score["completed"]) == (0, 80)
