"""Files that are written while a run goes on: its life events, and a line for each request.

The life events are lines as ``pdserve serve --log-format json`` writes them, so whatever reads a
live server's log reads these (``pdserve bench --trace`` among it). The wall clock of a simulation
starts at 0, that is in 1970.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from pdserve.core.errors import ConfigError, why
from pdserve.core.events import LifeEvent
from pdserve.obs.logs import life_line
from pdserve.sim.observe import Ended, Observer

REQUEST_FIELDS = (
    "index", "request_id", "arrived_s", "ttft_s", "tpot_s", "e2e_s", "second_token_gap_s",
    "prompt_tokens", "cached_tokens", "output_tokens", "class", "tenant", "prefill", "decode",
    "attempts", "ending", "failure",
)  # fmt: skip


class _File(Observer):
    """Owns an open file, from its making until the end of the ``with`` that it is used in."""

    def __init__(self, flag: str, path: Path) -> None:
        try:
            self._file: TextIO = path.open("w", newline="", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{flag}: cannot write {path}: {why(error)}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


class EventFile(_File):
    """``--events FILE``. Raises `ConfigError` if it cannot be made."""

    def __init__(self, path: Path) -> None:
        super().__init__("--events", path)

    def life(self, event: LifeEvent) -> None:
        self._file.write(life_line(event, event.at_s) + "\n")


class RequestFile(_File):
    """``--requests FILE``: CSV, or JSON lines if its name ends in ``.jsonl``; in the order in which
    the requests end."""

    def __init__(self, path: Path) -> None:
        super().__init__("--requests", path)
        self._table = (
            None if path.suffix == ".jsonl" else csv.writer(self._file, lineterminator="\n")
        )
        if self._table is not None:
            self._table.writerow(REQUEST_FIELDS)

    def ended(self, at_s: float, request: Ended) -> None:
        row = _row(request)
        if self._table is not None:
            self._table.writerow(
                ["" if row[name] is None else row[name] for name in REQUEST_FIELDS]
            )
        else:
            self._file.write(json.dumps(row) + "\n")


def _row(request: Ended) -> dict[str, Any]:
    return {
        "index": request.index,
        "request_id": request.request_id,
        "arrived_s": request.arrived_s,
        "ttft_s": request.ttft_s,
        "tpot_s": request.tpot_s,
        "e2e_s": request.e2e_s,
        "second_token_gap_s": request.second_gap_s,
        "prompt_tokens": request.prompt_tokens,
        "cached_tokens": request.cached_tokens,
        "output_tokens": request.output_tokens,
        "class": request.service.name,
        "tenant": request.tenant,
        "prefill": request.prefill,
        "decode": request.decode,
        "attempts": request.attempts,
        "ending": request.ending.value,
        "failure": request.failure,
    }
