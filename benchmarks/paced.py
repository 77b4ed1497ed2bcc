"""``pdserve`` with workers that keep a pace: the steps of the fake engine take a given time.

    PACED_STEP_S=0.01 python benchmarks/paced.py serve --engine fake-foreign [serve flags]

Such a worker makes the tokens of a whole batch at once, as a real one does, and costs next to no
CPU time. The gateway's process and those of its workers run what `pdserve` runs, but for the pace.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from pdserve import cli
from pdserve.engine.fake_foreign import FakeForeignEngine
from pdserve.serve import launcher, runners


class PacedEngine(FakeForeignEngine):
    """The fake engine, with the step time that the environment names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, step_s=float(os.environ["PACED_STEP_S"]))


if __name__ == "__main__":
    if os.environ.get("PACED_HTTP") == "h11":
        sys.modules["httptools"] = None  # type: ignore[assignment]  # as if not installed
    runners.SELF_BATCHING["fake-foreign"] = "__main__:PacedEngine"
    launcher.worker_command = lambda: (sys.executable, os.path.abspath(__file__), "worker")
    sys.exit(cli.main())
