"""What a simulated worker is: how fast, how large, how it is linked, and what it costs to run.

A `MachineModel` is made of a hardware and a model by one of three ways: from data sheets
(`cost.roofline`), from a table of measurements (`cost.table`), or from what ``pdserve calibrate``
measured of a live engine (`cost.profile`). Who simulates asks nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pdserve.core.step import StepShape
from pdserve.cost.pace import Pace
from pdserve.cost.step import StepModel

DecodeTimes = Callable[[int, range], list[float]]
"""Seconds of each of several steps that decode this number of sequences, of these lengths together.
"""


class StepTimer(Protocol):
    """How long a step takes, by its shape: a `StepModel`, a roofline, a table."""

    def step_s(self, shape: StepShape) -> float:
        """Seconds; 0 for an empty step."""
        ...


def decode_times(timer: StepTimer) -> DecodeTimes:
    """What `StepTimer.step_s` says of such steps, all at once: a timer that has a ``decodes_s`` is
    asked for it, since it says the same in a tenth of the time."""
    own: DecodeTimes | None = getattr(timer, "decodes_s", None)
    return own or (
        lambda number, lengths: [timer.step_s(StepShape(0, 0, number, each)) for each in lengths]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRange:
    """The steps that were measured: at most so many prompt tokens, sequences and tokens of context
    in one. Outside of it a timer extrapolates."""

    prompt_tokens: int
    num_decoding: int
    context_tokens: int

    def holds(self, shape: StepShape) -> bool:
        return (
            shape.prompt_tokens <= self.prompt_tokens
            and shape.num_decoding <= self.num_decoding
            and shape.context_tokens <= self.context_tokens
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """Watts of one worker with all of its devices and its share of the host: without a step, in a
    step that computes prompts, and in one that only decodes."""

    idle_w: float = 0.0
    prompt_w: float = 0.0
    decode_w: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """A worker's end of the network. ``bytes_per_s`` each way, shared by all transfers that use it
    at a time, unless ``shared`` is False; ``fixed_s``: what a transfer costs whatever its size."""

    bytes_per_s: float
    fixed_s: float = 0.0
    shared: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterTimes:
    """What passes beside steps and transfers, in seconds: a message between two nodes on its way
    (``message_s``); from the client's request to the router and from the router's token to the
    client (``edge_in_s``, ``edge_out_s``); from the end of a step to the next one's begin, beside
    what the timer says (``step_gap_s``); the check of what was received: of anything at all
    (``verify_s``) and of a byte (``verify_byte_s``)."""

    message_s: float = 100e-6
    edge_in_s: float = 0.0
    edge_out_s: float = 0.0
    step_gap_s: float = 0.0
    verify_byte_s: float = 0.0
    verify_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineModel:
    """One simulated worker.

    ``name`` as in a cluster's specification (``h100-tp8``). ``model``: the name of what it serves.
    ``linear`` is what the router's policies are told of ``steps``: the nearest model of their form.
    ``layers`` and ``token_kv_bytes`` of the model: KV of one token in all layers, in bytes.
    ``num_blocks`` by the rule of live workers (`kv.capacity`). ``measured`` None: nothing was, it
    is all from data sheets. ``error``: the mean relative error of ``steps``, if it is known.
    ``source`` says where the figures are from. ``pace``: how live steps stray from ``steps``; None:
    they take just that.
    """

    name: str
    model: str
    steps: StepTimer
    linear: StepModel
    num_layers: int
    token_kv_bytes: int
    block_size: int
    num_blocks: int
    max_model_tokens: int
    link: LinkSpec
    power: Power = field(default_factory=Power)
    price_per_hour: float = 0.0
    num_devices: int = 1
    measured: StepRange | None = None
    error: float | None = None
    source: str = ""
    pace: Pace | None = None
