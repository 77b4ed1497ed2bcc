"""Worker processes of this host, as somebody sees them who wants to do them harm.

A process id comes from a server's ``/cluster``, which may be on another host, or out of date: a
process is only touched if its command line is that of a pdserve worker.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from pdserve.core.errors import ConfigError
from pdserve.core.ids import WorkerId


def check_worker_process(worker: WorkerId, pid: int) -> None:
    """Raises `ConfigError` if it is none of this host's workers, or not one that may be touched."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        is_worker = b"worker" in words and any(b"pdserve" in word for word in words)
        os.kill(pid, 0)
    except PermissionError as error:
        raise ConfigError(
            f"process {pid} of {worker} belongs to somebody else: run the scenario as the user who "
            "runs the server"
        ) from error
    except OSError:
        is_worker = False
    if not is_worker:
        raise ConfigError(
            f"process {pid} of {worker} is not on this host: run a scenario that kills or hangs "
            "workers where the server runs"
        )


def send_signal(worker: WorkerId, pid: int, number: signal.Signals) -> bool:
    """False if there is no such worker process any more."""
    try:
        check_worker_process(worker, pid)
        os.kill(pid, number)
    except (ConfigError, ProcessLookupError):
        return False
    return True
