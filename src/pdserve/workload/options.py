"""What a workload is asked to be, as one frozen value: from a command line, or from a program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdserve.workload.arrivals import RateStep

DRAWS = ("pairs", "sizes")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """What is asked for, and when. None: not said; ``build`` says what follows.

    ``input_tokens`` and ``output_tokens`` as `lengths.length_distribution` reads them. ``draw``
    (one of `DRAWS`): requests are not the trace's own but drawn from it, a prompt with its answer
    or each by itself. ``rates``: the steps of a rate.
    """

    trace: Path | None = None
    trace_kind: str | None = None
    keep_times: bool = False
    draw: str | None = None
    window_s: tuple[float, float] | None = None
    smear: bool | None = None
    rate_scale: float = 1.0
    input_tokens: str = "512"
    output_tokens: str = "128"
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    prefix_groups: int = 0
    prefix_tokens: int = 0
    arrivals: str | None = None
    rate: float | None = None
    rates: tuple[RateStep, ...] = ()
    burstiness: float | None = None
    amplitude: float | None = None
    period_s: float | None = None
    num_requests: int | None = None
    duration_s: float | None = None
    cancel_rate: float = 0.0
    cancel_after_s: float | None = None
    seed: int = 0
