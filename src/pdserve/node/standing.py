"""What the router wants of a worker now, as the worker itself knows it.

Shared by the parts of one worker's machine; only `WorkerMachine` writes it, as the router says.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.messages import SetRole
from pdserve.core.request import Role


@dataclass(slots=True)
class Standing:
    """``role``: the home role until a `SetRole` comes; ``role_epoch``: the number of that one."""

    role: Role
    role_epoch: int = 0
    draining: bool = False

    def take_role(self, message: SetRole) -> bool:
        """False, and nothing is changed, if the message is older than what is known."""
        if message.role_epoch <= self.role_epoch:
            return False
        self.role, self.role_epoch = message.role, message.role_epoch
        return True
