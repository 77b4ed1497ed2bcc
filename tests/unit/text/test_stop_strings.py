"""Stop strings against a naive search, over all ways of cutting the text into pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.errors import RequestError
from pdserve.text.stop import StopStrings


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Look at every beginning of the text, shortest first, for a stop string at its end."""
    for end in range(1, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            stop = max(matching, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[list[str], str | None]:
    watcher = StopStrings(stops, include=include)
    emitted = [watcher.feed(piece) for piece in pieces]
    return [*emitted, watcher.finish()], watcher.matched


def chunkings(text: str) -> list[list[str]]:
    cuts = itertools.product([False, True], repeat=max(0, len(text) - 1))
    result = []
    for cut_after in cuts:
        pieces = [""]
        for index, character in enumerate(text):
            pieces[-1] += character
            if index < len(text) - 1 and cut_after[index]:
                pieces.append("")
        result.append(pieces)
    return result


few_letters = st.text(alphabet="ab\n", max_size=8)
some_stops = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3)


@settings(max_examples=150)
@given(text=few_letters, stops=some_stops, include=st.booleans())
def test_every_chunking_gives_what_a_naive_search_gives(
    text: str, stops: list[str], include: bool
) -> None:
    expected_text, expected_stop = naive(text, stops, include)
    for pieces in chunkings(text):
        emitted, matched = run(pieces, stops, include)
        assert ("".join(emitted), matched) == (expected_text, expected_stop)


@settings(max_examples=150)
@given(text=few_letters, stops=some_stops)
def test_what_is_held_back_could_become_a_stop_string(text: str, stops: list[str]) -> None:
    """Nothing is emitted too early (it may yet be part of a match) nor too late."""
    watcher = StopStrings(stops)
    emitted = ""
    for end, character in enumerate(text, 1):
        emitted += watcher.feed(character)
        if watcher.matched is not None:
            return
        held = text[len(emitted) : end]
        starts = {stop[:n] for stop in stops for n in range(len(stop))}
        longest = max((s for s in starts if text[:end].endswith(s)), key=len, default="")
        assert held == longest


def test_the_longest_of_those_that_end_together_wins() -> None:
    assert run(list("xab"), ["b", "ab"], include=False) == (["x", "", "", ""], "ab")
    assert run(["xab"], ["b", "ab"], include=False) == (["x", ""], "ab")


def test_the_one_that_ends_first_wins() -> None:
    assert run(["abcde"], ["abcde", "bcd"], include=False) == (["a", ""], "bcd")


def test_text_after_a_match_is_gone() -> None:
    watcher = StopStrings(["END"])
    assert watcher.feed("one END two") == "one "
    assert watcher.feed("three") == ""
    assert watcher.finish() == ""
    assert watcher.matched == "END"


def test_the_tail_comes_at_the_end() -> None:
    watcher = StopStrings(["\n\nUser:"])
    assert watcher.feed("hi\n\nUse") == "hi"
    assert watcher.finish() == "\n\nUse"
    assert watcher.matched is None


def test_no_stop_strings_hold_nothing_back() -> None:
    watcher = StopStrings([])
    assert watcher.feed("anything") == "anything"
    assert watcher.finish() == ""


def test_nothing_matches_before_it_is_armed() -> None:
    watcher = StopStrings(["stop"])
    assert watcher.feed("stop st", armed=False) == "stop "
    assert watcher.feed("op") == ""
    assert watcher.matched == "stop"


@settings(max_examples=150)
@given(before=few_letters, after=few_letters, stops=some_stops)
def test_a_match_may_begin_before_it_is_armed(before: str, after: str, stops: list[str]) -> None:
    watcher = StopStrings(stops)
    emitted = watcher.feed(before, armed=False) + watcher.feed(after) + watcher.finish()
    whole = before + after
    for end in range(len(before) + 1, len(whole) + 1):
        matching = [stop for stop in stops if whole[:end].endswith(stop)]
        if matching:
            longest = max(matching, key=len)
            assert (emitted, watcher.matched) == (whole[: end - len(longest)], longest)
            return
    assert (emitted, watcher.matched) == (whole, None)


def test_an_empty_stop_string_is_the_clients_mistake() -> None:
    with pytest.raises(RequestError, match="empty") as caught:
        StopStrings(["a", ""])
    assert caught.value.param == "stop"


def test_a_long_stop_string_costs_each_character_once() -> None:
    """Quadratic matching would take minutes here."""
    stop = "a" * 50_000 + "b"
    watcher = StopStrings([stop])
    emitted = "".join(watcher.feed("a" * 500) for _ in range(400))
    assert len(emitted) + len(watcher.finish()) == 200_000
