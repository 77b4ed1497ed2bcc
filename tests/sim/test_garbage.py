"""What simulations leave behind is gone after a while, however many there are."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from pdserve.node.worker import WorkerNode
from pdserve.sim import garbage


def num_workers() -> int:
    return sum(type(found) is WorkerNode for found in gc.get_objects())


def test_many_simulations_keep_no_more_than_a_few(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage, "LOOKED_AFTER_S", 0.0)
    load = [(0.01 * index, 40, 5) for index in range(10)]

    def simulate() -> int:
        lab.run(lab.settings("2xm:prefill,2xm:decode", lab.machine()), lab.requests(*load))
        return num_workers()

    simulate()
    before = simulate()
    assert max(simulate() for _ in range(8)) <= before + 4
