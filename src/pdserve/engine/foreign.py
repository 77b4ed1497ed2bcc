"""The compute seam above batching: an engine that decides for itself what each step computes.

A `ModelRunner` is told every row of every step. An `Engine` is told attempts, and gives tokens when
it has some; queues, batches and KV are its own. So none of our batch policies applies to it, nobody
can write into its KV layer by layer, and a hand-off carries what only an engine of the same kind
can read. `Capabilities` says so, and the router needs to know nothing of it.

The life of an attempt in an engine: it is submitted, for the whole answer or only for its first
tokens. In the second case the engine holds what it has computed until the attempt is aborted; it
may be exported meanwhile. An engine elsewhere adopts the export and goes on. An attempt is gone
when its last choice has ended or when it is aborted, whichever comes first.

All calls come from one thread, the engine thread. `Engine.step` may take as long as a step takes,
`export` and `adopt` as long as it takes to copy a payload; the others return at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pdserve.core.engine_work import EngineLoad, EngineOutput, EnginePhase, EngineWork
from pdserve.core.ids import AttemptId
from pdserve.core.messages import TokenDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a worker can do with its engine, and which policies apply to it.

    ``batch_policies``: names of the batch policies that it follows; none if it batches for itself.
    ``layer_wise_push``: peers can be sent each layer while later ones compute.
    ``payload_format``: what the bytes of its hand-offs are; only an engine of the same format and
    weights reads them. ``recomputes_first_token``: after an adoption it draws the token again that
    the prefill worker has drawn already.
    """

    batch_policies: tuple[str, ...] = ()
    layer_wise_push: bool = False
    payload_format: str
    recomputes_first_token: bool = False

    @property
    def opaque_payload(self) -> bool:
        """True if its hand-offs carry a payload in place of blocks."""
        return bool(self.payload_format)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a loaded engine is. ``device`` as torch names it; ``capacity_tokens`` is the KV that it
    can hold, at least one sequence of ``max_model_tokens``."""

    engine: str
    device: str
    numerics: str
    weights_digest: str
    vocab_size: int
    max_model_tokens: int
    capacity_tokens: int
    capabilities: Capabilities


class Engine(ABC):
    """Owns weights, KV and batches.

    An exception that a method does not name means that the engine is broken: it is closed, its
    process ends, and every attempt in it is resumed elsewhere.
    """

    info: EngineInfo

    @abstractmethod
    def submit(self, work: EngineWork, phase: EnginePhase) -> None:
        """Queue an attempt. Raises `ContextLengthError` if it can never run."""

    @abstractmethod
    def adopt(self, work: EngineWork, first_tokens: tuple[TokenDelta, ...], payload: bytes) -> None:
        """Queue an attempt that another engine has prefilled, and exported as ``payload``.

        ``first_tokens`` holds the token of index ``work.next_index`` of each of ``work.choices``.
        The engine goes on with the tokens after those; one that ``recomputes_first_token`` ignores
        them, draws them itself, and reports these like any other. Raises `PayloadError`, and holds
        nothing of the attempt then, if the payload is damaged, of another format or of other
        weights or tokens.
        """

    @abstractmethod
    def export(self, attempt: AttemptId) -> bytes:
        """What was computed in phase ``PREFILL``, for an adoption. The attempt stays.

        Raises `PayloadError` if the engine does not hold the attempt or cannot read its KV.
        """

    @abstractmethod
    def abort(self, attempt: AttemptId, choices: tuple[int, ...] | None = None) -> None:
        """Let go of these choices (None: of the attempt) and of their memory, known or not.

        No later output speaks of them.
        """

    @abstractmethod
    def step(self) -> EngineOutput | None:
        """Run one iteration. None if nothing can be computed before another call changes that."""

    @abstractmethod
    def load(self) -> EngineLoad:
        """Memory and counters, as of now."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything. May be called again; nothing else may follow it."""
