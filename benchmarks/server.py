"""A pdserve server of a benchmark's own: real processes, a free port, ended with the benchmark."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Server:
    """``pid`` is the gateway's process."""

    url: str
    pid: int


@contextlib.contextmanager
def serving(
    flags: Sequence[str],
    *,
    program: Sequence[str] = ("-m", "pdserve"),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """``pdserve serve`` with these flags; entered when every worker is ready.

    ``program`` is what Python runs in place of ``pdserve``, with ``environment`` added to ours.
    """
    process = subprocess.Popen(
        [sys.executable, *program, "serve", "--port", "0", "--log-format", "json", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start: run pdserve serve with the same flags")
        yield Server(json.loads(line)["url"], process.pid)
    finally:
        process.terminate()
        process.wait()
