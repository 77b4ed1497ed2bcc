"""What counts as a token and as an end, in the streams of the servers there are."""

from __future__ import annotations

import json

import pytest

from pdserve.bench.answer import Answer
from pdserve.core.errors import ProtocolError
from pdserve.workload.outcome import CountedBy

pytestmark = pytest.mark.anyio


def heard(*events, status=200, error=None, ends="\n\n", leave_after_tokens=None):
    """An answer that was told ``events`` one second apart."""
    answer = Answer(leave_after_tokens)
    answer.head(status)
    for at_s, event in enumerate(events):
        text = event if isinstance(event, str) else json.dumps(event)
        answer.body(f"data: {text}{ends}".encode(), float(at_s))
    answer.end(error)
    return answer


def text(value, **fields):
    return {"choices": [{"index": 0, "text": value, "finish_reason": None} | fields]}


def chat(delta, **fields):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None} | fields]}


def usage(prompt, completion, **fields):
    return {
        "choices": [],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion} | fields,
    }


async def test_completions_count_chunks_with_choices_even_if_empty():
    answer = heard(text(""), text("ab"), text("", finish_reason="length"), usage(7, 9), "[DONE]")
    assert answer.times_s == [0.0, 1.0, 2.0]
    assert (answer.num_tokens, answer.counted_by) == (9, CountedBy.USAGE)
    assert (answer.failure, answer.finish_reason) == (None, "length")
    assert answer.usage.prompt_tokens == 7


async def test_chats_do_not_count_what_only_opens_the_message():
    answer = heard(
        chat({"role": "assistant", "content": ""}),
        chat({"reasoning_content": "hm"}),
        chat({}),
        chat({"content": "a"}),
        chat({"tool_calls": [{"index": 0}]}),
        chat({"reasoning": "x"}),
        chat({"content": ""}, token_ids=[5]),
        chat({}, finish_reason="stop"),
        "[DONE]",
    )
    assert answer.times_s == [1.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert answer.failure is None


async def test_token_ids_count_when_usage_does_not_come():
    answer = heard(text("a", token_ids=[1, 2]), text("b", token_ids=[3], finish_reason="length"))
    assert (answer.num_tokens, answer.counted_by) == (3, CountedBy.TOKEN_IDS)
    assert heard(text("a"), text("b"), "[DONE]").counted_by is CountedBy.CHUNKS


async def test_cached_tokens_are_read():
    answer = heard(text("a"), usage(7, 1, prompt_tokens_details={"cached_tokens": 4}), "[DONE]")
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert heard(text("a"), usage(7, 1, prompt_tokens_details=None), "[DONE]").failure is None


async def test_usage_in_every_chunk_is_no_token_of_its_own():
    answer = heard(
        text("a") | {"usage": {"completion_tokens": 1}},
        text("b", finish_reason="stop") | {"usage": {"completion_tokens": 2}},
    )
    assert (len(answer.times_s), answer.num_tokens) == (2, 2)


async def test_lines_may_come_in_pieces_and_with_any_ending():
    answer = Answer()
    answer.head(200)
    stream = f": hello\r\nevent: x\r\ndata:{json.dumps(text('a'))}\r\n\r\ndata: [DONE]\r\n\r\n"
    for byte in stream.encode():
        answer.body(bytes([byte]), 1.0)
    answer.end(None)
    assert (answer.times_s, answer.failure) == ([1.0], None)


@pytest.mark.parametrize(
    ("events", "failure"),
    [
        ([], "no tokens"),
        (["[DONE]"], "no tokens"),
        ([text("a")], "broken off"),
        ([text("a"), {"error": {"message": "it broke"}}, "[DONE]"], "error event"),
        ([text("a"), '{"choices": [', "[DONE]"], "not JSON"),
    ],
)
async def test_streams_that_are_no_answers(events, failure):
    assert heard(*events).failure == failure


async def test_a_break_after_tokens_is_a_failure():
    assert heard(text("a"), error=ConnectionResetError("x")).failure == "disconnected"
    assert heard(text("a"), error=ProtocolError("x")).failure == "not HTTP"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "no room", "code": 429}}', "no room"),
        (b'{"error": "no room"}', "no room"),
        (b'{"object": "error", "message": "no room"}', "no room"),
        (b"no room", "no room"),
        (b"\xff", "\ufffd"),
    ],
)
async def test_refusals_say_why(body, message):
    answer = Answer()
    answer.head(503)
    answer.body(body, 0.0)
    answer.end(None)
    assert (answer.failure, answer.message, answer.times_s) == ("503", message, [])


async def test_leaving_after_tokens():
    answer = heard(text("a"), text("b"), text("c"), leave_after_tokens=2)
    assert answer.ended.done()
    assert (answer.left, answer.num_tokens, answer.failure) == (True, 2, None)


async def test_tokens_that_come_together_with_the_last_one_are_not_taken():
    answer = Answer(leave_after_tokens=1)
    answer.head(200)
    answer.body(f"data: {json.dumps(text('a'))}\n\n".encode() * 3, 0.0)
    assert (answer.left, answer.num_tokens) == (True, 1)
