"""The metric families of one gateway: names, labels, buckets.

What vLLM has too carries vLLM's name, labels and buckets (``vllm/v1/metrics/loggers.py``), because
dashboards for them exist; ``engine`` is our worker id. What only we have starts with ``pdserve:``.
Everything is registered in a private registry, so that two gateways fit in one process.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

FIRST_TOKEN_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
HANDOFF_BUCKETS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)
RATIO_BUCKETS = (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
REGRET_BUCKETS_S = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
FINISHED_REASONS = ("stop", "length", "abort", "error")
HANDOFF_OUTCOMES = ("accepted", "failed")
FETCH_OUTCOMES = ("sent", "failed", "lost", "late")
ROUTE_KINDS = ("split", "local")
MAX_LABEL_VALUES = 32


def token_count_buckets(max_tokens: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to ``max_tokens``."""
    buckets = []
    scale = 1
    while scale <= max_tokens:
        buckets += [scale * step for step in (1, 2, 5) if scale * step <= max_tokens]
        scale *= 10
    return buckets


class RequestFamilies:
    """Figures of the gateway as a whole, bound to the label ``model_name``."""

    def __init__(self, registry: CollectorRegistry, model_name: str, max_model_tokens: int) -> None:
        self._registry = registry
        self._model_name = model_name
        self._series: dict[Counter, dict[str, Counter]] = {}
        self._make_counters()
        self._show_zeros()
        self._make_durations()
        buckets = token_count_buckets(max_model_tokens)
        self.request_prompt_tokens = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", buckets
        )
        self.request_generation_tokens = self._histogram(
            "vllm:request_generation_tokens", "Output tokens of a request.", buckets
        )

        self.ttft_ratio = self._histogram(
            "pdserve:ttft_measured_to_predicted",
            "Time to first token over what the router had predicted.",
            RATIO_BUCKETS,
        )
        self.tpot_ratio = self._histogram(
            "pdserve:tpot_measured_to_predicted",
            "Time per output token over what the router had predicted.",
            RATIO_BUCKETS,
        )
        self.regret_s = self._seconds(
            "pdserve:route_regret",
            "By how much the runner-up, as predicted, would have been faster; 0 if it would not.",
            REGRET_BUCKETS_S,
        )

    def _make_counters(self) -> None:
        count = self._counter
        self.prompt_tokens = count("vllm:prompt_tokens", "Prompt tokens of answered requests.")
        self.generation_tokens = count("vllm:generation_tokens", "Tokens given to clients.")
        self.handoff_bytes = count("pdserve:handoff_bytes", "Bytes of KV moved by hand-offs.")
        self.handoff_reused_blocks = count(
            "pdserve:handoff_reused_blocks", "Blocks that a decode worker already had."
        )
        self._success = self._counter_by(
            "vllm:request_success", "Ended requests by reason.", "finished_reason"
        )
        self._handoffs = self._counter_by("pdserve:handoffs", "Closed hand-offs.", "outcome")
        self.route_cached_tokens = count(
            "pdserve:route_cached_tokens",
            "Prompt tokens that were, as far as the router knew, cached where they were routed to.",
        )
        self._fetches = self._counter_by(
            "pdserve:prefix_fetches", "Requests held back for a prefix to be fetched.", "outcome"
        )
        self._routes = self._counter_by("pdserve:routes", "Routes that were chosen.", "kind")
        self._role_changes = self._counter_by(
            "pdserve:role_changes", "Workers that were put into this pool.", "role"
        )
        self._resumes = self._counter_by("pdserve:resumes", "Attempts after the first.", "reason")
        self._rejected = self._counter_by(
            "pdserve:requests_rejected", "Requests that failed before their first token.", "kind"
        )

    def _make_durations(self) -> None:
        self.first_token_s = self._seconds(
            "vllm:time_to_first_token", "Submission to first token.", FIRST_TOKEN_BUCKETS_S
        )
        self.inter_token_s = self._seconds(
            "vllm:inter_token_latency", "Gap between deliveries of tokens.", TOKEN_BUCKETS_S
        )
        self.output_token_s = self._seconds(
            "vllm:request_time_per_output_token", "Mean gap of a request.", TOKEN_BUCKETS_S
        )
        self.request_s = self._seconds(
            "vllm:e2e_request_latency", "Submission to end.", REQUEST_BUCKETS_S
        )
        self.queue_s = self._seconds(
            "vllm:request_queue_time", "Submission to start of prefill.", REQUEST_BUCKETS_S
        )
        self.prefill_s = self._seconds(
            "vllm:request_prefill_time", "Start to end of prefill.", REQUEST_BUCKETS_S
        )
        self.decode_s = self._seconds(
            "vllm:request_decode_time", "First token to end.", REQUEST_BUCKETS_S
        )
        self.handoff_s = self._seconds(
            "pdserve:handoff", "Header sent to hand-off closed.", HANDOFF_BUCKETS_S
        )

    def success(self, finished_reason: str) -> Counter:
        return self._labelled(self._success, finished_reason)

    def handoffs(self, outcome: str) -> Counter:
        return self._labelled(self._handoffs, outcome)

    def fetches(self, outcome: str) -> Counter:
        return self._labelled(self._fetches, outcome)

    def routes(self, kind: str) -> Counter:
        return self._labelled(self._routes, kind)

    def role_changes(self, role: str) -> Counter:
        return self._labelled(self._role_changes, role)

    def resumes(self, reason: str) -> Counter:
        return self._labelled(self._resumes, reason)

    def rejected(self, kind: str) -> Counter:
        return self._labelled(self._rejected, kind)

    def _labelled(self, family: Counter, value: str) -> Counter:
        """One series of a family; past a bound the label is ``other``, whatever a node says."""
        series = self._series.setdefault(family, {})
        if value not in series:
            if len(series) >= MAX_LABEL_VALUES:
                value = "other"
            series[value] = family.labels(self._model_name, value)
        return series[value]

    def _show_zeros(self) -> None:
        """Series with known labels exist from the start: a rate over their first event is right."""
        for reason in FINISHED_REASONS:
            self.success(reason)
        for outcome in HANDOFF_OUTCOMES:
            self.handoffs(outcome)
        for outcome in FETCH_OUTCOMES:
            self.fetches(outcome)
        for kind in ROUTE_KINDS:
            self.routes(kind)

    def _counter(self, name: str, text: str) -> Counter:
        family = Counter(name, text, ["model_name"], registry=self._registry)
        return family.labels(self._model_name)

    def _counter_by(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, text, ["model_name", label], registry=self._registry)

    def _seconds(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return self._histogram(f"{name}_seconds", text, buckets)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(name, text, ["model_name"], registry=self._registry, buckets=buckets)
        return family.labels(self._model_name)


class WorkerFamilies:
    """Figures per worker. Gauges of a lost worker go; its counters stay, as counters must.

    Keys of the counters are the fields of `LoadReport` that they follow.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._model_name = model_name
        self._gauges = {
            "num_running": self._gauge(
                "vllm:num_requests_running", "Sequences in the batch.", "engine"
            ),
            "num_waiting": self._gauge(
                "vllm:num_requests_waiting", "Sequences in the queue.", "engine"
            ),
            "kv_usage": self._gauge(
                "vllm:kv_cache_usage_perc",
                "Share of KV blocks in use, 0 to 1; cached ones that may be evicted are free.",
                "engine",
            ),
            "quarantined_blocks": self._gauge(
                "pdserve:quarantined_blocks",
                "Blocks that a writer may still write into.",
                "worker",
            ),
            "open_leases": self._gauge(
                "pdserve:open_leases", "Hand-offs that blocks are held for.", "worker"
            ),
        }
        self._counters = {
            "prefix_queries_tokens": self._counter(
                "vllm:prefix_cache_queries", "Tokens looked up in the prefix cache."
            ),
            "prefix_hits_tokens": self._counter(
                "vllm:prefix_cache_hits", "Tokens found in the prefix cache."
            ),
            "num_preemptions": self._counter(
                "vllm:num_preemptions", "Sequences put back for want of blocks."
            ),
        }
        # Reports come a hundred times a second, and looking a series up costs more than setting it.
        self._gauges_of: dict[str, dict[str, Gauge]] = {}
        self._counters_of: dict[tuple[str, str], Counter] = {}
        self._up = self._gauge("pdserve:worker_up", "1 if the worker serves.", "worker", "role")

    @property
    def counted(self) -> tuple[str, ...]:
        """Keys of the counters."""
        return tuple(self._counters)

    def set_up(self, worker: str, role: str, up: bool) -> None:
        self._up.labels(self._model_name, worker, role).set(up)

    def forget_role(self, worker: str, role: str) -> None:
        self._up.remove(self._model_name, worker, role)

    def set_gauges(self, worker: str, values: dict[str, float]) -> None:
        series = self._gauges_of.get(worker)
        if series is None:
            series = self._gauges_of[worker] = {
                key: gauge.labels(self._model_name, worker) for key, gauge in self._gauges.items()
            }
        for key, value in values.items():
            series[key].set(value)

    def forget_gauges(self, worker: str) -> None:
        self._gauges_of.pop(worker, None)
        for gauge in self._gauges.values():
            gauge.remove(self._model_name, worker)

    def add(self, worker: str, key: str, amount: float) -> None:
        series = self._counters_of.get((worker, key))
        if series is None:
            series = self._counters[key].labels(self._model_name, worker)
            self._counters_of[worker, key] = series
        if amount:
            series.inc(amount)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, ["model_name", *labels], registry=self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model_name", "engine"], registry=self._registry)
