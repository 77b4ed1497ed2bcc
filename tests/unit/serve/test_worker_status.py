"""What the status of a worker's process says of its end."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

from pdserve.core.ids import WorkerId
from pdserve.serve.launcher import USER_ERROR_STATUS
from pdserve.serve.start import WorkerStart
from pdserve.transport.addresses import listen_unix, new_name, unix_address


def test_a_gateway_that_says_nothing_is_no_mistake_of_the_users(
    start_template: WorkerStart,
) -> None:
    """A busy gateway may answer the next process; a mistake would end the whole server."""
    name = new_name()
    start = replace(
        start_template,
        worker=WorkerId("decode-0"),
        gateway_address=unix_address(name),
        address=unix_address(new_name()),
        launcher_pid=os.getpid(),
        transport="shm",
    )
    with listen_unix(name) as gateway:
        gateway.settimeout(60.0)
        with subprocess.Popen(
            [sys.executable, "-m", "pdserve", "worker"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdin is not None
            process.stdin.write(start.encode())
            process.stdin.close()
            gateway.accept()[0].close()
            assert process.stderr is not None
            said = process.stderr.read().decode()
    assert process.returncode not in (0, USER_ERROR_STATUS), said
    assert said, "it ends without a word"
