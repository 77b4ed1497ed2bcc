"""Whatever happens in whatever order: one owner, the right answer, and nothing left behind.

A failure shows a scenario and a list of numbers; ``History(scenario).play(numbers)`` repeats it.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from virtual_cluster import ClusterSpec
from virtual_cluster.scenario import BATCHINGS, FAULTS, POLICIES, TOPOLOGIES, Scenario
from virtual_cluster.schedule import NUMBERS, History, numbers_of, shortest_failure

from pdserve.node.settings import RouterSettings

routers = st.builds(
    RouterSettings,
    max_attempts=st.just(10_000),
    queue_timeout_s=st.sampled_from([30.0, 8.0, 0.5]),
    max_queued_requests=st.sampled_from([1024, 2]),
    patience_s=st.sampled_from([10.0, 0.1, 0.0]),
    admission=st.sampled_from(["none", "predicted", "early"]),
)
specs = st.builds(
    ClusterSpec,
    workers=st.sampled_from(TOPOLOGIES),
    num_blocks=st.sampled_from([40, 20, 12, 8]),
    block_size=st.sampled_from([4, 2]),
    max_model_tokens=st.sampled_from([64, 32, 24]),
    max_step_tokens=st.sampled_from([64, 16, 8]),
    mixed_chunk_tokens=st.sampled_from([32, 8, 4]),
    max_running=st.sampled_from([16, 4, 2]),
    policy=st.sampled_from(POLICIES),
    batching=st.sampled_from(BATCHINGS),
    one_shot_tokens=st.sampled_from([0, 8, 100]),
    lease_s=st.sampled_from([4.0, 1.0, 0.05]),
    ticket_timeout_s=st.sampled_from([4.0, 1.0, 0.05]),
    prefix_cache=st.sampled_from([True, True, True, False]),
    fewer_blocks=st.sampled_from([(0,), (0,), (0, 2), (3, 0)]),
    numerics=st.sampled_from([("class a",), ("class a", "class b")]),
    router=routers,
)


def scenarios(faults: str) -> st.SearchStrategy[Scenario]:
    return st.builds(
        Scenario,
        spec=specs,
        faults=st.just(faults),
        percent=st.sampled_from([10, 3, 25]),
        poison=st.booleans(),
        late_peer_lost=st.booleans(),
        fetching=st.booleans(),
    )


schedules = st.lists(st.integers(0, NUMBERS - 1), min_size=200, max_size=320)


@pytest.mark.parametrize("faults", FAULTS)
def test_nothing_leaks_and_every_answer_is_right(faults: str) -> None:
    @settings(
        max_examples=60,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(scenario=scenarios(faults), numbers=schedules)
    def holds(scenario: Scenario, numbers: list[int]) -> None:
        History(scenario).play(numbers)

    holds()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("faults", FAULTS)
def test_many_long_histories(faults: str) -> None:
    for seed in range(500):
        random = Random(seed)
        scenario = replace(Scenario.of(random), faults=faults)
        numbers = numbers_of(random, 1000)
        try:
            History(scenario).play(numbers)
        except AssertionError as error:
            left = shortest_failure(scenario, numbers)
            raise AssertionError(f"{scenario=}\nnumbers={left}") from error
