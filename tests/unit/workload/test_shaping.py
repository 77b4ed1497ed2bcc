"""Changing a workload, its prompts, and how much of them a cache could serve."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from itertools import pairwise

import pytest

from pdserve.text.tokenizer import Tokenizer
from pdserve.workload import shaping
from pdserve.workload.prompts import WORDS, token_ids, words
from pdserve.workload.request import Segment, TraceRequest, own_segment
from pdserve.workload.reuse import prefix_reuse


def at(*times, output_tokens=10):
    return [
        TraceRequest(
            index=index, at_s=at_s, segments=(own_segment(index, 8),), output_tokens=output_tokens
        )
        for index, at_s in enumerate(times)
    ]


def times(requests):
    return [request.at_s for request in requests]


def test_window_and_scale():
    requests = at(0, 1, 2, 3, 4)
    chosen = list(shaping.window(requests, 1, 4))
    assert [request.index for request in chosen] == [1, 2, 3]
    assert times(chosen) == [0, 1, 2]
    assert times(shaping.scale(requests, 4)) == [0, 0.25, 0.5, 0.75, 1]


def test_other_arrivals_keep_order_and_sizes():
    moved = list(shaping.rearrive(at(0, 5, 9), iter([1.0, 1.5])))
    assert [(request.index, request.at_s) for request in moved] == [(0, 1.0), (1, 1.5)]


def test_ticks_are_smeared_over_themselves_in_order():
    ticks = [3.0 * (i // 40) for i in range(4000)]
    requests = at(*ticks)
    assert shaping.is_in_ticks(requests)
    smeared = list(shaping.smear(requests, seed=3))
    assert [request.index for request in smeared] == list(range(4000))
    assert all(before <= after for before, after in pairwise(times(smeared)))
    offsets = [after - before for before, after in zip(ticks, times(smeared), strict=True)]
    assert min(offsets) >= 0
    assert max(offsets) < 3.0
    assert statistics.fmean(offsets) == pytest.approx(1.5, rel=0.05)
    assert smeared == list(shaping.smear(requests, seed=3))
    assert not shaping.is_in_ticks(smeared)


def test_a_tick_ends_with_the_next_one_or_after_the_usual_time():
    ticks = [0, 3, 6, 7, 10, 30, 33]  # one came early, one after a pause
    smeared = list(shaping.smear(at(*(tick for tick in ticks for _ in range(200))), seed=0))
    latest = [max(times(smeared[200 * i : 200 * (i + 1)])) - tick for i, tick in enumerate(ticks)]
    assert latest == pytest.approx([3, 3, 1, 3, 3, 3, 3], abs=0.15)


def test_smearing_takes_requests_as_they_come():
    endless = (request for tick in itertools.count() for request in at(*[3.0 * tick] * 5))
    first = list(itertools.islice(shaping.smear(endless, seed=0), 7))
    assert [int(at_s / 3.0) for at_s in times(first)] == [0] * 5 + [1] * 2


def test_one_tick_alone_has_nowhere_to_go():
    assert times(shaping.smear(at(0, 0, 0), seed=0)) == [0, 0, 0]


def test_the_asked_share_gives_up_anywhere_in_its_answer():
    requests = at(*range(10_000), output_tokens=20)
    changed = list(shaping.with_cancellations(requests, 0.3, None, seed=0))
    left = [r.cancel_after_tokens for r in changed if r.cancel_after_tokens is not None]
    assert len(left) / len(changed) == pytest.approx(0.3, abs=0.02)
    assert set(left) == set(range(20))
    timed = list(shaping.with_cancellations(requests, 0.3, 2.5, seed=0))
    assert {r.cancel_after_s for r in timed} == {None, 2.5}
    assert [r.cancel_after_s is None for r in timed] == [
        r.cancel_after_tokens is None for r in changed
    ]
    assert list(shaping.with_cancellations(requests, 0.0, None, seed=0)) == requests
    assert all(r.cancel_after_s for r in shaping.with_cancellations(requests, 1.0, 1.0, seed=0))


def test_a_name_is_its_content():
    short, long = Segment("block:7", 100), Segment("block:7", 512)
    assert token_ids([short], 0, 32000) == token_ids([long], 0, 32000)[:100]
    both = token_ids([long, Segment("block:8", 12)], 0, 32000)
    assert len(both) == 524
    assert both[:512] == token_ids([long], 0, 32000)
    assert token_ids([long], 0, 32000) != token_ids([long], 1, 32000)


def test_content_never_changes_between_versions():
    # Whoever compares two runs relies on it.
    assert token_ids([Segment("own:0", 4)], 0, 16000) == [2797, 8970, 12698, 5743]
    assert words([Segment("own:0", 4)], 0) == "that any same know"


@pytest.mark.parametrize(("vocab_size", "low"), [(300, 0), (512, 256), (49152, 256)])
def test_ids_stay_in_the_vocabulary(vocab_size, low):
    ids = token_ids([Segment("x", 20_000)], 0, vocab_size)
    assert low <= min(ids)
    assert max(ids) < vocab_size
    middle = (low + vocab_size) / 2
    assert statistics.fmean(ids) == pytest.approx(middle, rel=0.02)


def test_words_are_distinct_and_as_many_as_tokens():
    assert len(set(WORDS)) == len(WORDS)
    text = words([Segment("a", 30), Segment("b", 5)], 0)
    assert len(text.split(" ")) == 35
    assert set(text.split(" ")) <= set(WORDS)


@pytest.mark.model
def test_a_word_is_a_token_of_a_real_vocabulary(smollm_path):
    tokenizer = Tokenizer.from_folder(smollm_path)
    text = words([Segment("a", 1000)], 0)
    assert len(tokenizer.encode(text, add_special_tokens=False)) == 1000


def asking(*names):
    return TraceRequest(
        index=0, at_s=0.0, segments=tuple(Segment(name, 10) for name in names), output_tokens=1
    )


def test_reuse_counts_leading_segments_only():
    requests = [asking("a", "b", "c"), asking("a", "b", "d"), asking("x", "b"), asking("a", "d")]
    reuse = prefix_reuse(requests, math.inf)
    assert (reuse.num_segments, reuse.hit_segments) == (10, 4)  # a b | nothing | a d
    assert (reuse.num_tokens, reuse.hit_tokens) == (100, 40)
    assert reuse.segment_share == reuse.token_share == 0.4


def test_a_bounded_cache_forgets_what_was_used_longest_ago():
    assert prefix_reuse([asking("a"), asking("b"), asking("a")], 10).hit_segments == 0
    assert prefix_reuse([asking("a"), asking("b"), asking("a")], 20).hit_segments == 1
    touched = [asking("a"), asking("b"), asking("a"), asking("c"), asking("a"), asking("b")]
    assert prefix_reuse(touched, 20).hit_segments == 2
    assert prefix_reuse([], 20).segment_share == 0.0


def test_reuse_grows_with_the_cache():
    rng = random.Random(0)
    requests = [asking(f"p{rng.randrange(9)}", f"s{rng.randrange(30)}") for _ in range(500)]
    hits = [prefix_reuse(requests, capacity).hit_segments for capacity in (10, 50, 100, 400, 1e9)]
    assert hits == sorted(hits)
    assert hits[0] < hits[-1]
