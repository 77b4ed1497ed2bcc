"""Saved fits: what is read is what was written, and nothing else is read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.ids import WorkerId
from pdserve.core.step import StepSample, StepShape, TransferSample
from pdserve.cost.fit import LinkFit, StepFit
from pdserve.cost.prior import DEFAULT_SHAPE, device_of, link_prior, step_prior
from pdserve.cost.store import SavedLink, SavedSteps, StepKey, from_text, to_text

KEY = StepKey("0123", "torch", "cpu", "cpu-bf16-é")


def saved_steps() -> SavedSteps:
    fit = StepFit(step_prior(DEFAULT_SHAPE, device_of("cpu")))
    for number in range(1, 40):
        fit.add(StepSample(StepShape(0, 0, number, 100 * number), 0.01 + 1e-3 * number / 3))
        fit.add(StepSample(StepShape(number * 10, (number * 10) ** 2, 0, 0), 0.02 * number / 7))
    return SavedSteps(KEY, fit.state())


def saved_link() -> SavedLink:
    fit = LinkFit(link_prior("shm"))
    for number in range(1, 40):
        fit.add(TransferSample(WorkerId("w"), number * 10_000, 0.001 * number / 3, 0.001))
    return SavedLink("shm", fit.state())


@pytest.mark.parametrize("saved", [saved_steps(), saved_link()])
def test_a_fit_survives_as_text_bit_by_bit(saved: SavedSteps | SavedLink) -> None:
    assert from_text(to_text(saved)) == saved


def test_the_model_of_a_restored_fit_is_that_of_the_saved_one() -> None:
    first = saved_steps().fit
    restored = from_text(to_text(saved_steps()))
    assert isinstance(restored, SavedSteps)
    fit = StepFit(first.prior, state=restored.fit)
    assert fit.state() == first
    assert fit.model() == StepFit(first.prior, state=first).model()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 2),
        (("kind",), "shape"),
        (("key",), "torch"),
        (("fit",), None),
        (("fit", "prior", "per_pair_s"), -1.0),
        (("fit", "prior", "colour"), 1.0),
        (("fit", "decode", "moments"), [1.0]),
        (("fit", "decode", "weight"), float("nan")),
        (("fit", "decode", "log_level"), 1e9),
        (("fit", "prompt", "targets"), [1e200, 0.0, 0.0]),
        (("fit", "prompt", "num_samples"), "many"),
    ],
)
def test_text_that_is_no_fit_is_refused(path: tuple[str, ...], value: Any) -> None:
    document = json.loads(to_text(saved_steps()))
    inner = document
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=r"."):
        from_text(json.dumps(document))


@settings(max_examples=50)
@given(st.integers(0, 5000), st.text(max_size=3))
def test_broken_text_is_refused(at: int, instead: str) -> None:
    text = to_text(saved_link())
    broken = text[: at % len(text)] + instead
    with pytest.raises(ValueError, match=r"."):
        from_text(broken)
