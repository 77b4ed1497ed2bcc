"""What a step computes is sent when it is computed, also where the step's end moves on the way."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from pdserve.core.effects import BindTransfer, Input, OpenTransfer, TransferSent
from pdserve.core.ids import AttemptId, BlockId, Epoch, RequestId, WorkerId
from pdserve.core.messages import Ticket
from pdserve.core.request import Role
from pdserve.core.step import StepShape
from pdserve.cost.machine import LinkSpec, MachineModel
from pdserve.cost.pace import Lost, Pace
from pdserve.cost.step import StepModel
from pdserve.sim.clock import Clock
from pdserve.sim.network import End, Flow, Network
from pdserve.sim.observe import Ended, Observer
from pdserve.sim.settings import SimSettings
from pdserve.sim.simulation import Simulation
from pdserve.sim.spec import parse_cluster
from pdserve.sim.transfers import Transfers
from pdserve.workload.request import TraceRequest, own_segment

pytestmark = pytest.mark.interpreted  # its network remembers
NUM_LAYERS = 4
ATTEMPT = AttemptId(RequestId("r"), Epoch(1))
TO = WorkerId("decode-0")
BLOCKS = tuple(map(BlockId, range(4)))
STEPS = StepModel(
    prompt_base_s=0.0,
    per_prompt_token_s=1e-3,
    per_pair_s=0.0,
    decode_base_s=0.01,
    per_sequence_s=0.0,
    per_context_token_s=0.0,
)


def a_machine(bytes_per_s: float = 1e15) -> MachineModel:
    lost = {"prompt": Lost(beside_decode=0.6), "decode": Lost()}
    return MachineModel(
        name="here",
        model="none",
        steps=STEPS,
        linear=STEPS,
        num_layers=NUM_LAYERS,
        token_kv_bytes=1024,
        block_size=16,
        num_blocks=4096,
        max_model_tokens=8192,
        link=LinkSpec(bytes_per_s=bytes_per_s),
        pace=Pace(spreads={}, lost=lost, per_host={Role.PREFILL: 1, Role.DECODE: 1}),
    )


class Watched(Network):
    """Remembers when bytes could be sent."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.clock = clock
        self.released: list[tuple[float, float]] = []

    def release(self, flow: Flow, num_bytes: float) -> None:
        self.released.append((self.clock.now, num_bytes))
        super().release(flow, num_bytes)


@dataclass
class Sender:
    """A transfer of 64 tokens, bound before its prefill begins."""

    one_shot: bool = False
    clock: Clock = field(default_factory=Clock)
    sent_at_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        machine = a_machine()
        self.network = Watched(self.clock)
        ends: dict[WorkerId, End] = {TO: self.network.end(TO, machine.link)}
        here = self.network.end(WorkerId("prefill-0"), machine.link)
        self.transfers = Transfers(
            self.clock, self.network, here, machine, ends.get, self.hear, lambda *_: None,
            ends_move=True,
        )  # fmt: skip
        self.transfers.open(
            OpenTransfer(
                attempt=ATTEMPT, peer=TO, block_ids=BLOCKS, cached_blocks=0, one_shot=self.one_shot
            )
        )
        ticket = Ticket(attempt=ATTEMPT, first_block=0, block_ids=BLOCKS, lease_s=60.0)
        self.transfers.bind(BindTransfer(ticket, TO, Epoch(1)))

    def hear(self, event: Input) -> None:
        assert isinstance(event, TransferSent)
        self.sent_at_s.append(self.clock.now)

    def run(self) -> None:
        self.clock.run()


def moves_of(draw: random.Random, begun_s: float, work_s: float) -> tuple[list[float], float]:
    """Of a step that begins then and has so much to do at full pace: when it begins and is said to
    end, then, over and over, when its pace changes and its new end; and when a layer is done."""
    rate, done_s, now = draw.uniform(0.2, 1.0), 0.0, begun_s
    plan = [begun_s, begun_s + work_s / rate]
    layer_s = work_s / NUM_LAYERS
    first_s = begun_s + layer_s / rate
    for _ in range(draw.randrange(6)):
        at_s = now + draw.uniform(0.0, 0.9) * (work_s - done_s) / rate
        done_s += (at_s - now) * rate
        now, rate = at_s, draw.uniform(0.2, 1.0)
        if done_s < layer_s:
            first_s = now + (layer_s - done_s) / rate
        plan += [now, now + (work_s - done_s) / rate]
    return plan, first_s


