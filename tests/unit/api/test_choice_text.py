"""Tokens of a choice to what the client sees: the same for every way of cutting it into pieces."""

from __future__ import annotations

import asyncio

import httpx2
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from pdserve.api.app import create_app
from pdserve.api.fake import FakeGateway
from pdserve.api.gateway import ModelCard
from pdserve.api.openai.choice import ChoiceText, LoggedToken, Piece
from pdserve.api.openai.logprobs import LogprobWriter
from pdserve.api.openai.requests import OutputOptions
from pdserve.api.settings import ApiSettings
from pdserve.core.ids import Epoch, RequestId
from pdserve.core.messages import TokenDelta
from pdserve.core.request import FinishReason, SamplingParams
from pdserve.core.step import TokenLogprobs
from pdserve.text.tokenizer import Tokenizer

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def examples(number):
    """Fixtures here never change, so Hypothesis may share them between examples."""
    return settings(
        max_examples=number,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
        derandomize=True,
    )


WORDS = [
    "a",
    "ab",
    "b",
    " the",
    " hello",
    "\u00e9",
    "\u4e2d\u6587",
    "\U0001f642",
    "\n",
    "<|im_end|>",
]


@st.composite
def answers(draw, tokenizer, max_size=20):
    """Token ids that spell words, with single bytes of characters and special tokens among them."""
    ids = []
    for part in draw(st.lists(st.sampled_from(WORDS) | st.integers(0, 300), max_size=max_size)):
        ids += [part] if isinstance(part, int) else tokenizer.encode(part)
    return ids or [5]


def stops_in(text):
    """Stop strings of which many occur: pieces of the text, and short ones of its letters."""
    pieces = st.tuples(st.integers(0, len(text)), st.integers(1, 6)).map(
        lambda cut: text[cut[0] : cut[0] + cut[1]]
    )
    return st.lists(pieces.filter(bool) | st.text("ab h", min_size=1, max_size=3), max_size=4)


def deltas(ids, finish):
    last = len(ids) - 1
    return [
        TokenDelta(
            request_id=RequestId("r"),
            epoch=Epoch(1),
            choice=0,
            index=index,
            token_id=token_id,
            finish=finish if index == last else None,
            logprobs=TokenLogprobs(-1.0, 1),
        )
        for index, token_id in enumerate(ids)
    ]


def run(tokenizer, ids, finish=LENGTH, params=None, **options):
    """(pieces, the choice) after the tokens, up to where it ended."""
    params = params or SamplingParams(max_tokens=len(ids), seed=0)
    choice = ChoiceText(3, OutputOptions(**options), params, tokenizer)
    pieces = []
    for delta in deltas(ids, finish):
        piece = choice.push(delta)
        if piece is not None:
            pieces.append(piece)
        if choice.has_ended:
            break
    return pieces, choice


def texts_after_each(tokenizer, ids, *, skip_special_tokens):
    """The text that is complete after each token, by decoding all of them anew each time."""
    texts = []
    for count in range(1, len(ids) + 1):
        text = b"".join(
            tokenizer.token_bytes(i)
            for i in ids[:count]
            if not (skip_special_tokens and i in tokenizer.special_ids)
        )
        whole = text.decode(errors="replace")
        # Bytes that a later one may complete are not text yet, except at the very end.
        for cut in range(1, min(4, len(text)) + 1):
            tail = text[-cut:]
            if count < len(ids) and tail[0] >= 0xC2 and _may_go_on(tail):
                whole = text[:-cut].decode(errors="replace")
                break
        texts.append(whole)
    return texts


def _may_go_on(tail):
    for filler in (b"\x80", b"\x90", b"\xa0", b"\x80\x80", b"\x90\x80", b"\xa0\x80", b"\xbf"):
        for more in (b"", b"\x80", b"\x80\x80"):
            try:
                if len((tail + filler + more).decode()) == 1:
                    return True
            except UnicodeDecodeError:
                continue
    return False


def expected_end(texts, stops, min_tokens):
    """(start, end, stop, tokens) of the match that ends first, the longest of those; or None."""
    for number, text in enumerate(texts, 1):
        begin = len(texts[number - 2]) if number > 1 else 0
        if number <= min_tokens:
            continue
        for end in range(begin + 1, len(text) + 1):
            ending = [stop for stop in stops if text[:end].endswith(stop)]
            if ending:
                stop = max(ending, key=len)
                return end - len(stop), end, stop, number
    return None


