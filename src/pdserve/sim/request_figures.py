"""What became of the requests: latencies, objectives, tokens, refusals, by class of service.

The definitions are the load client's (``workload.summary``, ``workload.slo``): latencies are of the
requests that completed, attainment has all under the line that the client did not cancel itself.
Times are in seconds. A request is judged by the bounds of its class; where the class promises
nothing, by the run's objective; where there is none either, it is good if it completed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pdserve.core.ids import RequestId
from pdserve.core.request import ServiceClass
from pdserve.sim.distribution import Distribution, LogHistogram, figures_of
from pdserve.sim.observe import Ended, Observer
from pdserve.workload.outcome import Ending
from pdserve.workload.slo import Slo, slo_of

LATENCIES = ("ttft_s", "tpot_s", "e2e_s", "second_token_gap_s")


@dataclass(slots=True)
class Tally:
    """Of the requests of one class, or of all. ``met``: how many met each bound by itself."""

    slo: Slo | None = None
    endings: Counter[Ending] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    good: int = 0
    met: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    started_prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    attempts: int = 0
    resumes: int = 0
    resumed: int = 0
    ttft_s: Distribution = field(default_factory=Distribution)
    tpot_s: Distribution = field(default_factory=Distribution)
    e2e_s: Distribution = field(default_factory=Distribution)
    second_token_gap_s: Distribution = field(default_factory=Distribution)

    def take(self, request: Ended) -> None:
        ending = request.ending
        self.endings[ending] += 1
        if request.failure is not None:
            self.failures[request.failure] += 1
        self.prompt_tokens += request.prompt_tokens
        self.output_tokens += request.output_tokens
        self.attempts += request.attempts
        if request.attempts > 1:
            self.resumes += request.attempts - 1
            self.resumed += 1
        if request.first_s is not None:
            self.started_prompt_tokens += request.prompt_tokens
            self.cached_tokens += request.cached_tokens
        if ending is Ending.COMPLETED:
            self._take_times(request)
        if ending is not Ending.CANCELLED:
            self._judge(request)

    def merge(self, other: Tally) -> None:
        """Add all that the other has, but for its objective."""
        for mine, theirs in (
            (self.endings, other.endings),
            (self.failures, other.failures),
            (self.met, other.met),
        ):
            mine.update(theirs)  # type: ignore[arg-type]
        self.good += other.good
        self.prompt_tokens += other.prompt_tokens
        self.started_prompt_tokens += other.started_prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.output_tokens += other.output_tokens
        self.attempts += other.attempts
        self.resumes += other.resumes
        self.resumed += other.resumed
        for name in LATENCIES:
            getattr(self, name).merge(getattr(other, name))

    @property
    def num_judged(self) -> int:
        return self.endings[Ending.COMPLETED] + self.endings[Ending.FAILED]

    @property
    def attainment(self) -> float:
        return self.good / self.num_judged if self.num_judged else 0.0

    def document(self, duration_s: float) -> dict[str, Any]:
        """The part that each class has for itself."""
        judged = self.num_judged
        document: dict[str, Any] = {
            "ended": sum(self.endings.values()),
            "completed": self.endings[Ending.COMPLETED],
            "failed": self.endings[Ending.FAILED],
            "cancelled": self.endings[Ending.CANCELLED],
            "failures": dict(sorted(self.failures.items())),
            "slo": None if self.slo is None else str(self.slo),
            "good": self.good,
            "goodput_rps": _ratio(self.good, duration_s),
            "attainment": self.attainment,
        }
        if self.slo is not None:
            names = [part.bounds_ms[0][0] for part in self.slo.parts()]
            document["attainment_by_metric"] = {
                name: self.met[name] / judged if judged else 0.0 for name in names
            }
        for name in LATENCIES:
            document[name] = getattr(self, name).figures()
        return document

    def _take_times(self, request: Ended) -> None:
        for values, value in (
            (self.ttft_s, request.ttft_s),
            (self.tpot_s, request.tpot_s),
            (self.e2e_s, request.e2e_s),
            (self.second_token_gap_s, request.second_gap_s),
        ):
            if value is not None:
                values.add(value)

    def _judge(self, request: Ended) -> None:
        if self.slo is None:
            self.good += request.ending is Ending.COMPLETED
            return
        met = [part.bounds_ms[0][0] for part in self.slo.parts() if part.met_by(request)]
        self.met.update(met)
        self.good += len(met) == len(self.slo.bounds_ms)


class RequestFigures(Observer):
    """Collects all of it. ``slo``: of requests whose class promises nothing."""

    def __init__(self, slo: Slo | None = None) -> None:
        self.slo = slo
        self.num_arrived = 0
        self.last_arrival_s = 0.0
        self.gaps_s = LogHistogram()
        self._by_class: dict[ServiceClass, Tally] = {}

    def arrived(self, at_s: float, request_id: RequestId, prompt_tokens: int) -> None:
        self.num_arrived += 1
        self.last_arrival_s = at_s

    def ended(self, at_s: float, request: Ended) -> None:
        tally = self._by_class.get(request.service)
        if tally is None:
            tally = Tally(slo_of(request.service) or self.slo)
            self._by_class[request.service] = tally
        tally.take(request)

    def gaps(self, gaps_s: Sequence[float], count: int) -> None:
        self.gaps_s.add_each(gaps_s, count)

    def overall(self) -> Tally:
        """Of all classes together. Its objective is the run's, or that of the only class."""
        tallies = list(self._by_class.values())
        if len(tallies) == 1:
            return tallies[0]
        whole = Tally(self.slo)
        for tally in tallies:
            whole.merge(tally)
        return whole

    def by_name(self) -> dict[str, Tally]:
        """The classes of which there were requests."""
        listed = {service.name: tally for service, tally in self._by_class.items()}
        return dict(sorted(listed.items()))

    def document(self, duration_s: float) -> dict[str, Any]:
        """Of the whole run, with a part for each class if there are several."""
        whole = self.overall()
        document = {"requests": self.num_arrived, **whole.document(duration_s)}
        document["unfinished"] = self.num_arrived - document["ended"]
        document["itl_s"] = figures_of(self.gaps_s)
        completed, output_tokens = document["completed"], whole.output_tokens
        document["throughput"] = {
            "requests_per_s": _ratio(completed, duration_s),
            "prompt_tokens_per_s": _ratio(whole.started_prompt_tokens, duration_s),
            "output_tokens_per_s": _ratio(output_tokens, duration_s),
        }
        document["tokens"] = {
            "prompt": whole.prompt_tokens,
            "cached": whole.cached_tokens,
            "output": output_tokens,
        }
        document["cache_hit_rate"] = _ratio(whole.cached_tokens, whole.started_prompt_tokens)
        document["attempts"] = {
            "all": whole.attempts,
            "resumes": whole.resumes,
            "resumed_requests": whole.resumed,
        }
        if len(self._by_class) > 1:
            document["classes"] = {
                name: tally.document(duration_s) for name, tally in self.by_name().items()
            }
        return document


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
