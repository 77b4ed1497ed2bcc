"""Figures of a run, from its outcomes, defined as ``vllm bench serve`` defines them.

Latencies are of the requests that completed: TTFT and E2E of each, TPOT of each with at least two
output tokens, ITL of every gap between two chunks, all requests pooled. Throughputs are the
completed requests, their output tokens and their input and output tokens, over the time from the
start of the run until the last request ended. Percentiles interpolate linearly between the two
neighbours, and the standard deviation is that of the population. What is more here than there: what
was refused, broken or cancelled is counted by its kind, attainment has all sent requests under the
line (``slo``), and the lag says how late requests left.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdserve.workload.outcome import CountedBy, Ending, Outcome
from pdserve.workload.slo import Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of ``num`` values, in their own unit; all 0 if there are none."""

    num: int
    mean: float
    std: float
    median: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SloReport:
    """``good`` of ``judged`` requests met ``slo``; ``by_metric``: attainment of each bound."""

    slo: str
    good: int
    judged: int
    attainment: float
    goodput: float
    by_metric: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Times in milliseconds where the name says so; throughputs and goodput per second.

    ``failures`` counts failed requests by kind; ``messages`` has one example of each.
    ``tokens_per_chunk`` above 1 means that the server sends several tokens at once, which makes
    gaps rarer and longer than tokens are.
    """

    duration_s: float
    sent: int
    completed: int
    cancelled: int
    failed: int
    failures: dict[str, int]
    messages: dict[str, str]
    finish_reasons: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    counted_by: dict[str, int]
    tokens_per_chunk: float
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    ttft_ms: Spread
    tpot_ms: Spread
    itl_ms: Spread
    e2e_ms: Spread
    lag_ms: Spread
    slo: SloReport | None


def summarise(outcomes: Sequence[Outcome], duration_s: float, slo: Slo | None = None) -> Summary:
    """Figures of ``outcomes``, which took ``duration_s`` (above 0) in all."""
    completed = [outcome for outcome in outcomes if outcome.ending is Ending.COMPLETED]
    failed = [outcome for outcome in outcomes if outcome.ending is Ending.FAILED]
    prompt_tokens = sum(outcome.prompt_tokens for outcome in completed)
    output_tokens = sum(outcome.output_tokens for outcome in completed)
    num_chunks = sum(len(outcome.gaps_s) + 1 for outcome in completed)
    return Summary(
        duration_s=duration_s,
        sent=len(outcomes),
        completed=len(completed),
        cancelled=len(outcomes) - len(completed) - len(failed),
        failed=len(failed),
        failures=_counts(outcome.failure for outcome in failed),
        messages={str(outcome.failure): outcome.message for outcome in reversed(failed)},
        finish_reasons=_counts(outcome.finish_reason for outcome in completed),
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(outcome.cached_tokens for outcome in completed),
        output_tokens=output_tokens,
        counted_by=_counts(outcome.counted_by for outcome in completed),
        tokens_per_chunk=output_tokens / num_chunks if num_chunks else 0.0,
        request_throughput=len(completed) / duration_s,
        output_throughput=output_tokens / duration_s,
        total_token_throughput=(prompt_tokens + output_tokens) / duration_s,
        **spreads_ms(completed),
        lag_ms=spread(outcome.lag_s * 1e3 for outcome in outcomes),
        slo=None if slo is None else judge(outcomes, duration_s, slo),
    )


def latencies_ms(completed: Sequence[Outcome]) -> dict[str, list[float]]:
    """Every value behind the four latency figures, by metric."""
    tpots = (outcome.tpot_s for outcome in completed)
    return {
        "ttft": [outcome.ttft_s * 1e3 for outcome in completed if outcome.ttft_s is not None],
        "tpot": [tpot_s * 1e3 for tpot_s in tpots if tpot_s is not None],
        "itl": [gap_s * 1e3 for outcome in completed for gap_s in outcome.gaps_s],
        "e2e": [outcome.e2e_s * 1e3 for outcome in completed if outcome.e2e_s is not None],
    }


def spreads_ms(completed: Sequence[Outcome]) -> dict[str, Spread]:
    return {f"{name}_ms": spread(values) for name, values in latencies_ms(completed).items()}


def judge(outcomes: Sequence[Outcome], duration_s: float, slo: Slo) -> SloReport:
    """Goodput and attainment: see ``slo``."""
    judged = [outcome for outcome in outcomes if outcome.ending is not Ending.CANCELLED]

    def share(part: Slo) -> float:
        return sum(map(part.met_by, judged)) / len(judged) if judged else 0.0

    good = sum(map(slo.met_by, judged))
    return SloReport(
        slo=str(slo),
        good=good,
        judged=len(judged),
        attainment=share(slo),
        goodput=good / duration_s,
        by_metric={part.bounds_ms[0][0]: share(part) for part in slo.parts()},
    )


def spread(values: Iterable[float]) -> Spread:
    """Mean, deviation and percentiles of the values."""
    ordered = sorted(values)
    if not ordered:
        return Spread(num=0, mean=0.0, std=0.0, median=0.0, p90=0.0, p99=0.0, max=0.0)
    mean = statistics.fmean(ordered)
    return Spread(
        num=len(ordered),
        mean=mean,
        std=math.sqrt(statistics.fmean((value - mean) ** 2 for value in ordered)),
        median=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p99=percentile(ordered, 99),
        max=ordered[-1],
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of sorted values, at least one; linear between neighbours (numpy's default)."""
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _counts(values: Iterable[str | CountedBy | None]) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}
