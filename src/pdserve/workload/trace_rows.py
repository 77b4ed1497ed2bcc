"""The formats of recorded workloads: lines in, `TraceRow` out, in the order of the file.

Each reader takes lines and gives rows one by one, so that a file of any length needs the memory of
one row (a life log: of the requests that are open at a time). `BadLineError` says which line cannot
be read, and why.
"""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from pdserve.core.events import LifeName
from pdserve.workload.request import Segment, own_segment

MOONCAKE_BLOCK_TOKENS = 512
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
SPLITWISE_COLUMNS = ("arrival_timestamp", "batch_size", "prompt_size", "token_size")
_MICROSECOND = timedelta(microseconds=1)
_MOST_OPEN = 65_536
"""Requests of a life log that wait for their end. A log that was cut off never shows some of the
ends; those go on with the length that was asked for."""


class TraceRow(NamedTuple):
    """A request as its ``line`` (from 1) says it; ``at_s`` counts from any zero."""

    at_s: float
    line: int
    segments: tuple[Segment, ...]
    output_tokens: int


class BadLineError(Exception):
    """Line ``number`` cannot be read, for ``reason``."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number
        self.reason = reason


def azure_rows(lines: Iterable[str]) -> Iterator[TraceRow]:
    """Times count from the first row, exact to the microsecond. Rows that generated nothing ask for
    one token: a server cannot be asked for none."""
    start: datetime | None = None
    for index, (number, (time, inputs, outputs)) in enumerate(_columns(lines, AZURE_COLUMNS)):
        try:
            moment = datetime.fromisoformat(time)
            if moment.tzinfo is None:  # taken for UTC, in which no hour is left out or repeated
                moment = moment.replace(tzinfo=UTC)
            start = start or moment
            at_s = (moment - start) / _MICROSECOND / 1e6
            prompt, answer = map(_whole, (inputs, outputs), AZURE_COLUMNS[1:])
            yield _row(number, at_s, (own_segment(index, prompt),), answer)
        except ValueError as error:
            raise BadLineError(number, f"not a row of an Azure trace: {error}") from error


def splitwise_rows(lines: Iterable[str]) -> Iterator[TraceRow]:
    """SplitwiseSim's input: ``arrival_timestamp`` in seconds, from a zero of its own."""
    for index, (number, values) in enumerate(_columns(lines, SPLITWISE_COLUMNS)):
        try:
            at_s, batch_size, inputs, outputs = (float(value) for value in values)
            if batch_size != 1:
                raise ValueError(f"a batch_size of {batch_size:g} is not one request")
            if not (inputs.is_integer() and outputs.is_integer()):
                raise ValueError("sizes are whole numbers")
            yield _row(number, at_s, (own_segment(index, int(inputs)),), int(outputs))
        except (ValueError, OverflowError) as error:
            raise BadLineError(number, f"not a row of a SplitwiseSim trace: {error}") from error


