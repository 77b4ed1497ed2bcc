"""The vectorised sampler against a slow and obvious one, and against itself in other batches."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.request import SamplingParams
from pdserve.core.step import SampleSpec
from pdserve.engine.torch.philox import uniforms
from pdserve.engine.torch.sampler import TOP_P_CANDIDATES, first_best, keep_threshold, sample

VOCAB = 40


def spec(
    *,
    choices: tuple[int, ...] = (0,),
    index: int = 0,
    history: tuple[int, ...] | None = None,
    num_prompt_tokens: int = 0,
    **params: Any,
) -> SampleSpec:
    return SampleSpec(
        params=SamplingParams(**{"max_tokens": 99, "seed": 1, **params}),
        choices=choices,
        index=index,
        history=history,
        num_prompt_tokens=num_prompt_tokens,
    )


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def slow_sample(logits: list[float], what: SampleSpec) -> list[int]:
    """One row, token by token, as the documentation of the parameters says it."""
    params = what.params
    values = list(map(float, logits))
    if what.index < params.min_tokens:
        for token in params.ending_token_ids:
            values[token] = -math.inf
    for token, bias in params.logit_bias:
        values[token] += bias
    if what.history is not None:
        output = Counter(what.history[what.num_prompt_tokens :])
        for token in set(what.history):
            if values[token] > 0:
                values[token] /= params.repetition_penalty
            else:
                values[token] *= params.repetition_penalty
            values[token] -= params.frequency_penalty * output[token]
            values[token] -= params.presence_penalty * (output[token] > 0)
    if params.temperature == 0:
        return [values.index(max(values))] * len(what.choices)
    best = max(values)
    weights = [math.exp((value - best) / params.temperature) for value in values]
    kept = [w if w >= params.min_p * max(weights) else 0.0 for w in weights]
    if params.top_k:
        least = sorted(kept, reverse=True)[: params.top_k][-1]
        kept = [w if w >= least else 0.0 for w in kept]
    mass, least = 0.0, 0.0
    for weight in sorted(kept, reverse=True):
        mass, least = mass + weight, weight
        if mass >= params.top_p * sum(kept):
            break
    kept = [w if w >= least else 0.0 for w in kept]
    tokens = []
    for choice in what.choices:
        target = uniforms([params.seed], [choice], [what.index])[0] * sum(kept)
        cumulative = np.cumsum(kept)
        tokens.append(int(np.searchsorted(cumulative, target, side="right")))
    return tokens


ids = st.integers(0, VOCAB - 1)
specs = st.builds(
    lambda prompt, output, bias, **params: spec(
        history=(*prompt, *output),
        num_prompt_tokens=len(prompt),
        index=len(output),
        logit_bias=tuple(bias.items()),
        **params,
    ),
    prompt=st.lists(ids, min_size=1, max_size=8),
    output=st.lists(ids, max_size=8),
    bias=st.dictionaries(ids, st.sampled_from([-100.0, -1.5, 2.5, 100.0]), max_size=3),
    choices=st.sampled_from([(0,), (2,), (0, 1, 2), (5, 1)]),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, VOCAB, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.7, -0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    min_tokens=st.sampled_from([0, 4]),
    eos_token_ids=st.just((7, 8)),
    stop_token_ids=st.sampled_from([(), (9,)]),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, 0, 3]),
)


@settings(max_examples=150, derandomize=True, database=None)
@given(st.lists(specs, min_size=1, max_size=6), st.integers(0, 1000))
def test_equals_the_slow_sampler_and_itself_alone(batch: list[SampleSpec], seed: int) -> None:
    logits = random_logits(len(batch), seed=seed)
    before = logits.clone()
    together = sample(logits, batch)
    assert torch.equal(logits, before)
    for row, what, tokens in zip(logits, batch, together, strict=True):
        assert [token.token_id for token in tokens] == slow_sample(row.tolist(), what)
        assert sample(row[None], [what]) == (tokens,)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_a_real_vocabulary_does_not_feel_its_neighbours(threads: int) -> None:
    """Filters, draws and log-probabilities bit by bit, at a size where torch splits reductions."""
    torch.set_num_threads(threads)
    logits = random_logits(9, vocab=49152)
    batch = [
        spec(temperature=t, top_p=p, top_k=k, min_p=m, logprobs=5, choices=(0, 1), seed=i)
        for i, (t, p, k, m) in enumerate(
            [
                (1.0, 1.0, 0, 0.0),
                (0.7, 0.9, 0, 0.0),
                (1.5, 0.99, 0, 0.0),
                (1.0, 0.95, 50, 0.0),
                (1.0, 1.0, 0, 0.05),
                (0.0, 1.0, 0, 0.0),
                (2.0, 1.0, 400, 0.0),
                (4.0, 0.999, 0, 0.0),
                (1.0, 0.5, 20000, 0.0),
            ]
        )
    ]
    together = sample(logits, batch)
    for i in range(9):
        assert sample(logits[i : i + 1], batch[i : i + 1]) == together[i : i + 1]
    backwards = sample(logits.flip(0), batch[::-1])
    assert backwards == together[::-1]


def test_draws_follow_the_distribution() -> None:
    """Chi-squared over the tokens kept; 37.7 is about the 99.99 % quantile for 11 degrees."""
    logits = random_logits(1, vocab=30)
    what = spec(choices=tuple(range(20000)), temperature=1.3, top_k=12)
    counts = Counter(token.token_id for token in sample(logits, [what])[0])
    values, tokens = (logits[0] / 1.3).topk(12)
    expected = values.softmax(0) * 20000
    assert set(counts) <= set(tokens.tolist())
    observed = torch.tensor([counts[token] for token in tokens.tolist()])
    assert float(((observed - expected) ** 2 / expected).sum()) < 37.7


def test_choices_and_indexes_draw_for_themselves() -> None:
    logits = torch.zeros(1, VOCAB)
    several = sample(logits, [spec(choices=(0, 1, 2), index=4)])[0]
    single = [sample(logits, [spec(choices=(c,), index=4)])[0][0] for c in (0, 1, 2)]
    assert list(several) == single
    assert len({sample(logits, [spec(index=i)])[0][0].token_id for i in range(30)}) > 10


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(1)
    what = spec(temperature=0.0, logit_bias=((11, 1000.0),), logprobs=4)
    (token,) = sample(logits, [what])[0]
    expected = logits[0].log_softmax(0)
    assert token.token_id == 11
    assert token.logprobs is not None
    assert token.logprobs.logprob == pytest.approx(float(expected[11]))
    assert token.logprobs.rank == int((expected > expected[11]).sum()) + 1
    values, tokens = expected.topk(4)
    assert [token for token, _ in token.logprobs.top] == tokens.tolist()
    assert [value for _, value in token.logprobs.top] == pytest.approx(values.tolist())


def test_ties_go_to_the_lower_id_and_are_kept_together() -> None:
    logits = torch.zeros(1, 8)
    logits[0, [2, 5, 6]] = 1.0
    (token,) = sample(logits, [spec(temperature=0.0, logprobs=2)])[0]
    assert token.token_id == 2
    assert token.logprobs is not None
    assert [token for token, _ in token.logprobs.top] == [2, 5]
    drawn = sample(logits, [spec(top_k=2, choices=tuple(range(60)))])[0]
    assert {token.token_id for token in drawn} == {2, 5, 6}


def test_top_p_beyond_the_first_candidates_sorts_the_row() -> None:
    """A flat row needs nearly all of its tokens for 0.9 of the mass; a peaked one does not."""
    vocab = 4 * TOP_P_CANDIDATES
    flat = torch.linspace(0.0, -0.001, vocab)
    peaked = torch.cat((torch.zeros(1), torch.full((vocab - 1,), -30.0)))
    params = [spec(top_p=0.9).params] * 2
    threshold = keep_threshold(torch.stack((flat, peaked)), params)
    assert int((flat >= threshold[0]).sum()) == pytest.approx(0.9 * vocab, abs=2)
    assert threshold[1] == 0.0


def test_extremes_stay_finite() -> None:
    """A temperature near 0 is greedy, a tiny one does not overflow, and -inf is never drawn."""
    logits = random_logits(1) * 1e4
    best = int(logits.argmax())
    for temperature in (1e-45, 1e-6, 1e-5, 1e-3):
        assert sample(logits, [spec(temperature=temperature)])[0][0].token_id == best
    lonely = torch.full((1, VOCAB), -math.inf)
    lonely[0, 13] = 0.0
    assert {t.token_id for t in sample(lonely, [spec(choices=(0, 1, 2), top_p=0.9)])[0]} == {13}


def test_a_row_of_nan_stays_in_the_vocabulary_and_to_itself() -> None:
    logits = random_logits(3)
    batch = [spec(temperature=1.0, top_p=0.9, seed=i, choices=(0, 1)) for i in range(3)]
    expected = sample(logits, batch)
    logits[1] = math.nan
    broken = sample(logits, batch)
    assert (broken[0], broken[2]) == (expected[0], expected[2])
    assert all(0 <= token.token_id < VOCAB for token in broken[1])


def test_ids_outside_the_vocabulary_are_left_alone() -> None:
    outside = (VOCAB, -1, 10**6)
    what = spec(
        temperature=0.0,
        min_tokens=5,
        stop_token_ids=outside,
        logit_bias=tuple((token, 50.0) for token in outside),
        history=(*outside, 3),
        repetition_penalty=2.0,
    )
    logits = random_logits(1).abs() + 1
    expected = logits[0].clone()
    expected[3] /= 2
    assert sample(logits, [what])[0][0].token_id == int(expected.argmax())


def test_ending_tokens_return_after_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 10.0
    early = spec(temperature=0.0, min_tokens=3, eos_token_ids=(7,), index=2)
    assert sample(logits, [early])[0][0].token_id != 7
    assert sample(logits, [replace(early, index=3)])[0][0].token_id == 7


@pytest.mark.parametrize("vocab", [64, 301, 384, 3072])
def test_the_first_of_the_best_is_taken(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    rows = torch.randint(0, 40, (50, vocab), generator=generator).float()
    rows[3] = float("-inf")
    rows[4, vocab // 2] = float("nan")
    expected = [row.tolist().index(max(row.tolist())) for row in rows]
    expected[4] = vocab // 2
    assert first_best(rows).tolist() == expected
    assert first_best(rows).tolist() == rows.argmax(dim=-1).tolist()
