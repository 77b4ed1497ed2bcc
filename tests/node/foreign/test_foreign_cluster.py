"""Requests through the same router, served by engines that batch for themselves."""

from __future__ import annotations

import pytest
from foreign_cluster import Cluster, Spec, make_request


@pytest.mark.parametrize("workers", [(0, 0, 1), (1, 1, 0), (2, 2, 1)])
def test_answers_are_right_wherever_they_are_computed(workers: tuple[int, int, int]) -> None:
    cluster = Cluster(Spec(workers=workers))
    for i in range(6):
        cluster.submit(
            make_request(f"r{i}", tuple(range(i, 12 + i)), num_choices=1 + i % 3, seed=i)
        )
    cluster.run()
    cluster.check_end()
    print(cluster.sent)
