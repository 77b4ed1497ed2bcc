"""Readers of recorded workloads: files in, `TraceRequest` out, in order of arrival.

==============  ==============================================================================
``azure``       CSV of the Azure LLM inference traces: TIMESTAMP, ContextTokens, GeneratedTokens
``mooncake``    JSON lines: timestamp (ms), input_length, output_length, hash_ids
``life-log``    what ``pdserve serve --log-format json`` writes to stderr
==============  ==============================================================================

A hash id of Mooncake names a block of 512 tokens together with everything before it, so equal ids
become segments of equal names. The others say nothing of their prompts: each gets one of its own.
Times count from the first request. The files belong to the user; nothing here fetches them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pdserve.core.errors import ConfigError
from pdserve.core.events import LifeName
from pdserve.workload.request import Segment, TraceRequest, own_segment

MOONCAKE_BLOCK_TOKENS = 512
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def read_trace(path: Path, kind: str | None = None) -> list[TraceRequest]:
    """All requests of the file, numbered from 0. ``kind`` None: told by the file's first line.

    Raises `ConfigError` with the line that cannot be read, or if there is no request.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from error
    reader = READERS.get(kind or _kind_of(lines))
    if reader is None:
        raise ConfigError(f"unknown kind of trace {kind!r}: use one of {', '.join(READERS)}")
    try:
        requests = sorted(reader(lines), key=lambda request: request.at_s)
    except _BadLineError as error:
        raise ConfigError(f"{path}, line {error.number}: {error.reason}") from error
    if not requests:
        raise ConfigError(f"there is no request in the trace {path}")
    start_s = requests[0].at_s
    return [
        replace(request, index=index, at_s=request.at_s - start_s)
        for index, request in enumerate(requests)
    ]


def _kind_of(lines: list[str]) -> str:
    first = lines[0] if lines else ""
    if not first.startswith("{"):
        return "azure"
    return "mooncake" if '"hash_ids"' in first else "life-log"


class _BadLineError(Exception):
    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number
        self.reason = reason


def read_azure(lines: Iterable[str]) -> Iterator[TraceRequest]:
    """Rows that generated nothing ask for one token: a server cannot be asked for none."""
    rows = csv.reader(lines)
    header = next(rows, [])
    try:
        columns = [header.index(name) for name in AZURE_COLUMNS]
    except ValueError as error:
        raise _BadLineError(1, f"the columns are not {', '.join(AZURE_COLUMNS)}") from error
    for index, row in enumerate(rows):
        if not row:
            continue
        try:
            time, inputs, outputs = (row[column] for column in columns)
            moment = datetime.fromisoformat(time)
            # Without a zone the clock is taken for UTC, in which no hour is left out or repeated.
            at_s = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
            yield _request(index, at_s, [own_segment(index, int(inputs))], int(outputs))
        except (ValueError, IndexError) as error:
            raise _BadLineError(rows.line_num, f"not a row of an Azure trace: {error}") from error


def read_mooncake(lines: Iterable[str]) -> Iterator[TraceRequest]:
    """Each id is a segment of 512 tokens; the last one is as long as the rest of the input."""
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            ids, rest = row["hash_ids"], int(row["input_length"])
            if not 0 <= len(ids) * MOONCAKE_BLOCK_TOKENS - rest < MOONCAKE_BLOCK_TOKENS:
                raise ValueError(f"{len(ids)} hash_ids do not make {rest} tokens")
            segments = [Segment(f"block:{name}", MOONCAKE_BLOCK_TOKENS) for name in ids]
            last = rest - MOONCAKE_BLOCK_TOKENS * (len(ids) - 1)
            segments[-1] = replace(segments[-1], num_tokens=last)
            at_s = float(row["timestamp"]) / 1e3
            yield _request(index, at_s, segments, int(row["output_length"]))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            reason = f"not a line of a Mooncake trace: {error!r}"
            raise _BadLineError(index + 1, reason) from error


def read_life_log(lines: Iterable[str]) -> Iterator[TraceRequest]:
    """Every ``submitted`` event; lines that are no life events are passed over.

    An answer is as long as it became, or as ``max_tokens`` if it did not end by itself. One of
    several choices has its share of the tokens, and is replayed once.
    """
    submitted: dict[str, _Submitted] = {}
    ended: list[_Submitted] = []
    for number, line in enumerate(lines, 1):
        event = _life_event(line)
        try:
            if event.get("event") == LifeName.SUBMITTED:
                life = _Submitted.of(event)
                ended.append(life)  # an id may come again when its first use has ended
                submitted[event["request_id"]] = life
            elif event.get("event") == LifeName.FINISHED and event["request_id"] in submitted:
                submitted.pop(event["request_id"]).finish(event["detail"])
        except (ValueError, KeyError, TypeError) as error:
            raise _BadLineError(number, f"not a life event: {error!r}") from error
    for index, life in enumerate(ended):
        segments = [own_segment(index, life.prompt_tokens)]
        yield _request(index, life.at_s, segments, life.output_tokens)


@dataclass(slots=True)
class _Submitted:
    at_s: float
    prompt_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, event: dict[str, Any]) -> _Submitted:
        detail = event["detail"]
        return cls(float(event["at_s"]), int(detail["prompt_tokens"]), int(detail["max_tokens"]))

    def finish(self, detail: dict[str, Any]) -> None:
        if detail.get("reason") != "abort" and "output_tokens" in detail:
            self.output_tokens = round(int(detail["output_tokens"]) / int(detail["choices"]))


def _life_event(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _request(index: int, at_s: float, segments: list[Segment], outputs: int) -> TraceRequest:
    if any(segment.num_tokens < 1 for segment in segments):
        raise ValueError("a prompt has at least one token")
    return TraceRequest(
        index=index, at_s=at_s, segments=tuple(segments), output_tokens=max(1, outputs)
    )


READERS: dict[str, Callable[[Iterable[str]], Iterator[TraceRequest]]] = {
    "azure": read_azure,
    "mooncake": read_mooncake,
    "life-log": read_life_log,
}
