"""Policies by name: settings are read, and errors say what there is."""

from __future__ import annotations

import pytest

from pdserve.config import ServeConfig, resolve
from pdserve.core.errors import ConfigError
from pdserve.policy.batch import FcfsBatching
from pdserve.policy.registry import (
    BATCH_POLICIES,
    DEFAULT_POLICY,
    ROUTE_POLICIES,
    default_batching,
    make_batching,
    make_policy,
)
from pdserve.policy.splitwise import Splitwise
from pdserve.policy.splitwise_batching import SplitwiseBatching


@pytest.mark.parametrize("name", sorted(ROUTE_POLICIES))
def test_every_policy_is_made_by_its_name_alone(name: str) -> None:
    made = make_policy(name)
    assert type(made) is ROUTE_POLICIES[name]
    assert made == make_policy(name)


def test_the_default_is_one_of_them() -> None:
    assert make_batching() == FcfsBatching()


@pytest.mark.parametrize(
    "made",
    [
        make_policy("splitwise:queue_threshold_tokens=4096"),
        make_policy("splitwise: queue_threshold_tokens=4096"),
        make_policy("splitwise", queue_threshold_tokens=4096),
    ],
)
def test_settings_are_written_or_passed(made: object) -> None:
    assert made == Splitwise(queue_threshold_tokens=4096)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("jsq", "'jsq'. There are aggregated, power_of_two, pre"),
        ("split_wise", "did you mean splitwise?"),
        ("", "There are"),
        ("ShortestQueue", "There are"),
        ("splitwise:threshold=1", "There are queue_threshold_tokens"),
        ("splitwise:queue_threshold_token=1", "did you mean queue_threshold_tokens?"),
        ("random:seed=1", "there is no setting of routing policy random 'seed'. There is none"),
        ("splitwise:queue_threshold_tokens", "a whole number of 0 or more"),
        ("splitwise:queue_threshold_tokens=many", "is 'many'; it must be a whole number"),
        ("splitwise:queue_threshold_tokens=-1", "is '-1'"),
        ("splitwise:queue_threshold_tokens=1.5", "is '1.5'"),
        ("splitwise:", None),
    ],
)
def test_what_is_not_there_is_told(written: str, told: str | None) -> None:
    if told is None:
        assert make_policy(written) == Splitwise()
        return
    with pytest.raises(ConfigError) as caught:
        make_policy(written)
    assert told in str(caught.value)


def test_batch_policies_are_named_too() -> None:
    assert make_batching("splitwise") == SplitwiseBatching()
    with pytest.raises(ConfigError, match=r"no batch policy 'orca'.*There are fcfs, splitwise"):
        make_batching("orca")


@pytest.mark.parametrize("policy", sorted(ROUTE_POLICIES))
def test_splitwise_batches_as_it_routes_and_others_first_come_first_served(policy: str) -> None:
    expected = "splitwise" if policy == "splitwise" else "fcfs"
    assert default_batching(policy) == expected
    assert expected in BATCH_POLICIES


def test_the_config_takes_policies() -> None:
    config = resolve({"policy": "splitwise:queue_threshold_tokens=9"}, {}).config
    assert config.batch_policy == "splitwise"
    assert ServeConfig(policy="splitwise", batching="fcfs").batch_policy == "fcfs"
    assert resolve({}, {"PDSERVE_POLICY": "random"}).config.policy == "random"
    assert ServeConfig().policy == DEFAULT_POLICY
    with pytest.raises(ConfigError, match="no routing policy 'fastest'"):
        ServeConfig(policy="fastest")
    with pytest.raises(ConfigError, match="no batch policy 'fastest'"):
        ServeConfig(batching="fastest")