@pytest.mark.parametrize("one_shot", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_layers_are_sent_when_they_are_computed_wherever_the_end_moves(
    seed: int, one_shot: bool
) -> None:
    """Two chunks of a prompt. Each layer-wise one can be sent once its first layer is computed, and
    all is sent when the last step is over, at its last end and no other."""
    draw = random.Random(seed)
    sender = Sender(one_shot)
    firsts, begun_s = [], 0.0
    for chunk in (1, 2):
        plan, first_s = moves_of(draw, begun_s + 0.01, draw.uniform(0.1, 1.0))
        firsts.append(first_s)
        computes = sender.transfers.computes
        sender.clock.at(
            begun_s,
            lambda plan=plan, chunk=chunk, computes=computes: computes(
                ATTEMPT, 32 * chunk, plan[0], plan[1], last=chunk == 2
            ),
        )
        for at_s, end_s in zip(plan[2::2], plan[3::2], strict=True):
            sender.clock.at(at_s, sender.transfers.moved, end_s)
        begun_s = plan[-1]
    sender.run()
    assert sender.sent_at_s == [pytest.approx(begun_s)]
    times = [at_s for at_s, _ in sender.network.released]
    assert times == pytest.approx([begun_s] if one_shot else firsts)
    assert sum(num_bytes for _, num_bytes in sender.network.released) == 64 * 1024


def test_a_move_of_a_step_that_computes_nothing_to_be_sent_moves_nothing() -> None:
    sender = Sender()
    sender.transfers.moved(5.0)
    sender.transfers.computes(ATTEMPT, 64, 0.0, 1.0, last=True)
    sender.clock.at(1.5, sender.transfers.moved, 9.0)
    sender.run()
    assert sender.sent_at_s == [pytest.approx(1.0)]


def test_a_step_that_has_not_begun_moves_as_a_whole() -> None:
    """Between two steps there is a pause, in which the end may move already."""
    sender = Sender()
    sender.transfers.computes(ATTEMPT, 64, 0.5, 1.5, last=True)
    sender.clock.at(0.2, sender.transfers.moved, 2.5)
    sender.run()
    assert sender.network.released[0][0] == pytest.approx(0.5 + 2.0 / NUM_LAYERS)
    assert sender.sent_at_s == [pytest.approx(2.5)]


def test_a_transfer_that_was_stopped_is_not_sent_by_a_step_that_moves() -> None:
    sender = Sender()
    sender.transfers.computes(ATTEMPT, 64, 0.0, 1.0, last=True)
    sender.transfers.stop_all()
    sender.transfers.moved(2.0)
    sender.run()
    assert sender.sent_at_s == sender.network.released == []


class Watch(Observer):
    """When prompts were computed, when transfers were over, and how it went for each request."""

    def __init__(self) -> None:
        self.requests: list[Ended] = []
        self.computed_s: list[float] = []
        self.sent_s: list[float] = []

    def ended(self, at_s: float, request: Ended) -> None:
        self.requests.append(request)

    def steps(
        self, worker: WorkerId, begun_s: float, ended_s: float, shape: StepShape, count: int
    ) -> None:
        if shape.prompt_tokens:
            self.computed_s.append(ended_s)

    def sent(
        self, sender: WorkerId, receiver: WorkerId, num_bytes: int, begun_s: float, ended_s: float
    ) -> None:
        self.sent_s.append(ended_s)


def test_no_hand_off_is_over_before_its_prompt_is_computed() -> None:
    """Prompts of 0.1 s alone, one at a time, beside a neighbour that decodes now and then and takes
    more than half of their pace."""
    machine = a_machine(1e12)
    cluster = parse_cluster("1xhere:prefill,1xhere:decode")
    settings = SimSettings(cluster=cluster, machines=(machine, machine))
    requests = (
        TraceRequest(index=i, at_s=0.3 * i, segments=(own_segment(i, 100),), output_tokens=30)
        for i in range(20)
    )
    watch = Watch()
    Simulation(settings, requests, [watch]).run()
    assert len(watch.sent_s) == len(watch.computed_s) == 20
    for computed_s, sent_s in zip(watch.computed_s, watch.sent_s, strict=True):
        assert computed_s <= sent_s < computed_s + 0.001
    prefills_s = [each.ttft_s for each in watch.requests if each.ttft_s is not None]
    assert max(prefills_s) > 1.2 * min(prefills_s)
