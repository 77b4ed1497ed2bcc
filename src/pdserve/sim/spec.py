"""What cluster is simulated, as one writes it.

``COUNTxHARDWARE:ROLE[@LINK]``, and commas between: ``25xh100:prefill,15xh100:decode``. The hardware
is a machine that the catalogue or a profile knows by that name; the role is ``prefill``, ``decode``
or ``mixed``; the link is a name of the catalogue's (``ib-400``) and may be left out. Workers are
named as live ones are: ``prefill-0``, ``decode-0``, counted within their role.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.core.errors import ConfigError
from pdserve.core.ids import WorkerId
from pdserve.core.request import Role

_GROUP = re.compile(r"(\d+)x([A-Za-z0-9][\w.+-]*):([a-z]+)(?:@([\w.+-]+))?")
MOST_WORKERS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Workers that are alike. ``link`` empty: what comes with the hardware."""

    count: int
    hardware: str
    role: Role
    link: str = ""

    def __str__(self) -> str:
        link = f"@{self.link}" if self.link else ""
        return f"{self.count}x{self.hardware}:{self.role}{link}"


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """Groups in the order given; at least one worker."""

    groups: tuple[Group, ...]

    @property
    def num_workers(self) -> int:
        return sum(group.count for group in self.groups)

    def slots(self) -> list[tuple[WorkerId, Group]]:
        """Every worker's id, with its group."""
        numbers: Counter[Role] = Counter()
        found = []
        for group in self.groups:
            for _ in range(group.count):
                found.append((WorkerId(f"{group.role}-{numbers[group.role]}"), group))
                numbers[group.role] += 1
        return found

    def __str__(self) -> str:
        return ",".join(map(str, self.groups))


def parse_cluster(written: str | Sequence[str]) -> ClusterSpec:
    """Raises `ConfigError` that shows the part that cannot be read, and how it is written."""
    parts = written.split(",") if isinstance(written, str) else list(written)
    groups = tuple(_group(part.strip()) for part in parts if part.strip())
    groups = tuple(group for group in groups if group.count)
    if not groups:
        raise ConfigError("a cluster needs a worker: write it as 2xh100:prefill,1xh100:decode")
    spec = ClusterSpec(groups)
    if spec.num_workers > MOST_WORKERS:
        raise ConfigError(
            f"the cluster has {spec.num_workers} workers: at most {MOST_WORKERS} can be simulated"
        )
    roles = {group.role for group in groups}
    if roles == {Role.PREFILL} or roles == {Role.DECODE}:
        missing = "decode" if Role.PREFILL in roles else "prefill"
        raise ConfigError(
            f"the cluster {spec} has no worker that could {missing}: add {missing} or mixed ones"
        )
    return spec


def _group(part: str) -> Group:
    match = _GROUP.fullmatch(part)
    if match is None or match[3] not in set(Role):
        raise ConfigError(
            f"cannot read {part!r} of the cluster: write COUNTxHARDWARE:ROLE[@LINK], such as "
            "25xh100:prefill or 4xa100:mixed@ib-200; roles are prefill, decode and mixed"
        )
    return Group(count=int(match[1]), hardware=match[2], role=Role(match[3]), link=match[4] or "")
