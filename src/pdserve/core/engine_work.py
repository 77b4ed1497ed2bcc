"""What an engine that batches for itself is asked to do, and what it says of it.

The words between a `ForeignWorkerNode`, its driver and an `Engine` (``engine.foreign``). An engine
holds each attempt from its submission (or adoption) until its last choice has ended or it is
aborted; when and with whom it computes is its own business.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pdserve.core.ids import AttemptId
from pdserve.core.messages import TokenDelta
from pdserve.core.request import SamplingParams
from pdserve.core.token_ids import TokenIds


class EnginePhase(StrEnum):
    """How far an engine goes with an attempt."""

    PREFILL = "prefill"
    """Draw the next token of each choice and then hold what was computed, for an export, until the
    attempt is aborted; also if every choice has ended with that token."""
    WHOLE = "whole"
    """Go on to the end of each choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWork:
    """One attempt, as an engine sees it: ``token_ids`` are the prompt and the tokens taken so far,
    which all ``choices`` share. The next token of each choice has index ``next_index``."""

    attempt: AttemptId
    choices: tuple[int, ...]
    token_ids: TokenIds
    num_prompt_tokens: int
    params: SamplingParams
    cache_salt: str = ""
    trace_context: str = ""

    @property
    def next_index(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class EngineStart:
    """The engine has begun to compute the attempt; ``cached_tokens`` of it were there already."""

    attempt: AttemptId
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFailure:
    """The engine has let go of these choices (None: of the attempt) without an answer."""

    attempt: AttemptId
    detail: str
    choices: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOutput:
    """What one iteration of the engine gave; of each choice the tokens are in index order.

    An attempt is in ``started`` once, with its first token at the latest. An adopted one is not.
    """

    started: tuple[EngineStart, ...] = ()
    deltas: tuple[TokenDelta, ...] = ()
    failed: tuple[EngineFailure, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What the engine can say of its memory and its past, whatever it keeps its KV in.

    ``free_tokens``: KV that could be given to new work now, that of adopted attempts taken off even
    if they wait. ``cached_tokens`` of them hold reusable prefixes. The rest only grow.
    """

    free_tokens: int
    cached_tokens: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0


# --- effects of a worker's machine -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineSubmit:
    """Give the attempt to the engine. `EngineStepped` says what comes of it."""

    work: EngineWork
    phase: EnginePhase


@dataclass(frozen=True, slots=True)
class EngineAbort:
    """Forget these choices (None: the attempt), known or not. `EngineAborted` answers."""

    attempt: AttemptId
    choices: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class EngineExport:
    """Turn what was computed in phase ``PREFILL`` into bytes. `EngineExported` answers, or
    `EngineFailed`."""

    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class EngineAdopt:
    """Check the payload against the digest, and let the engine continue from it after
    ``first_tokens``, one for each of the work's choices. `EngineAdopted` answers."""

    work: EngineWork
    first_tokens: tuple[TokenDelta, ...]
    payload: bytes
    digest: bytes


# --- inputs of a worker's machine --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineStepped:
    """The engine went through one iteration, also if it has nothing to show for it."""

    output: EngineOutput
    load: EngineLoad
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine refused `EngineSubmit` or `EngineExport`, or has lost the attempt."""

    attempt: AttemptId
    detail: str
    load: EngineLoad


@dataclass(frozen=True, slots=True)
class EngineExported:
    """Answer to `EngineExport`: the payload and its digest."""

    attempt: AttemptId
    payload: bytes
    digest: bytes
    load: EngineLoad


@dataclass(frozen=True, slots=True)
class EngineAdopted:
    """Answer to `EngineAdopt`. ``detail`` is None if digest and payload are right."""

    attempt: AttemptId
    detail: str | None
    load: EngineLoad


@dataclass(frozen=True, slots=True)
class EngineAborted:
    """Answer to `EngineAbort`: the engine holds nothing of these choices (None: the attempt)."""

    attempt: AttemptId
    choices: tuple[int, ...] | None
    load: EngineLoad
