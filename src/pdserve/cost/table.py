"""Step times from a table of measurements, as Splitwise published them (ISCA 2024, sec. III).

Each row is one run: ``batch_size`` prompts of ``prompt_size`` tokens, computed at once, and
``token_size`` tokens decoded of each; ``prompt_time`` of the first step and ``token_time`` of one
of the others, in ms. The file is the user's (``splitwise_perf_model.csv`` of the authors' simulator
has these columns); its text comes in, and a row that cannot be read is named by its line.

There are two readings of it. `SplitwiseSimTimer` reads it as the authors' simulator does: both
times are lines between the medians over batch_size * prompt_size, and a step of decodes is looked
up at the *number* of its sequences, where the table has tokens of context: context costs nothing
and a batch nearly nothing. `TableTimer` reads what was measured: the time of a decode over its
batch and its context, that of a prompt over its tokens and their attention.
"""

from __future__ import annotations

import csv
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from pdserve.core.errors import ConfigError
from pdserve.core.step import StepShape
from pdserve.cost.machine import StepRange
from pdserve.cost.nonnegative import Moments, nonnegative_fit
from pdserve.cost.step import StepModel

COLUMNS = (
    "model",
    "hardware",
    "prompt_size",
    "batch_size",
    "token_size",
    "prompt_time",
    "token_time",
    "tensor_parallel",
)
MIXED_FACTOR = 1.1
"""What SplitwiseSim takes a step with prompts and decodes to cost, by one with prompts alone."""


@dataclass(frozen=True, slots=True)
class Run:
    """What was run, and the medians over its repeats, in seconds."""

    prompt_tokens: int
    batch: int
    output_tokens: int
    prompt_s: float
    token_s: float

    @property
    def mean_context(self) -> float:
        """Tokens of one sequence in the middle of its answer."""
        return self.prompt_tokens + self.output_tokens / 2


class Line:
    """Straight lines between points, of which there are two at least; the first and the last one go
    on for ever."""

    def __init__(self, points: Mapping[float, float]) -> None:
        self.xs = sorted(points)
        self.ys = [points[x] for x in self.xs]

    def at(self, x: float) -> float:
        xs, ys = self.xs, self.ys
        i = min(max(bisect_left(xs, x), 1), len(xs) - 1)
        slope = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
        return slope * (x - xs[i - 1]) + ys[i - 1]


class PerfTable:
    """All rows, in the file's order, by (model, hardware, tensor parallelism)."""

    def __init__(self, rows: Mapping[tuple[str, str, int], list[Run]]) -> None:
        self._rows = rows

    @classmethod
    def read(cls, text: str, name: str = "table") -> PerfTable:
        """Raises `ConfigError` with the line of what cannot be read; ``name`` is the file's."""
        lines = csv.reader(text.splitlines())
        header = [column.strip() for column in next(lines, [])]
        missing = [column for column in COLUMNS if column not in header]
        if missing:
            raise ConfigError(
                f"{name}:1: no column {missing[0]!r}: a table of step times has the columns "
                + ", ".join(COLUMNS)
            )
        places = [header.index(column) for column in COLUMNS]
        rows: dict[tuple[str, str, int], list[Run]] = {}
        for cells in lines:
            if not cells:
                continue
            where = f"{name}:{lines.line_num}"
            if len(cells) != len(header):
                raise ConfigError(f"{where}: {len(cells)} cells under {len(header)} columns")
            key, run = _row([cells[place].strip() for place in places], where)
            rows.setdefault(key, []).append(run)
        if not rows:
            raise ConfigError(f"{name}: the table has no rows")
        return cls(rows)

    def has(self, model: str, hardware: str, devices: int) -> bool:
        return (model, hardware, devices) in self._rows

    def rows(self, model: str, hardware: str, devices: int) -> list[Run]:
        """Raises `ConfigError` that says which there are, if these are not."""
        found = self._rows.get((model, hardware, devices))
        if found is None:
            known = ", ".join(f"{m} on {d} x {h}" for m, h, d in sorted(self._rows))
            raise ConfigError(
                f"the table has nothing of {model} on {devices} x {hardware}: it has {known}"
            )
        return found


def medians(rows: Iterable[Run]) -> list[Run]:
    """One run for each kind of run: the medians of its repeats."""
    alike: dict[tuple[int, int, int], list[Run]] = {}
    for run in rows:
        alike.setdefault((run.prompt_tokens, run.batch, run.output_tokens), []).append(run)
    return [
        Run(*kind, median(r.prompt_s for r in runs), median(r.token_s for r in runs))
        for kind, runs in sorted(alike.items())
    ]


