"""Workers of calibrated machines: neighbours that slow down, steps that stray, seeded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import fmean, pstdev

import pytest

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role
from pdserve.core.step import StepShape
from pdserve.cost.machine import LinkSpec, MachineModel
from pdserve.cost.pace import LEVELS, Gap, Lost, Pace, Spread
from pdserve.cost.step import StepModel
from pdserve.sim.clock import Clock
from pdserve.sim.observe import Ended, Observer
from pdserve.sim.settings import SimSettings
from pdserve.sim.simulation import Simulation
from pdserve.sim.spec import parse_cluster
from pdserve.sim.tempo import Hosts, Tempo
from pdserve.workload.request import TraceRequest, own_segment

STEPS = StepModel(
    prompt_base_s=0.0,
    per_prompt_token_s=1e-3,
    per_pair_s=0.0,
    decode_base_s=0.01,
    per_sequence_s=0.0,
    per_context_token_s=0.0,
)
PROMPT = StepShape(100, 10_000)
DECODE = StepShape(0, 0, 1, 100)
HALF = {"prompt": Lost(beside_decode=0.5, beside_prompt=0.2), "decode": Lost(beside_prompt=0.5)}


def a_machine(
    lost: Mapping[str, Lost] | None = None,
    spreads: Mapping[str, Spread] | None = None,
    gaps: Mapping[str, Gap] | None = None,
) -> MachineModel:
    per_host = {Role.PREFILL: 1, Role.DECODE: 1}
    pace = Pace(spreads=spreads or {}, lost=lost or {}, gaps=gaps or {}, per_host=per_host)
    return MachineModel(
        name="here",
        model="none",
        steps=STEPS,
        linear=STEPS,
        num_layers=2,
        token_kv_bytes=1024,
        block_size=16,
        num_blocks=4096,
        max_model_tokens=8192,
        link=LinkSpec(bytes_per_s=1e12),
        pace=pace,
    )


class Pair:
    """A prefill and a decode worker on one host, with the ends that they are told."""

    def __init__(self, machine: MachineModel) -> None:
        self.clock = Clock()
        hosts = Hosts(seed=0, gap_s=0.0)
        self.ends: dict[str, float] = {}
        self.prefill = self._tempo(hosts, machine, "prefill-0")
        self.decode = self._tempo(hosts, machine, "decode-0")

    def _tempo(self, hosts: Hosts, machine: MachineModel, name: str) -> Tempo:
        tempo = hosts.tempo(self.clock, WorkerId(name), machine)
        assert tempo is not None
        tempo.moved = lambda end_s: self.ends.update({name: end_s})
        return tempo


def test_a_step_beside_a_neighbour_takes_as_much_longer_as_was_measured() -> None:
    pair = Pair(a_machine(HALF))
    assert pair.prefill.begin(PROMPT, 0.0) == (0.0, pytest.approx(0.1))
    assert pair.decode.begin(DECODE, 0.0) == (0.0, pytest.approx(0.02))
    assert pair.ends["prefill-0"] == pytest.approx(0.2)


def test_it_is_slowed_only_while_the_neighbour_computes() -> None:
    """40 ms alone, then 20 ms beside two decode steps at half its pace, then alone again."""
    pair = Pair(a_machine(HALF))
    pair.prefill.begin(PROMPT, 0.0)
    pair.clock.now = 0.04
    _, end_s = pair.decode.begin(DECODE, 0.04)
    assert pair.ends["prefill-0"] == pytest.approx(0.16)
    pair.clock.now = end_s
    pair.decode.end()
    pair.decode.rest()
    assert pair.ends["prefill-0"] == pytest.approx(0.04 + 0.02 + (0.06 - 0.01))


def test_a_neighbour_that_goes_on_at_once_changes_nothing() -> None:
    pair = Pair(a_machine(HALF))
    pair.prefill.begin(PROMPT, 0.0)
    _, end_s = pair.decode.begin(DECODE, 0.0)
    pair.ends.clear()
    pair.clock.now = end_s
    pair.decode.end()
    pair.decode.begin(DECODE, end_s)
    pair.decode.rest()
    assert not pair.ends


def test_workers_of_other_hosts_are_no_neighbours() -> None:
    clock, hosts, machine = Clock(), Hosts(seed=0, gap_s=0.0), a_machine(HALF)
    here = hosts.tempo(clock, WorkerId("prefill-0"), machine)
    there = hosts.tempo(clock, WorkerId("decode-1"), machine)
    assert here is not None
    assert there is not None
    there.begin(DECODE, 0.0)
    assert here.begin(PROMPT, 0.0) == (0.0, pytest.approx(0.1))


MESSAGES = {"prompt": Lost(per_message_s=0.003, beside_decode=0.5)}


def test_a_message_makes_the_step_that_runs_longer_and_no_other() -> None:
    pair = Pair(a_machine(MESSAGES))
    pair.prefill.heard()
    assert pair.prefill.begin(PROMPT, 0.0) == (0.0, pytest.approx(0.1))
    pair.clock.now = 0.05
    pair.prefill.heard()
    pair.prefill.heard()
    assert pair.ends["prefill-0"] == pytest.approx(0.106)
    pair.prefill.end()
    pair.ends.clear()
    pair.prefill.heard()
    pair.decode.begin(DECODE, 0.05)
    pair.decode.heard()
    assert not pair.ends


def test_a_message_is_worked_on_at_the_pace_that_neighbours_leave() -> None:
    pair = Pair(a_machine(MESSAGES))
    pair.prefill.begin(PROMPT, 0.0)
    pair.decode.begin(DECODE, 0.0)
    pair.clock.now = 0.005
    pair.prefill.heard()
    assert pair.ends["prefill-0"] == pytest.approx(0.2 + 0.006)


def test_tokens_that_a_neighbour_draws_take_time_from_the_step_beside_it() -> None:
    pair = Pair(a_machine({"prompt": Lost(per_token_s=0.001), "decode": Lost()}))
    pair.prefill.begin(PROMPT, 0.0)
    pair.decode.begin(StepShape(0, 0, 7, 700), 0.0)
    pair.clock.now = 0.01
    pair.decode.end()
    assert pair.ends == {"prefill-0": pytest.approx(0.107)}
    pair.ends.clear()
    pair.clock.now = 0.107
    pair.prefill.end()
    pair.decode.begin(DECODE, 0.107)
    pair.decode.end()
    assert not pair.ends


def test_the_gap_before_a_step_is_that_of_its_kind_beside_what_computes() -> None:
    pair = Pair(a_machine(gaps={"prompt": Gap(alone_s=0.001, beside_s=0.004)}))
    begun_s, end_s = pair.prefill.begin(PROMPT, 1.0)
    assert (begun_s, end_s) == (pytest.approx(1.001), pytest.approx(1.101))
    pair.prefill.end()
    assert pair.decode.begin(DECODE, 2.0)[0] == 2.0
    assert pair.prefill.begin(PROMPT, 2.0)[0] == pytest.approx(2.004)


def a_spread(memory: float) -> Spread:
    return Spread(quantiles=tuple(0.5 + level for level in LEVELS), memory=memory)


def times(memory: float, seed: int = 0, count: int = 4000) -> list[float]:
    hosts = Hosts(seed, gap_s=0.0)
    machine = a_machine(spreads={"decode": a_spread(memory)})
    tempo = hosts.tempo(Clock(), WorkerId("decode-0"), machine)
    assert tempo is not None
    found = []
    for _ in range(count):
        begun_s, end_s = tempo.begin(DECODE, 0.0)
        found.append(end_s - begun_s)
        tempo.end()
    return found


def test_steps_stray_as_they_were_measured_to_and_the_same_seed_strays_the_same() -> None:
    drawn = times(0.0)
    assert fmean(drawn) == pytest.approx(0.01, rel=0.02)
    assert sorted(drawn)[len(drawn) // 10] == pytest.approx(0.006, rel=0.05)
    assert sorted(drawn)[-len(drawn) // 10] == pytest.approx(0.014, rel=0.05)
    assert times(0.0) == drawn
    assert times(0.0, seed=1) != drawn


def test_slow_spells_last_as_long_as_they_did() -> None:
    def of_means(drawn: list[float]) -> float:
        return pstdev(fmean(drawn[i : i + 20]) for i in range(0, len(drawn), 20))

    assert of_means(times(0.9)) > 2.5 * of_means(times(0.0))
    assert fmean(times(0.9)) == pytest.approx(0.01, rel=0.06)


class Ends(Observer):
    def __init__(self) -> None:
        self.requests: list[Ended] = []

    def ended(self, at_s: float, request: Ended) -> None:
        self.requests.append(request)


@pytest.fixture
def simulated() -> Callable[..., list[Ended]]:
    """Of twenty requests on a prefill and a decode worker of this machine."""

    def run(machine: MachineModel, seed: int = 0) -> list[Ended]:
        cluster = parse_cluster("1xhere:prefill,1xhere:decode")
        settings = SimSettings(cluster=cluster, machines=(machine, machine), seed=seed)
        requests = (
            TraceRequest(index=i, at_s=0.12 * i, segments=(own_segment(i, 100),), output_tokens=30)
            for i in range(20)
        )
        ends = Ends()
        Simulation(settings, requests, [ends]).run()
        return ends.requests

    return run


def test_a_simulation_without_spread_and_neighbours_is_as_without_a_pace(
    simulated: Callable[..., list[Ended]],
) -> None:
    paced = simulated(a_machine())
    plain = simulated(replace(a_machine(), pace=None))
    assert [end.last_s for end in paced] == pytest.approx([end.last_s for end in plain])


def test_a_simulation_with_messages_is_slower_by_what_they_cost(
    simulated: Callable[..., list[Ended]],
) -> None:
    """The decode worker hears of every hand-off while it decodes for another."""
    lost = {"decode": Lost(per_message_s=0.002)}
    with_messages, without = simulated(a_machine(lost)), simulated(a_machine())
    more_s = [
        later.last_s - sooner.last_s
        for later, sooner in zip(with_messages, without, strict=True)
        if later.last_s and sooner.last_s
    ]
    assert len(more_s) == 20
    assert 0.004 < fmean(more_s) < 0.05


def test_a_simulation_with_neighbours_is_slower_and_ends(
    simulated: Callable[..., list[Ended]],
) -> None:
    beside = simulated(a_machine(HALF, {"decode": a_spread(0.5), "prompt": a_spread(0.0)}))
    alone = simulated(a_machine())
    assert len(beside) == len(alone) == 20
    assert fmean(e.last_s - e.arrived_s for e in beside if e.last_s) > 1.1 * fmean(
        e.last_s - e.arrived_s for e in alone if e.last_s
    )
    again = simulated(a_machine(HALF, {"decode": a_spread(0.5), "prompt": a_spread(0.0)}))
    assert [end.last_s for end in again] == [end.last_s for end in beside]
