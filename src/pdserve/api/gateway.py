"""What the HTTP edge needs from the server behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pdserve.core.commands import Command
from pdserve.core.events import LifeEvent
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.messages import TokenDelta
from pdserve.core.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The served model. ``eos_token_ids`` end a choice unless the client says ``ignore_eos``.
    ``constrains``: its engine can hold an answer to a form."""

    name: str
    max_model_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    created: int
    constrains: bool = True


class FaultHooks(Protocol):
    """What a server that allows it lets be done to its cluster. Names that it does not know raise
    `NotFoundError`."""

    def disturb(
        self,
        pairs: Sequence[tuple[WorkerId, WorkerId]],
        factor: float | None,
        for_s: float | None,
    ) -> None:
        """Cut links (``factor`` None), or make them slower; ``for_s`` None: until `heal`."""
        ...

    def hold(self, worker: WorkerId, for_s: float | None) -> None:
        """When the worker's process ends, start another only after so long."""
        ...

    def heal(self) -> None:
        """End all of it."""
        ...

    def shown(self) -> list[dict[str, Any]]:
        """The links that are disturbed now, as JSON."""
        ...


class Gateway(Protocol):
    """The server, as the HTTP edge sees it. One event loop; no call blocks.

    Errors of `stream` are those of ``core.errors``: `OverloadedError` and `UnavailableError` before
    the first token, `GenerationError` after it.
    """

    card: ModelCard
    faults: FaultHooks | None
    """None if the server takes no faults."""

    def submit(self, request: Request) -> AsyncIterator[TokenDelta]:
        """Start the request and yield its tokens, all choices interleaved, each in index order.

        Closing the iterator (or cancelling the task that reads it) aborts what is still running.
        A choice that has finished or was stopped is not running: the reader closes the iterator
        as soon as none is left, without waiting for its end, and that is no abort.
        """
        ...

    def stop_choice(self, request_id: RequestId, choice: int) -> None:
        """A stop string ended this choice: no more of its tokens are wanted (nor yielded)."""
        ...

    def cluster(self) -> Mapping[str, Any]:
        """JSON document of ``/cluster``."""
        ...

    def traffic(self) -> Mapping[str, Any]:
        """JSON document of ``/cluster/traffic``."""
        ...

    async def command(self, asked: Command) -> str:
        """Have the router do this, and wait until it is done: what has come of it, in words.

        The command's number is the gateway's to give. Raises `NotFoundError` for an unknown worker
        and `ConflictError` if the worker's state does not allow it. A drain goes on if nobody waits
        for it any more.
        """
        ...

    def timeline(self, request_id: RequestId) -> tuple[LifeEvent, ...] | None:
        """Life events of a recent request, oldest first; None if unknown or forgotten."""
        ...

    def is_ready(self) -> bool:
        """True if a new request would find workers."""
        ...

    def metrics_text(self) -> bytes:
        """Prometheus exposition."""
        ...
