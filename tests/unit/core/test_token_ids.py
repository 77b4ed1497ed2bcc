"""Prompts that are only named behave as the tokens that they stand for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.errors import ProtocolError
from pdserve.core.ids import BlockHash, RequestId
from pdserve.core.request import Request, SamplingParams
from pdserve.core.token_ids import NamedTokens, packed
from pdserve.kv.hashing import HASH_BYTES, block_hashes, extend_hash
from pdserve.transport.wire import encode_body

ROOT = BlockHash(b"r" * HASH_BYTES)
MORE = (7, 8)
PIECES = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40)), max_size=5)


@st.composite
def named(draw: st.DrawFn) -> NamedTokens:
    """Named pieces and numbers, put together in several ways."""
    tokens = NamedTokens.of(draw(PIECES))
    for _ in range(draw(st.integers(0, 2))):
        start, end = sorted((draw(st.integers(0, len(tokens))), draw(st.integers(0, len(tokens)))))
        tokens = tokens[start:end] + tuple(draw(st.lists(st.integers(0, 3), max_size=6)))
        tokens += NamedTokens.of(draw(PIECES))
    return tokens


def hashed_as_numbers(tokens: NamedTokens, size: int) -> list[tuple[int, ...]]:
    """What stands before the end of each full block: equal hashes are to mean equal ones."""
    numbers = tuple(tokens)
    return [numbers[:end] for end in range(size, len(numbers) + 1, size)]


@settings(derandomize=True)
@given(tokens=named(), data=st.data())
def test_they_are_cut_and_joined_as_their_numbers_are(
    tokens: NamedTokens, data: st.DataObject
) -> None:
    numbers = tuple(tokens)
    assert len(tokens) == len(numbers)
    assert bool(tokens) is bool(numbers)
    start, end = (data.draw(st.integers(0, len(numbers))) for _ in range(2))
    assert tuple(tokens[start:end]) == numbers[start:end]
    assert tokens[:start] + tokens[start:] == tokens
    assert hash(tokens[:start] + tokens[start:]) == hash(tokens)
    if numbers:
        assert tokens[-1] == numbers[-1]
        assert tokens[start % len(numbers)] == numbers[start % len(numbers)]
    assert (tokens + MORE)[len(numbers) :] == NamedTokens(()) + MORE


@settings(derandomize=True, max_examples=300)
@given(one=named(), other=named(), size=st.integers(1, 9))
def test_hashes_are_equal_where_everything_up_to_there_is(
    one: NamedTokens, other: NamedTokens, size: int
) -> None:
    chains = [list(block_hashes(ROOT, tokens, size)) for tokens in (one, other)]
    before = [hashed_as_numbers(tokens, size) for tokens in (one, other)]
    for tokens, chain in zip((one, other), chains, strict=True):
        assert len(chain) == len(tokens) // size
        assert len(set(chain)) == len(chain)
        assert all(len(each) == HASH_BYTES for each in chain)
    pairs = zip(*chains, strict=False)
    assert [a == b for a, b in pairs] == [a == b for a, b in zip(*before, strict=False)]


@settings(derandomize=True)
@given(tokens=named(), answer=st.lists(st.integers(0, 3), max_size=20), size=st.integers(1, 9))
def test_an_answer_is_hashed_alike_when_it_is_drawn_and_when_it_is_resumed(
    tokens: NamedTokens, answer: list[int], size: int
) -> None:
    """A worker extends the prompt's chain block by block; a resume has all of it in its prompt."""
    resumed = tokens + tuple(answer)
    hashes = list(block_hashes(ROOT, tokens, size))
    for end in range((len(hashes) + 1) * size, len(resumed) + 1, size):
        hashes.append(extend_hash(hashes[-1] if hashes else ROOT, resumed[end - size : end]))
    assert hashes == list(block_hashes(ROOT, resumed, size))


def test_numbers_alone_are_packed_and_hashed_as_a_tuple_is() -> None:
    numbers = (1, 2, 3, 4, 5, 6, 7)
    tokens = NamedTokens(()) + numbers
    assert tokens.packed() == packed(numbers)
    assert list(block_hashes(ROOT, tokens, 3)) == list(block_hashes(ROOT, numbers, 3))


def test_a_name_is_its_content_and_its_place() -> None:
    assert NamedTokens.of([("a", 8)]) == NamedTokens.of([("a", 16)])[:8]
    assert NamedTokens.of([("a", 16)])[8:] != NamedTokens.of([("a", 8)])
    assert NamedTokens.of([("a", 8)]) != NamedTokens.of([("b", 8)])
    assert NamedTokens.of([("a", 8)]) != tuple(NamedTokens.of([("a", 8)]))


def test_a_chain_is_made_once() -> None:
    tokens = NamedTokens.of([("a", 64)])
    assert block_hashes(ROOT, tokens, 4) is block_hashes(ROOT, tokens, 4)
    assert tokens[:] is tokens
    assert tokens + MORE[2:] is tokens


def test_beyond_the_end_there_is_nothing() -> None:
    tokens = NamedTokens.of([("a", 2)])
    for index in (2, -3):
        with pytest.raises(IndexError):
            tokens[index]
    assert len(tokens[2:9]) == 0


def test_names_never_leave_their_process() -> None:
    request = Request(
        request_id=RequestId("r"),
        prompt_token_ids=NamedTokens.of([("a", 4)]),
        params=SamplingParams(max_tokens=1, seed=0),
    )
    with pytest.raises(ProtocolError, match="cannot be encoded"):
        encode_body(request)
