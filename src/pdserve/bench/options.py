"""What a run is asked to be, as one frozen value. The command line fills it; so can a program."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pdserve.workload.slo import Slo

DEFAULT_URL = "http://127.0.0.1:8000"
ROUTES = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """Whom to ask, and how. ``model`` None: the first that the server names.

    ``prompt`` is ``ids`` or ``words``; ``extra_body`` goes over the fields of each request's body.
    """

    url: str = DEFAULT_URL
    endpoint: str = "completions"
    model: str | None = None
    api_key: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    prompt: str = "ids"
    vocab_size: int = 16000
    temperature: float = 0.0
    ignore_eos: bool = True
    return_token_ids: bool = False
    extra_body: dict[str, object] = field(default_factory=dict)
    timeout_s: float = 600.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What to send, and when. None: not asked for; ``plan`` says what follows."""

    trace: Path | None = None
    trace_kind: str | None = None
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
    burstiness: float | None = None
    concurrency: int | None = None
    num_requests: int | None = None
    duration_s: float | None = None
    warmup: int = 0
    cancel_rate: float = 0.0
    cancel_after_s: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """Where the figures go. ``json`` is a file, or ``-`` for stdout."""

    slo: Slo | None = None
    json: str | None = None
    with_requests: bool = False
    plot: Path | None = None
    progress: bool = True