class SplitwiseSimTimer:
    """The table as SplitwiseSim reads it (its ``performance_model.py``)."""

    def __init__(self, rows: Sequence[Run], *, prompt_factor: float = 1.0) -> None:
        self.prompt = Line(_by_tokens(rows, lambda run: run.prompt_s * prompt_factor))
        self.token = Line(_by_tokens(rows, lambda run: run.token_s))
        self._known: dict[tuple[int, int], float] = {}

    def step_s(self, shape: StepShape) -> float:
        key = (shape.prompt_tokens, shape.num_decoding)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._step_s(*key)
        return found

    def _step_s(self, prompt_tokens: int, num_decoding: int) -> float:
        if not prompt_tokens:
            return self.token.at(num_decoding) if num_decoding else 0.0
        prompt_s = self.prompt.at(prompt_tokens + num_decoding)
        return prompt_s * MIXED_FACTOR if num_decoding else prompt_s


class TableTimer:
    """The table as it was measured.

    A decode step: by its batch, where the table has batches of prompts of one length; and, for the
    context that its sequences have beyond those, what context costs a single sequence. A prompt
    step: by its tokens, and beyond the attention of those prompts, what attention costs in the
    prompts that were computed alone (where that is less than nothing, both are taken together). A
    step that does both reads the weights once: it takes what
    its prompts take, and what its sequences add to a step of decodes.
    """

    def __init__(self, rows: Sequence[Run], *, prompt_factor: float = 1.0) -> None:
        runs = medians(rows)
        batches = _batches(runs)
        self._short = batches[0].prompt_tokens
        self._per_pair_s = _per_pair_s(runs, batches) * prompt_factor
        prompts = _by_tokens(runs, lambda run: run.prompt_s)
        if self._per_pair_s:  # what is known of long prompts is known by their attention
            prompts = {x: y for x, y in prompts.items() if x < self._short}
            prompts |= {float(r.prompt_tokens * r.batch): r.prompt_s for r in batches}
        self._prompt = Line({x: y * prompt_factor for x, y in prompts.items()})
        self._batch = Line({float(r.batch): r.token_s for r in batches})
        self._context = batches[0].mean_context
        self._per_context_s = _per_context_s(runs)
        self._base_s = self._batch.at(0.0)

    def step_s(self, shape: StepShape) -> float:
        tokens, batch = shape.prompt_tokens, shape.num_decoding
        decode_s = 0.0
        if batch:
            more = shape.context_tokens - self._context * batch
            decode_s = self._batch.at(batch) + self._per_context_s * more
        if not tokens:
            return decode_s
        pairs = shape.prompt_pairs - tokens * min(tokens, self._short)
        prompt_s = self._prompt.at(tokens) + self._per_pair_s * max(0, pairs)
        return prompt_s + max(0.0, decode_s - self._base_s if batch else 0.0)


def linear_model(rows: Sequence[Run], *, prompt_factor: float = 1.0) -> StepModel:
    """The step model that is nearest to the table, in relative terms."""
    prompts, decodes = Moments(3), Moments(3)
    for run in medians(rows):
        tokens = run.prompt_tokens * run.batch
        weight = 1.0 / run.prompt_s**2
        prompts.add((1.0, tokens, tokens * run.prompt_tokens), run.prompt_s, weight)
        context = run.mean_context * run.batch
        decodes.add((1.0, run.batch, context), run.token_s, 1.0 / run.token_s**2)
    prompt = [value * prompt_factor for value in nonnegative_fit(prompts)]
    decode = nonnegative_fit(decodes)
    return StepModel(
        prompt_base_s=prompt[0],
        per_prompt_token_s=prompt[1],
        per_pair_s=prompt[2],
        decode_base_s=decode[0],
        per_sequence_s=decode[1],
        per_context_token_s=decode[2],
    )


def range_of(rows: Sequence[Run]) -> StepRange:
    """The steps that the table has."""
    return StepRange(
        prompt_tokens=max(run.prompt_tokens * run.batch for run in rows),
        num_decoding=max(run.batch for run in rows),
        context_tokens=max((run.prompt_tokens + run.output_tokens) * run.batch for run in rows),
    )


