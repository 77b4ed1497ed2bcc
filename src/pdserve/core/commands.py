"""What operators ask of the router while it runs, and what it says about roles.

Commands are inputs; each gets one `Answer`, at once or when it is done. ``command`` is a number
that the asker chose.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeRole:
    """Put this worker into another pool.

    `Answer` follows with ``command``. With ``expected_epoch`` it is refused unless the worker's
    role epoch is still that one.
    """

    command: int
    worker: WorkerId
    role: Role
    expected_epoch: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainOne:
    """Send the worker nothing new. `Answer` follows when it holds nothing any more; ``restart``:
    then have its process replaced by a new one."""

    command: int
    worker: WorkerId
    restart: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UndrainOne:
    """Let the worker take work again."""

    command: int
    worker: WorkerId


class Refused:
    """Kinds of a refused `Answer`."""

    UNKNOWN_WORKER = "unknown_worker"
    STALE_EPOCH = "stale_epoch"
    CANNOT = "cannot"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """To a command. ``refused`` is one of `Refused`, or None: done."""

    command: int
    refused: str | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleChanged:
    """The worker is in another pool from now on, and why."""

    worker: WorkerId
    role: Role
    role_epoch: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RolesJudged:
    """What the role controller thinks of the pools now. ``applies``: it has just moved a worker;
    if not, ``reason`` says why it holds, or what it would do if it were allowed to."""

    reason: str
    applies: bool


Command = ChangeRole | DrainOne | UndrainOne