@examples(300)
@given(data=st.data())
def test_pieces_are_the_text_up_to_the_stop(data, tokenizer):
    ids = data.draw(answers(tokenizer))
    skip = data.draw(st.booleans())
    texts = texts_after_each(tokenizer, ids, skip_special_tokens=skip)
    assert texts[-1] == tokenizer.decode(ids, skip_special_tokens=skip)
    stops = data.draw(stops_in(texts[-1]))
    include = data.draw(st.booleans())
    params = SamplingParams(
        max_tokens=len(ids), seed=0, min_tokens=data.draw(st.integers(0, len(ids)))
    )
    pieces, choice = run(
        tokenizer,
        ids,
        params=params,
        stops=tuple(stops),
        include_stop=include,
        skip_special_tokens=skip,
    )
    whole = Piece.joined(pieces)
    match = expected_end(texts, stops, params.min_tokens)
    if match is None:
        assert whole.text == texts[-1]
        assert (whole.finish_reason, whole.stop_reason) == ("length", None)
        assert choice.num_tokens == len(ids)
    else:
        start, end, stop, num_tokens = match
        assert whole.text == texts[-1][: end if include else start]
        assert (whole.finish_reason, whole.stop_reason) == ("stop", stop)
        assert choice.num_tokens == num_tokens
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    assert all(piece.text for piece in pieces[:-1]), "a piece without news need not be sent"


@examples(60)
@given(data=st.data())
def test_log_probabilities_and_ids_come_with_every_token(data, tokenizer):
    ids = data.draw(answers(tokenizer))
    texts = texts_after_each(tokenizer, ids, skip_special_tokens=True)
    pieces, _ = run(tokenizer, ids, num_top_logprobs=0, with_token_ids=True, stops=("zzz",))
    whole = Piece.joined(pieces)
    assert whole.token_ids == ids
    assert [token.token_id for token in whole.logged] == ids
    assert [token.text_offset for token in whole.logged] == [0, *map(len, texts[:-1])]


@examples(25)
@given(data=st.data())
@pytest.mark.parametrize("url", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_says_what_the_document_says(data, tokenizer, card, client_of, events_of, url):
    """Over HTTP: the chunks joined, choice by choice, are the choices of the document."""
    num_choices = data.draw(st.integers(1, 3))
    scripts = [data.draw(answers(tokenizer, 8)) for _ in range(num_choices)]
    stops = data.draw(stops_in("".join(tokenizer.decode(ids) for ids in scripts)))
    gateway = FakeGateway(card, script=lambda request, choice: [*scripts[choice], 5] * 40)
    body = {
        "n": num_choices,
        "stop": stops,
        "max_tokens": data.draw(st.integers(1, 25)),
        "min_tokens": data.draw(st.integers(0, 1)),
        "include_stop_str_in_output": data.draw(st.booleans()),
        "return_token_ids": data.draw(st.booleans()),
        "prompt": "x",
        "messages": [{"role": "user", "content": "x"}],
    }

    async def ask():
        async with client_of(gateway) as client:
            whole = await client.post(url, json=body)
            stream = await client.post(url, json={**body, "stream": True})
        return whole.json(), events_of(stream.text)

    document, events = asyncio.run(ask())
    assert events[-1] == "[DONE]"
    said = {index: ["", [], None, None] for index in range(num_choices)}
    for choice in (chunk["choices"][0] for chunk in events[:-1]):
        state = said[choice["index"]]
        state[0] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        state[1] += choice.get("token_ids", [])
        state[2:] = choice["finish_reason"], choice.get("stop_reason")
    for choice in document["choices"]:
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert said[choice["index"]] == [
            text,
            choice.get("token_ids", []),
            choice["finish_reason"],
            choice["stop_reason"],
        ]
    assert gateway.num_running == 0
    assert not gateway.aborted


def test_the_ending_token_has_no_text_unless_included(tokenizer):
    [eos] = tokenizer.encode("<|im_end|>")
    ids = [*tokenizer.encode("hi"), eos]
    params = SamplingParams(max_tokens=9, seed=0, eos_token_ids=(eos,))
    shown = {"skip_special_tokens": False}
    for options, text in ((shown, "hi"), ({**shown, "include_stop": True}, "hi<|im_end|>")):
        pieces, choice = run(tokenizer, ids, STOP, params, **options)
        whole = Piece.joined(pieces)
        assert (whole.text, whole.finish_reason, whole.stop_reason) == (text, "stop", None)
        assert choice.num_tokens == len(ids)


def test_an_impossible_likely_token_can_be_written_as_json(tokenizer):
    logprobs = TokenLogprobs(-0.5, 1, ((70, -0.5), (71, float("-inf"))))
    tokens = [LoggedToken(70, 0, logprobs)]
    writer = LogprobWriter(tokenizer)
    assert list(writer.completion(tokens)["top_logprobs"][0].values()) == [-0.5, -9999.0]
    [entry] = writer.chat(tokens)["content"]
    assert [likely["logprob"] for likely in entry["top_logprobs"]] == [-0.5, -9999.0]


def test_pieces_of_characters_stay_apart_among_the_likely(tokenizer):
    likely = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i)[:1] >= b"\x80"]
    top = tuple((token_id, -1.0) for token_id in likely)
    tokens = [LoggedToken(likely[0], 0, TokenLogprobs(-1.0, 1, top))]
    [written] = LogprobWriter(tokenizer).completion(tokens)["top_logprobs"]
    assert len(written) == len({tokenizer.token_bytes(i) for i in likely})


