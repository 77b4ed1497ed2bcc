"""Everything that a simulation depends on, beside its requests and its observers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pdserve.core.request import DEFAULT_SERVICE, Request, ServiceClass
from pdserve.cost.machine import ClusterTimes, MachineModel
from pdserve.node.settings import ReturnRule, RoleControl
from pdserve.policy.batch import BatchPolicy
from pdserve.policy.cluster import RoutePolicy
from pdserve.policy.registry import DEFAULT_POLICY
from pdserve.sim.spec import ClusterSpec, Group
from pdserve.workload.request import TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class SimSettings:
    """``machines``: the model of each group's workers, in order. ``policy`` and ``batching`` as
    the command line has them; ``make_policy`` and ``make_batching`` instead, where no name says it.

    ``declared_tokens``: the ``max_tokens`` that clients ask for; answers end by themselves, as long
    as the trace says, and no policy knows how long. None: they ask for exactly what they get (as
    load clients do that replay a trace).
    ``service``: the class of every request, unless ``service_of`` says which one each has.
    ``request_of``: the requests themselves, if they are not made of the trace's lengths.
    ``learns``: the router fits its step and link models to what it sees, as live; if not, it is
    told the `MachineModel.linear` of each worker from the start.
    ``stretches``: decode steps that are alike pass in one go; the result is the same.
    ``load_s``: from the start of a process to the moment at which it can serve.
    ``oracle``: requests say how long their answers will be, to a policy that asks.
    ``terse_reports``, ``late_handoffs``, ``ask_again_s``, ``ticket_timeout_s``, ``lease_s``:
    see `WorkerSettings`; ``return_rule``, ``moves``: see `RouterSettings`.
    """

    cluster: ClusterSpec
    machines: tuple[MachineModel, ...]
    times: ClusterTimes = field(default_factory=ClusterTimes)
    policy: str = DEFAULT_POLICY
    batching: str = ""
    make_policy: Callable[[], RoutePolicy] | None = None
    make_batching: Callable[[], BatchPolicy] | None = None
    service: ServiceClass = DEFAULT_SERVICE
    service_of: Callable[[TraceRequest], ServiceClass] | None = None
    request_of: Callable[[TraceRequest], Request] | None = None
    roles: RoleControl = RoleControl.FIXED
    admission: str = "none"
    declared_tokens: int | None = 4096
    learns: bool = False
    max_step_tokens: int = 2048
    mixed_chunk_tokens: int = 512
    max_running: int = 256
    one_shot_tokens: int = 512
    prefix_cache: bool = True
    queue_timeout_s: float = 30.0
    max_queued_requests: int = 1024
    heartbeat_s: float = 5.0
    report_interval_s: float = 0.01
    sample_interval_s: float = 1.0
    load_s: float = 5.0
    stretches: bool = True
    oracle: bool = False
    terse_reports: bool = False
    late_handoffs: bool = False
    ask_again_s: float = 0.0
    ticket_timeout_s: float = 10.0
    lease_s: float = 10.0
    return_rule: ReturnRule = ReturnRule.DONE
    moves: bool = True
    seed: int = 0

    def machine(self, group: Group) -> MachineModel:
        return self.machines[self.cluster.groups.index(group)]
