"""What steps and transfers should take, before any was seen.

The roofline of the model on the worker's device (`cost.roofline_timer`), as the nearest `StepModel`
so that the fits can go on from there. It is meant to be right within a factor of a few, and above
all in its proportions: the fits correct its level after a few steps.
"""

from __future__ import annotations

from dataclasses import replace

from pdserve.cost.hardware import HARDWARE, Hardware
from pdserve.cost.link import LinkModel
from pdserve.cost.links import LINKS
from pdserve.cost.models import MODELS
from pdserve.cost.roofline_timer import RUNTIMES, RooflineTimer, nearest
from pdserve.cost.shape import ModelShape
from pdserve.cost.step import StepModel

DEFAULT_SHAPE = MODELS["smollm2-135m"].shape
"""Of a server that was not told its model: the one that ``pdserve serve`` has by default."""
POOL_TOKENS = 1 << 17
"""Context of the largest decode step that the prior is fitted to."""
READING_CORES = 8
"""So many cores draw all that a memory gives."""

TRANSPORTS = {
    "shm": ("shm", 0.9),
    "inproc": ("shm", 0.9),
    "tcp": ("tcp-loopback", 0.9),
    "rdma": ("ib-400", 0.95),
}
"""The link of `cost.links` that a transport of a live server most likely has, and the share of a
prefill's time that can be used for sending."""


def device_of(kind: str, num_cores: int = 1) -> Hardware:
    """The device of that kind (its name holds one of ours); of a CPU, ``num_cores`` together, whose
    memory rate grows to that of 8. An unknown one counts as an A100 if it is a GPU by name."""
    name = kind.lower()
    for known in sorted(HARDWARE, key=len, reverse=True):
        if known in name and not known.startswith("cpu"):
            return HARDWARE[known]
    if "cuda" in name or "nvidia" in name:
        return HARDWARE["a100"]
    core = HARDWARE["cpu"]
    return replace(
        core,
        flops=core.flops * num_cores,
        bytes_per_s=core.bytes_per_s * min(num_cores, READING_CORES),
    )


def step_prior(shape: ModelShape, device: Hardware) -> StepModel:
    """The step model of a model on a device."""
    return nearest(RooflineTimer(shape, device, 1, RUNTIMES[device.runtime]), POOL_TOKENS)


def link_prior(transport: str) -> LinkModel:
    """The link model of a transport; one that is not known counts as TCP."""
    name, hidden_share = TRANSPORTS.get(transport, TRANSPORTS["tcp"])
    link = LINKS[name].of_worker(1)
    return LinkModel(
        fixed_s=link.fixed_s, per_byte_s=1.0 / link.bytes_per_s, hidden_share=hidden_share
    )
