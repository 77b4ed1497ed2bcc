"""What simulated machines are told at their birth: the live settings, of a modelled cluster."""

from __future__ import annotations

from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.request import Role
from pdserve.cost.fit import LinkFit, StepFit
from pdserve.cost.link import LinkModel
from pdserve.cost.machine import MachineModel
from pdserve.cost.store import KnownCosts, SavedLink, SavedSteps, StepKey
from pdserve.node.settings import RouterSettings, WorkerSettings
from pdserve.sim.settings import SimSettings

ENGINE = "simulated"
TRANSPORT = "simulated"
HIDDEN_SHARE = 0.9
"""Of the time of a prefill, what a layer-wise transfer can use; `cost.prior.LINKS` has as much."""


def layout_of(machine: MachineModel) -> KvLayout:
    """A pool whose tokens are as many bytes as the model's: one head of bytes' pairs."""
    return KvLayout(
        num_layers=machine.num_layers,
        num_kv_heads=1,
        head_dim=max(1, machine.token_kv_bytes // (4 * machine.num_layers)),
        block_size=machine.block_size,
        dtype="bf16",
        numerics=machine.name,
        weights_digest=machine.model,
    )


def worker_settings(
    settings: SimSettings,
    worker: WorkerId,
    epoch: Epoch,
    role: Role,
    machine: MachineModel,
    *,
    logs_life: bool = True,
) -> WorkerSettings:
    return WorkerSettings(
        worker=worker,
        epoch=epoch,
        role=role,
        layout=layout_of(machine),
        num_blocks=machine.num_blocks,
        max_model_tokens=machine.max_model_tokens,
        max_step_tokens=settings.max_step_tokens,
        mixed_chunk_tokens=settings.mixed_chunk_tokens,
        max_running=settings.max_running,
        one_shot_tokens=settings.one_shot_tokens,
        prefix_cache=settings.prefix_cache,
        heartbeat_s=settings.heartbeat_s,
        report_interval_s=settings.report_interval_s,
        bare_plans=True,
        terse_reports=settings.terse_reports,
        late_handoffs=settings.late_handoffs,
        ask_again_s=settings.ask_again_s,
        ticket_timeout_s=settings.ticket_timeout_s,
        lease_s=settings.lease_s,
        report_samples=settings.learns,
        logs_life=logs_life,
    )


def router_settings(settings: SimSettings, *, logs_life: bool = True) -> RouterSettings:
    """With what is known of the machines' steps, and of the slowest link."""
    saved = {}
    for machine in settings.machines:
        key = StepKey(
            weights_digest=machine.model,
            engine=ENGINE,
            device=machine.name,
            numerics=machine.name,
        )
        saved[key] = SavedSteps(key, StepFit(machine.linear).state())
    slowest = min(settings.machines, key=lambda machine: machine.link.bytes_per_s).link
    link = LinkModel(
        fixed_s=slowest.fixed_s + 3 * settings.times.message_s,
        per_byte_s=1.0 / slowest.bytes_per_s,
        hidden_share=HIDDEN_SHARE,
    )
    silent_after_s = max(1.5, 3 * settings.heartbeat_s)
    return RouterSettings(
        queue_timeout_s=settings.queue_timeout_s,
        max_queued_requests=settings.max_queued_requests,
        logs_life=logs_life,
        admission=settings.admission,
        roles=settings.roles,
        return_rule=settings.return_rule,
        moves=settings.moves,
        silent_after_s=silent_after_s,
        report_timeout_s=2 * silent_after_s,
        costs=KnownCosts(
            transport=TRANSPORT,
            steps=tuple(saved.values()),
            link=SavedLink(TRANSPORT, LinkFit(link).state()),
        ),
    )