@pytest.fixture
def word_tokenizer():
    """Spells words with their space before, and drops the first, as SentencePiece models do."""
    backend = tokenizers.Tokenizer(models.WordLevel({"\u2581one": 0, "\u2581two": 1, "?": 2}, "?"))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend, {})


@pytest.mark.anyio
async def test_the_space_before_the_first_word(word_tokenizer, chat_template):
    """It belongs to a text that is written on, and to no message of its own."""
    card = ModelCard(name="m", max_model_tokens=99, vocab_size=3, eos_token_ids=(), created=0)
    gateway = FakeGateway(card, script=lambda request, choice: [0, 1])
    app = create_app(gateway, word_tokenizer, chat_template, ApiSettings())
    transport = httpx2.ASGITransport(app)
    chat = {"messages": [{"role": "assistant", "content": "x"}], "max_tokens": 2}
    async with httpx2.AsyncClient(transport=transport, base_url="http://edge") as client:

        async def ask(path, **body):
            return (await client.post(path, json=body)).json()["choices"][0]

        completion = await ask("/v1/completions", prompt=[0], max_tokens=2)
        message = await ask("/v1/chat/completions", **chat)
        continued = await ask("/v1/chat/completions", **chat, continue_final_message=True)
    assert completion["text"] == " one two"
    assert message["message"]["content"] == "one two"
    assert continued["message"]["content"] == " one two"


@pytest.mark.parametrize(("ignore_eos", "reason"), [(False, None), (True, 7)])
def test_a_token_that_is_both_eos_and_stop(tokenizer, ignore_eos, reason):
    params = SamplingParams(
        max_tokens=9, seed=0, eos_token_ids=(7,), stop_token_ids=(7,), ignore_eos=ignore_eos
    )
    pieces, _ = run(tokenizer, [66, 7], STOP, params)
    assert Piece.joined(pieces).stop_reason == reason


def test_an_unfinished_character_shows_at_the_end_only(tokenizer):
    rocket = tokenizer.encode("\U0001f680", add_special_tokens=False)
    assert len(rocket) > 1
    pieces, _ = run(tokenizer, [*rocket, *rocket[:-1]])
    assert [piece.text for piece in pieces] == ["\U0001f680", "\ufffd"]


def test_what_was_held_back_is_said_when_the_choice_ends(tokenizer):
    ids = [token_id for letter in "hi sto" for token_id in tokenizer.encode(letter)]
    pieces, _ = run(tokenizer, ids, stops=("stop",))
    assert "".join(piece.text for piece in pieces[:-1]) == "hi "
    assert pieces[-1].text == "sto"
