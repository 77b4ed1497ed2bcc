"""Small simulated clusters whose times one can work out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from pdserve.core.ids import WorkerId
from pdserve.core.step import StepShape
from pdserve.cost.machine import ClusterTimes, LinkSpec, MachineModel, Power, StepTimer
from pdserve.cost.step import StepModel
from pdserve.sim.observe import Ended, Observer
from pdserve.sim.scenario import ScenarioPlayer
from pdserve.sim.settings import SimSettings
from pdserve.sim.simulation import Simulation
from pdserve.sim.spec import parse_cluster
from pdserve.workload.request import TraceRequest, own_segment
from pdserve.workload.scenario import Event, Scenario

LINEAR = StepModel(
    prompt_base_s=0.004,
    per_prompt_token_s=2e-5,
    per_pair_s=1e-9,
    decode_base_s=0.01,
    per_sequence_s=1e-4,
    per_context_token_s=1e-7,
)
NO_TIME = ClusterTimes(message_s=0.0)


def machine(**changes: Any) -> MachineModel:
    """A worker whose steps take what `LINEAR` says, of 8 layers with 1 KiB of KV a token."""
    made: dict[str, Any] = {
        "name": "m",
        "model": "model",
        "steps": LINEAR,
        "linear": LINEAR,
        "num_layers": 8,
        "token_kv_bytes": 1024,
        "block_size": 16,
        "num_blocks": 4096,
        "max_model_tokens": 32768,
        "link": LinkSpec(bytes_per_s=1e8),
        "power": Power(idle_w=100.0, prompt_w=400.0, decode_w=300.0),
    }
    return MachineModel(**{**made, **changes})


@dataclass(frozen=True)
class Step:
    worker: WorkerId
    begun_s: float
    ended_s: float
    shape: StepShape
    count: int


@dataclass(frozen=True)
class Sent:
    sender: WorkerId
    receiver: WorkerId
    num_bytes: int
    begun_s: float
    ended_s: float


@dataclass
class Run(Observer):
    """A finished simulation and all that it said."""

    requests: dict[int, Ended] = field(default_factory=dict)
    all_steps: list[Step] = field(default_factory=list)
    transfers: list[Sent] = field(default_factory=list)
    all_gaps: list[tuple[float, int]] = field(default_factory=list)
    lives: list[Any] = field(default_factory=list)
    arrivals: int = 0
    done_s: float = 0.0
    simulation: Any = None
    score: dict[str, Any] = field(default_factory=dict)

    def arrived(self, at_s: float, request_id: Any, prompt_tokens: int) -> None:
        self.arrivals += 1

    def ended(self, at_s: float, request: Ended) -> None:
        assert request.index not in self.requests, "one end each"
        self.requests[request.index] = request

    def gaps(self, gaps_s: Sequence[float], count: int) -> None:
        self.all_gaps += [(gap_s, count) for gap_s in gaps_s]

    def steps(
        self, worker: WorkerId, begun_s: float, ended_s: float, shape: StepShape, count: int
    ) -> None:
        self.all_steps.append(Step(worker, begun_s, ended_s, shape, count))

    def sent(
        self, sender: WorkerId, receiver: WorkerId, num_bytes: int, begun_s: float, ended_s: float
    ) -> None:
        self.transfers.append(Sent(sender, receiver, num_bytes, begun_s, ended_s))

    def life(self, event: Any) -> None:
        self.lives.append(event)

    def done(self, at_s: float) -> None:
        self.done_s = at_s

    @property
    def in_order(self) -> list[Ended]:
        return [self.requests[index] for index in sorted(self.requests)]


@dataclass(frozen=True)
class Lab:
    """Makes machines and runs. ``requests``: (arrival, prompt tokens, output tokens)."""

    machine: Callable[..., MachineModel] = machine
    no_time: ClusterTimes = NO_TIME
    linear: StepModel = LINEAR

    def requests(self, *rows: tuple[float, int, int]) -> list[TraceRequest]:
        return [
            TraceRequest(
                index=index, at_s=at_s, segments=(own_segment(index, prompt),), output_tokens=output
            )
            for index, (at_s, prompt, output) in enumerate(rows)
        ]

    def settings(
        self, cluster: str, machines: MachineModel | Sequence[MachineModel], **changes: Any
    ) -> SimSettings:
        spec = parse_cluster(cluster)
        if isinstance(machines, MachineModel):
            machines = [machines] * len(spec.groups)
        made: dict[str, Any] = {
            "times": NO_TIME,
            "declared_tokens": None,
            "max_step_tokens": 1 << 20,
            "max_running": 256,
            "prefix_cache": False,
            "queue_timeout_s": 1e9,
            "max_queued_requests": 1 << 30,
            "policy": "shortest_queue",
        }
        return SimSettings(cluster=spec, machines=tuple(machines), **{**made, **changes})

    def run(
        self,
        settings: SimSettings,
        requests: Iterable[TraceRequest],
        events: Sequence[Event] = (),
        seed: int = 0,
        observers: Sequence[Observer] = (),
    ) -> Run:
        """``events``: what goes wrong; its score is in ``score`` then."""
        heard = Run()
        player = ScenarioPlayer(Scenario(name="test", events=tuple(events), seed=seed), None)
        heard.simulation = Simulation(settings, iter(requests), [heard, player, *observers])
        player.begin(heard.simulation)
        heard.simulation.run()
        heard.score = player.document
        return heard


@dataclass(frozen=True)
class TakesItsTokens(StepTimer):
    """A step takes ``unit_s`` for each of its prompt tokens, and no time to decode."""

    unit_s: float

    def step_s(self, shape: StepShape) -> float:
        return self.unit_s * shape.prompt_tokens


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()


@pytest.fixture(scope="session")
def token_timer() -> Callable[[float], StepTimer]:
    return TakesItsTokens
