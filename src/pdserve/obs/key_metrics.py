"""What was asked for under which API key, by the key's name, for Prometheus.

Apart from the other metrics, because names of keys are for those alone who may see them.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest


class KeyMetrics:
    """Of one gateway, for one thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "pdserve:api_key_requests",
            "Requests that were sent with a key of this name.",
            ["api_key"],
            registry=self._registry,
        )
        self._refusals = Counter(
            "pdserve:api_key_refusals",
            "Requests refused because the key met its limit of requests or of tokens.",
            ["api_key", "limit"],
            registry=self._registry,
        )
        self._tokens = Gauge(
            "pdserve:api_key_tokens_in_flight",
            "Tokens reserved for running requests: prompts, and answers as long as they may be.",
            ["api_key"],
            registry=self._registry,
        )
        self._unauthorized = Counter(
            "pdserve:unauthorized_requests",
            "Requests without a key that is taken here.",
            registry=self._registry,
        )

    def on_request(self, name: str) -> None:
        self._requests.labels(name).inc()

    def on_refusal(self, name: str, limit: str) -> None:
        self._refusals.labels(name, limit).inc()

    def on_unauthorized(self) -> None:
        self._unauthorized.inc()

    def exposition(self, tokens_in_flight: Iterable[tuple[str, int]]) -> bytes:
        """Text in Prometheus' exposition format 0.0.4."""
        self._tokens.clear()
        for name, num_tokens in tokens_in_flight:
            self._tokens.labels(name).set(num_tokens)
        return generate_latest(self._registry)
