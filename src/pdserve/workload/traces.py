"""Readers of recorded workloads: files in, `TraceRequest` out, in order of arrival.

==============  ==============================================================================
``azure``       CSV of the Azure LLM inference traces (2023 and 2024): TIMESTAMP,
                ContextTokens, GeneratedTokens
``mooncake``    JSON lines: timestamp (ms), input_length, output_length, hash_ids
``splitwise``   SplitwiseSim's CSV: arrival_timestamp (s), batch_size, prompt_size, token_size
``life-log``    what ``pdserve serve --log-format json`` writes to stderr
==============  ==============================================================================

A hash id of Mooncake names a block of 512 tokens together with everything before it, so equal ids
become segments of equal names. The others say nothing of their prompts: each gets one of its own.
Times count from the first request. A file whose name ends in ``.gz`` is unpacked while it is read.
The files belong to the user; nothing here fetches them.
"""

from __future__ import annotations

import gzip
import heapq
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from pdserve.core.errors import ConfigError, why
from pdserve.workload.request import TraceRequest
from pdserve.workload.trace_rows import ROWS, BadLineError, TraceRow, kind_of

KINDS = tuple(ROWS)
_TIMES_OF_DAY = ("azure", "life-log")
"""Their zero is a date, or the start of a process: nothing that a replay could count from."""
_HELD_ROWS = 4096
"""`iter_trace` puts rows in order that are at most so many rows from their place."""


def iter_trace(
    path: Path, kind: str | None = None, *, keep_times: bool = False
) -> Iterator[TraceRequest]:
    """The file's requests one by one, numbered from 0: memory does not grow with the file.

    ``kind`` None: told by the first line. ``keep_times``: times are those of the file, not shifted
    to have the first request at 0. Rows that are a little out of order come in order.

    Raises `ConfigError` at once if the file cannot be opened, has no request or begins with a line
    that cannot be read; later, with its number, for a line that cannot, or that is thousands of
    rows from its place.
    """
    return _requests(path, kind, keep_times, _nearly_ordered)


def read_trace(
    path: Path, kind: str | None = None, *, keep_times: bool = False
) -> list[TraceRequest]:
    """All requests of the file, as `iter_trace`, but its rows may have any order."""
    return list(_requests(path, kind, keep_times, sorted))


def _requests(
    path: Path,
    kind: str | None,
    keep_times: bool,
    ordered: Callable[[Iterator[TraceRow]], Iterable[TraceRow]],
) -> Iterator[TraceRequest]:
    rows = _rows(path, kind, keep_times, ordered)
    first = next(rows, None)
    if first is None:
        raise ConfigError(f"there is no request in the trace {path}")
    start_s = 0.0 if keep_times else first.at_s
    return (
        TraceRequest(
            index=index,
            at_s=row.at_s - start_s,
            segments=row.segments,
            output_tokens=row.output_tokens,
        )
        for index, row in enumerate(itertools.chain([first], rows))
    )


def _rows(
    path: Path,
    kind: str | None,
    keep_times: bool,
    ordered: Callable[[Iterator[TraceRow]], Iterable[TraceRow]],
) -> Iterator[TraceRow]:
    try:
        with _opened(path) as file:
            first_line = file.readline()
            found = kind or kind_of(first_line)
            if found not in ROWS:
                raise ConfigError(f"unknown kind of trace {kind!r}: use one of {', '.join(KINDS)}")
            if keep_times and found in _TIMES_OF_DAY:
                raise ConfigError(f"times of a trace of kind {found} are dates: they cannot stay")
            yield from ordered(ROWS[found](itertools.chain([first_line], file)))
    except BadLineError as error:
        raise ConfigError(f"{path}, line {error.number}: {error.reason}") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigError(f"cannot read the trace {path}: {why(error)}") from error


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _nearly_ordered(rows: Iterator[TraceRow]) -> Iterator[TraceRow]:
    """In order of time, then of lines."""
    held = list(itertools.islice(rows, _HELD_ROWS))
    heapq.heapify(held)
    last_s = float("-inf")
    for row in rows:
        if row.at_s < last_s:
            raise BadLineError(
                row.line,
                f"it arrives {last_s - row.at_s:g} s before one that is {_HELD_ROWS} rows or more "
                "above it: sort the file by time",
            )
        earliest = heapq.heappushpop(held, row)
        last_s = earliest.at_s
        yield earliest
    while held:
        yield heapq.heappop(held)
