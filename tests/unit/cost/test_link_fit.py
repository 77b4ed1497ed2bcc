"""The fit of hand-offs: what remains visible, and how fast the link is when nothing hides it."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdserve.core.ids import WorkerId
from pdserve.core.step import TransferSample
from pdserve.cost.fit import LinkFit
from pdserve.cost.link import LinkModel

PEER = WorkerId("decode-0")
PRIOR = LinkModel(fixed_s=0.003, per_byte_s=2e-10, hidden_share=0.9)
TRUTH = LinkModel(fixed_s=0.006, per_byte_s=1e-9, hidden_share=0.9)


def learn(fit: LinkFit, *, hidden_s: float, count: int = 300, seed: int = 1) -> LinkFit:
    draw = random.Random(seed)
    for _ in range(count):
        num_bytes = draw.randint(100_000, 50_000_000)
        exposed_s = TRUTH.exposed_s(num_bytes, hidden_s) * draw.uniform(0.9, 1.1)
        fit.add(TransferSample(PEER, num_bytes, exposed_s, hidden_s))
    return fit


def test_before_any_hand_off_the_stated_prior_holds() -> None:
    assert LinkFit(PRIOR).model() == PRIOR


def test_one_shot_hand_offs_show_the_constant_and_the_rate() -> None:
    model = learn(LinkFit(PRIOR), hidden_s=0.0).model()
    assert model.fixed_s == pytest.approx(TRUTH.fixed_s, rel=0.2)
    assert model.per_byte_s == pytest.approx(TRUTH.per_byte_s, rel=0.05)


def test_what_the_prefill_hid_in_part_still_shows_the_rate() -> None:
    fit = learn(LinkFit(PRIOR), hidden_s=0.02)
    for num_bytes in (1_000_000, 20_000_000, 50_000_000):
        predicted_s = fit.model().exposed_s(num_bytes, 0.02)
        assert predicted_s == pytest.approx(TRUTH.exposed_s(num_bytes, 0.02), rel=0.2)
    assert fit.model().per_byte_s == pytest.approx(TRUTH.per_byte_s, rel=0.1)
    assert fit.error < 0.1


def test_hand_offs_that_are_all_hidden_show_the_constant_alone() -> None:
    """The rate stays the prior's: nothing was seen of it."""
    fit = learn(LinkFit(PRIOR), hidden_s=1.0)
    assert fit.model().exposed_s(20_000_000, 1.0) == pytest.approx(TRUTH.fixed_s, rel=0.1)
    ratio = fit.model().per_byte_s / PRIOR.per_byte_s
    assert 0.5 < ratio < 3.0


@example([(0, 1e-260, 0.0), (0, 1e-260, 0.0)])
@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(0, 1 << 40), st.floats(0.0, 100.0), st.floats(0.0, 100.0)),
        max_size=60,
    )
)
def test_whatever_is_measured_a_link_costs_nothing_negative(
    measured: list[tuple[int, float, float]],
) -> None:
    fit = LinkFit(PRIOR)
    for sample in measured:
        fit.add(TransferSample(PEER, *sample))
        model = fit.model()
        assert 0.0 <= model.fixed_s < 1e6
        assert 0.0 <= model.per_byte_s < 1e6
