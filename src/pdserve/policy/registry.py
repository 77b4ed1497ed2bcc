"""Policies by name, with their settings: what ``--policy`` and ``--batching`` take.

A policy is written as its name, or as its name and settings: ``splitwise`` or
``splitwise:queue_threshold_tokens=4096``. The settings of a policy are the fields of its class, all
of them numbers. A recording keeps what was written, so that a replay makes the same policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pdserve.core.errors import ConfigError, UnknownNameError
from pdserve.policy.aggregated import Aggregated
from pdserve.policy.batch import BatchPolicy, FcfsBatching
from pdserve.policy.cluster import RoutePolicy
from pdserve.policy.power_of_two import PowerOfTwo
from pdserve.policy.predicted import Predicted
from pdserve.policy.prefix_aware import PrefixAware
from pdserve.policy.random_choice import RandomChoice
from pdserve.policy.round_robin import RoundRobin
from pdserve.policy.shortest_queue import ShortestQueue
from pdserve.policy.splitwise import Splitwise
from pdserve.policy.splitwise_batching import SplitwiseBatching

ROUTE_POLICIES: Mapping[str, type[RoutePolicy]] = {
    "aggregated": Aggregated,
    "power_of_two": PowerOfTwo,
    "predicted": Predicted,
    "prefix_aware": PrefixAware,
    "random": RandomChoice,
    "round_robin": RoundRobin,
    "shortest_queue": ShortestQueue,
    "splitwise": Splitwise,
}
DEFAULT_POLICY = "predicted"

BATCH_POLICIES: Mapping[str, type[BatchPolicy]] = {
    "fcfs": FcfsBatching,
    "splitwise": SplitwiseBatching,
}
DEFAULT_BATCHING = "fcfs"


def make_policy(written: str, **settings: float) -> RoutePolicy:
    """A routing policy. Raises `ConfigError` naming the policies, or the settings, that exist."""
    policy: RoutePolicy = _make("routing policy", ROUTE_POLICIES, written, settings)
    return policy


def make_batching(written: str = DEFAULT_BATCHING, **settings: float) -> BatchPolicy:
    """A batch policy. Raises `ConfigError` naming the policies, or the settings, that exist."""
    policy: BatchPolicy = _make("batch policy", BATCH_POLICIES, written, settings)
    return policy


def default_batching(policy: str) -> str:
    """The batch policy that belongs to a routing policy, if it is not said."""
    return "splitwise" if policy.partition(":")[0] == "splitwise" else DEFAULT_BATCHING


def _make(
    kind: str, known: Mapping[str, type[Any]], written: str, settings: Mapping[str, float]
) -> Any:
    name, _, rest = written.partition(":")
    if name not in known:
        raise UnknownNameError(kind, name, known)
    made = known[name]
    numbers: dict[str, Any] = {item.name: type(item.default) for item in fields(made)}
    given: dict[str, object] = dict(settings)
    for pair in rest.split(",") if rest else ():
        setting, _, number = pair.partition("=")
        given[setting.strip()] = number
    values = {}
    for setting, value in given.items():
        if setting not in numbers:
            raise UnknownNameError(f"setting of {kind} {name}", setting, numbers)
        values[setting] = _number(numbers[setting], value, f"{kind} {name}: {setting}")
    return made(**values)


def _number(number: type[float], value: object, what: str) -> float:
    try:
        made = number(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        made = number(-1)
    if not 0 <= made < float("inf"):
        whole = "a whole number" if number is int else "a number"
        raise ConfigError(f"{what} is {value!r}; it must be {whole} of 0 or more")
    return made
