"""What a run is asked to be, as one frozen value. The command line fills it; so can a program."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pdserve.workload.options import WorkloadOptions
from pdserve.workload.slo import Slo

DEFAULT_URL = "http://127.0.0.1:8000"
ROUTES = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """Whom to ask, and how. ``model`` None: the first that the server names.

    ``prompt`` is ``ids`` or ``words``; ``extra_body`` goes over the fields of each request's body.
    ``digests``: remember what was answered.
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
    digests: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions(WorkloadOptions):
    """What to send, and when. ``warmup`` other requests go first; at most ``concurrency`` are in
    flight (None: no bound)."""

    concurrency: int | None = None
    warmup: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """Where the figures go. ``json`` is a file, or ``-`` for stdout."""

    slo: Slo | None = None
    json: str | None = None
    with_requests: bool = False
    plot: Path | None = None
    progress: bool = True