def _columns(lines: Iterable[str], names: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line number and named columns of each row of a CSV file with a header."""
    rows = csv.reader(lines)
    try:
        header = next(rows, [])
        if not set(names) <= set(header):
            raise BadLineError(1, f"the columns are not {', '.join(names)}")
        columns = [header.index(name) for name in names]
        for row in rows:
            if not row:
                continue
            if len(row) <= max(columns):
                raise BadLineError(rows.line_num, f"{len(row)} columns instead of {len(header)}")
            yield rows.line_num, tuple([row[column] for column in columns])
    except csv.Error as error:
        raise BadLineError(rows.line_num, f"not CSV: {error}") from error


def mooncake_rows(lines: Iterable[str]) -> Iterator[TraceRow]:
    """Each id is a segment of 512 tokens; the last one is as long as the rest of the input."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            ids, rest = row["hash_ids"], int(row["input_length"])
            if not 0 <= len(ids) * MOONCAKE_BLOCK_TOKENS - rest < MOONCAKE_BLOCK_TOKENS:
                raise ValueError(f"{len(ids)} hash_ids do not make {rest} tokens")
            segments = [Segment(f"block:{name}", MOONCAKE_BLOCK_TOKENS) for name in ids[:-1]]
            last = rest - MOONCAKE_BLOCK_TOKENS * (len(ids) - 1)
            segments.append(Segment(f"block:{ids[-1]}", last))
            at_s = float(row["timestamp"]) / 1e3
            yield _row(number, at_s, tuple(segments), int(row["output_length"]))
        except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
            raise BadLineError(number, f"not a line of a Mooncake trace: {_why(error)}") from error


def life_log_rows(lines: Iterable[str]) -> Iterator[TraceRow]:
    """Every ``submitted`` event; lines that are no life events are passed over.

    An answer is as long as it became, or as ``max_tokens`` if it did not end by itself. One of
    several choices has its share of the tokens, and is replayed once.
    """
    by_id: dict[str, _Life] = {}
    lives: deque[_Life] = deque()
    index = 0
    for number, line in enumerate(lines, 1):
        event = _life_event(line)
        try:
            match event.get("event"):
                case LifeName.SUBMITTED:
                    life = _Life.of(number, index, event)
                    index += 1
                    lives.append(life)
                    if event["request_id"] in by_id:  # an id may come again: its first use is over
                        by_id[event["request_id"]].is_over = True
                    by_id[event["request_id"]] = life
                case LifeName.FINISHED | LifeName.FAILED if event["request_id"] in by_id:
                    by_id.pop(event["request_id"]).end(event["detail"])
        except (ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError) as error:
            raise BadLineError(number, f"not a life event: {_why(error)}") from error
        while lives and (lives[0].is_over or len(lives) > _MOST_OPEN):
            yield lives.popleft().row()
    for life in lives:
        yield life.row()


@dataclass(slots=True)
class _Life:
    line: int
    index: int
    at_s: float
    prompt_tokens: int
    output_tokens: int
    is_over: bool = False

    @classmethod
    def of(cls, line: int, index: int, event: dict[str, Any]) -> _Life:
        detail = event["detail"]
        return cls(
            line, index, float(event["at_s"]), int(detail["prompt_tokens"]),
            int(detail["max_tokens"]),
        )  # fmt: skip

    def end(self, detail: dict[str, Any]) -> None:
        self.is_over = True
        if detail.get("reason") != "abort" and "output_tokens" in detail:
            self.output_tokens = round(int(detail["output_tokens"]) / int(detail["choices"]))

    def row(self) -> TraceRow:
        try:
            segments = (own_segment(self.index, self.prompt_tokens),)
            return _row(self.line, self.at_s, segments, self.output_tokens)
        except ValueError as error:
            raise BadLineError(self.line, f"not a life event: {error}") from error


def _life_event(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


MOST_TOKENS = 10**9
"""Of a prompt or an answer; a number beyond it is a mistake."""


def _why(error: Exception) -> str:
    """A missing key has no words of its own."""
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _whole(text: str, column: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{column} is {text!r}, not a whole number") from None


def _row(line: int, at_s: float, segments: tuple[Segment, ...], outputs: int) -> TraceRow:
    if not abs(at_s) < float("inf"):
        raise ValueError(f"{at_s} is no time")
    lengths = [segment.num_tokens for segment in segments]
    if lengths and min(lengths) < 1:
        raise ValueError("a prompt has at least one token")
    most = max(outputs, *lengths) if lengths else outputs
    if most > MOST_TOKENS:
        raise ValueError(f"{most} tokens are no length: at most {MOST_TOKENS} can be")
    return TraceRow(at_s, line, segments, max(1, outputs))


ROWS: dict[str, Callable[[Iterable[str]], Iterator[TraceRow]]] = {
    "azure": azure_rows,
    "mooncake": mooncake_rows,
    "splitwise": splitwise_rows,
    "life-log": life_log_rows,
}


def kind_of(first_line: str) -> str:
    """The kind of trace that begins with this line."""
    if first_line.startswith("{"):
        return "mooncake" if '"hash_ids"' in first_line else "life-log"
    return "splitwise" if "arrival_timestamp" in first_line else "azure"