def mean_error(rows: Sequence[Run], *, prompt_factor: float = 1.0) -> float:
    """Of `TableTimer`: the mean relative error over the kinds of runs, each predicted from all the
    others; those at the ends of the table, which the others do not enclose, are left out."""
    runs = medians(rows)
    errors = []
    for left_out in runs:
        others = [run for run in runs if run is not left_out]
        if left_out.batch in (1, max(r.batch for r in runs)) or len(_batches(others)) < 2:
            continue
        timer = TableTimer(others, prompt_factor=prompt_factor)
        tokens = left_out.prompt_tokens * left_out.batch
        prompt = StepShape(tokens, tokens * left_out.prompt_tokens)
        context = round(left_out.mean_context * left_out.batch)
        decode = StepShape(num_decoding=left_out.batch, context_tokens=context)
        prompt_s = left_out.prompt_s * prompt_factor
        errors.append(abs(timer.step_s(prompt) / prompt_s - 1))
        errors.append(abs(timer.step_s(decode) / left_out.token_s - 1))
    return sum(errors) / len(errors) if errors else 0.0


def _row(cells: list[str], where: str) -> tuple[tuple[str, str, int], Run]:
    named = dict(zip(COLUMNS, cells, strict=True))
    whole = ("prompt_size", "batch_size", "token_size", "tensor_parallel")
    counts = {column: _number(named[column], column, where) for column in whole}
    for column, value in counts.items():
        if value != int(value):
            raise ConfigError(f"{where}: {column} is {named[column]!r}; it must be a whole number")
    times = {c: _number(named[c], c, where) for c in ("prompt_time", "token_time")}
    for column in ("model", "hardware"):
        if not named[column]:
            raise ConfigError(f"{where}: {column} is empty")
    key = (named["model"], named["hardware"], int(counts["tensor_parallel"]))
    prompt, batch, output = (int(counts[column]) for column in whole[:3])
    prompt_s, token_s = times["prompt_time"] / 1000, times["token_time"] / 1000
    return key, Run(prompt, batch, output, prompt_s, token_s)


def _number(cell: str, column: str, where: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"{where}: {column} is {cell!r}; it must be a number above 0")
    return number


def _by_tokens(rows: Sequence[Run], seconds: Callable[[Run], float]) -> dict[float, float]:
    """Medians over all runs with so many prompt tokens, however these were batched."""
    alike: dict[float, list[float]] = {}
    for run in rows:
        alike.setdefault(float(run.prompt_tokens * run.batch), []).append(seconds(run))
    return {tokens: median(times) for tokens, times in alike.items()}


def _batches(runs: Sequence[Run]) -> list[Run]:
    """The runs of several prompts together, with the single one of their kind, smallest first."""
    several = [run for run in runs if run.batch > 1]
    kinds = {(run.prompt_tokens, run.output_tokens) for run in several}
    found = [run for run in runs if (run.prompt_tokens, run.output_tokens) in kinds]
    lengths = {run.prompt_tokens for run in found}
    if len(found) < 2 or len(lengths) > 1 or min(run.batch for run in found) > 1:
        raise ConfigError(
            "the table has no series of batches: it needs runs of 1, 2, ... prompts of one length"
        )
    return sorted(found, key=lambda run: run.batch)


def _per_context_s(runs: Sequence[Run]) -> float:
    """What a token of context adds to a step of one sequence, as the slope through its runs."""
    single = [run for run in runs if run.batch == 1]
    mean_x = sum(run.mean_context for run in single) / len(single)
    mean_y = sum(run.token_s for run in single) / len(single)
    square = sum((run.mean_context - mean_x) ** 2 for run in single)
    product = sum((run.mean_context - mean_x) * (run.token_s - mean_y) for run in single)
    return max(0.0, product / square) if square else 0.0


def _per_pair_s(runs: Sequence[Run], batches: Sequence[Run]) -> float:
    """What a pair of attention adds: of prompts computed alone against as many tokens in short
    ones, the mean over the lengths of which both are known."""
    together = {run.prompt_tokens * run.batch: run for run in batches}
    found = []
    for run in runs:
        other = together.get(run.prompt_tokens)
        if run.batch == 1 and other is not None and other.batch > 1:
            pairs = run.prompt_tokens * (run.prompt_tokens - other.prompt_tokens)
            found.append((run.prompt_s - other.prompt_s) / pairs)
    return max(0.0, sum(found) / len(found)) if found else 0.0
