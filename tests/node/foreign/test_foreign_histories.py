"""Random event orders and faults: no wrong token, no lost answer, nothing left behind."""

from __future__ import annotations

import pytest
from foreign_cluster import Spec
from foreign_cluster.history import NUMBERS, History
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SPECS = {
    "1 mixed": Spec(workers=(0, 0, 1)),
    "1P 1D": Spec(),
    "1P 1D, little memory": Spec(
        num_blocks=16, max_model_tokens=60, engine_step_tokens=7, max_exports=1
    ),
    "1P 1D, drawn again": Spec(kinds={"decode-0": "redraws"}),
    "1P 1D, drawn otherwise": Spec(kinds={"decode-0": "drifts"}),
    "2P 2D 1M": Spec(workers=(2, 2, 1)),
    "native P": Spec(workers=(1, 1, 1), kinds={"prefill-0": "native"}),
    "native D": Spec(workers=(1, 2, 0), kinds={"decode-0": "native"}),
}


@pytest.mark.parametrize("name", SPECS)
@settings(
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(numbers=st.lists(st.integers(0, NUMBERS - 1), min_size=50, max_size=400))
def test_random_histories(name: str, numbers: list[int]) -> None:
    History(SPECS[name]).play(numbers)
