"""Identifiers. Each is a NewType, so that a block is never passed where a worker is expected."""

from __future__ import annotations

from typing import NamedTuple, NewType

RequestId = NewType("RequestId", str)
"""One prompt with its parameters, whatever number of choices it asks for."""

WorkerId = NewType("WorkerId", str)
"""Stable name of a worker slot, such as ``prefill-0``; it survives restarts of the process."""

Epoch = NewType("Epoch", int)
"""Number of an attempt within its request, or of a process within its worker slot. Only grows."""

BlockId = NewType("BlockId", int)
"""Index of a block in one worker's KV pool."""

BlockHash = NewType("BlockHash", bytes)
"""16 bytes: chained hash of a full block and of everything before it (see ``kv.hashing``)."""

StepId = NewType("StepId", int)
"""Number of a forward pass on one worker."""

GATEWAY = WorkerId("gateway")
"""The address of the router among the nodes."""


class AttemptId(NamedTuple):
    """One try at one or more choices of a request. Epochs are never reused within a request.

    The key of most tables of the machines: as a tuple it is hashed and compared in 0.1 us, as a
    dataclass in 0.6.
    """

    request_id: RequestId
    epoch: Epoch

    def __str__(self) -> str:
        return f"{self.request_id}#{self.epoch}"
