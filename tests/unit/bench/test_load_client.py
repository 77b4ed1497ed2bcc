"""The client against the real HTTP edge: counts, refusals, cancellations, bounds, pace."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from pdserve.api.fake import FakeGateway
from pdserve.bench.options import LoadOptions, TargetOptions
from pdserve.bench.plan import make_load
from pdserve.bench.run import run_load
from pdserve.bench.target import Target
from pdserve.core.errors import GenerationError, OverloadedError, UnavailableError
from pdserve.workload.outcome import CountedBy, Ending
from pdserve.workload.slo import parse_slo
from pdserve.workload.summary import summarise

pytestmark = pytest.mark.anyio


class Tally:
    def __init__(self):
        self.num_sent = self.num_ended = 0

    def sent(self):
        self.num_sent += 1

    def ended(self, outcome):
        self.num_ended += 1


@pytest.fixture
def bench(serving, make_app):
    """Send a load of small requests to a gateway. Gives the result."""

    async def send(gateway, *, target=None, api_key=None, **load):
        small = {"input_tokens": "5:9", "output_tokens": "2:6", "num_requests": 12}
        wanted = make_load(LoadOptions(**small | {"concurrency": 4} | load))
        tally = Tally()
        async with serving(make_app(gateway, api_key=api_key)) as url:
            options = TargetOptions(url=url, vocab_size=200, **target or {})
            client = Target(options)
            assert await client.ask_for_model() == "tiny"
            result = await run_load(wanted, client, tally)
            client.close()
            async with asyncio.timeout(20):
                await gateway.until(lambda: gateway.num_running == 0)
        assert tally.num_sent == tally.num_ended == len(result.outcomes)
        return result

    return send


@pytest.mark.parametrize("return_token_ids", [False, True])
async def test_completions_are_what_was_planned(bench, bench_card, return_token_ids):
    gateway = FakeGateway(bench_card)
    result = await bench(gateway, target={"return_token_ids": return_token_ids})
    summary = summarise(result.outcomes, result.duration_s)
    sizes = sorted((len(r.prompt_token_ids), r.params.max_tokens) for r in gateway.submitted)
    assert sizes == sorted((o.prompt_tokens, o.output_tokens) for o in result.outcomes)
    assert all(r.params.ignore_eos and r.params.temperature == 0 for r in gateway.submitted)
    assert (summary.completed, summary.failures) == (12, {})
    assert summary.counted_by == {"usage": 12}
    assert [outcome.index for outcome in result.outcomes] == list(range(12))
    assert all(outcome.response_id.startswith("cmpl-") for outcome in result.outcomes)
    for outcome in result.outcomes:
        assert 0 <= outcome.sent_s < outcome.first_s <= outcome.last_s <= result.duration_s
        assert sum(outcome.gaps_s) == pytest.approx(outcome.last_s - outcome.first_s)
    assert result.cpu_s > 0


async def test_chats_are_counted_by_usage(bench, bench_card):
    gateway = FakeGateway(bench_card)
    result = await bench(gateway, target={"endpoint": "chat"})
    assert {outcome.ending for outcome in result.outcomes} == {Ending.COMPLETED}
    sizes = sorted((len(r.prompt_token_ids), r.params.max_tokens) for r in gateway.submitted)
    assert sizes == sorted((o.prompt_tokens, o.output_tokens) for o in result.outcomes)


async def test_words_are_sent_as_text(bench, bench_card):
    gateway = FakeGateway(bench_card)
    result = await bench(gateway, target={"prompt": "words"}, num_requests=2)
    assert {outcome.ending for outcome in result.outcomes} == {Ending.COMPLETED}
    assert result.outcomes[0].prompt_tokens == len(gateway.submitted[0].prompt_token_ids)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (OverloadedError("no room", 1.0), "429"),
        (UnavailableError("nobody"), "503"),
        (GenerationError("broken"), "500"),
    ],
)
async def test_refusals_are_counted_and_spoil_attainment(bench, bench_card, error, failure):
    gateway = FakeGateway(bench_card, fail_before=error)
    result = await bench(gateway)
    summary = summarise(result.outcomes, 1.0, parse_slo(["ttft:100000"]))
    assert (summary.completed, summary.failed, summary.failures) == (0, 12, {failure: 12})
    assert summary.messages[failure]
    assert (summary.slo.attainment, summary.slo.goodput) == (0.0, 0.0)


async def test_answers_that_break_off_are_failures(bench, bench_card):
    gateway = FakeGateway(
        bench_card,
        script=lambda request, choice: itertools.repeat(65),
        fail_after=(1, GenerationError("broken")),
    )
    result = await bench(gateway)
    summary = summarise(result.outcomes, 1.0)
    assert summary.failures == {"error event": 12}
    assert all(outcome.output_tokens == 1 for outcome in result.outcomes)


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_a_closed_loop_keeps_its_bound_and_fills_it(bench, bench_card, concurrency):
    running = []

    def script(request, choice):
        running.append(gateway.num_running)
        return itertools.repeat(65)

    async def open_when_full():
        await gateway.until(lambda: gateway.num_running == concurrency)
        gateway.allow(24 * 6)

    gateway = FakeGateway(bench_card, script=script, permits=0)
    opening = asyncio.create_task(open_when_full())
    result = await bench(gateway, concurrency=concurrency, num_requests=24)
    await opening
    assert max(running) == concurrency
    assert result.max_in_flight == concurrency
    assert all(outcome.lag_s == 0 for outcome in result.outcomes)


async def test_a_failing_server_does_not_widen_the_closed_loop(bench, bench_card):
    gateway = FakeGateway(bench_card, fail_after=(1, GenerationError("broken")))
    assert (await bench(gateway, concurrency=2)).max_in_flight == 2


async def test_clients_that_give_up_free_the_server(bench, bench_card):
    gateway = FakeGateway(bench_card, permits=30)
    result = await bench(
        gateway, cancel_rate=1.0, output_tokens="50", concurrency=None, rate=1e5,
        cancel_after_s=0.5,
    )  # fmt: skip
    assert {outcome.ending for outcome in result.outcomes} == {Ending.CANCELLED}
    assert len(gateway.aborted) == 12
    assert gateway.finished == []


async def test_clients_leave_after_the_drawn_number_of_tokens(bench, bench_card):
    load = {"cancel_rate": 1.0, "output_tokens": "40", "seed": 3}
    gateway = FakeGateway(bench_card)
    result = await bench(gateway, target={"return_token_ids": True}, **load)
    planned = make_load(LoadOptions(concurrency=4, num_requests=12, **load)).requests
    for request, outcome in zip(planned, result.outcomes, strict=True):
        assert outcome.ending is Ending.CANCELLED
        if request.cancel_after_tokens:
            assert outcome.output_tokens == request.cancel_after_tokens
            assert outcome.counted_by is CountedBy.TOKEN_IDS


async def test_requests_leave_at_their_times(bench, bench_card):
    gateway = FakeGateway(bench_card)
    result = await bench(gateway, concurrency=None, rate=200.0, arrivals="constant")
    assert [outcome.due_s for outcome in result.outcomes] == [i / 200 for i in range(12)]
    assert all(outcome.sent_s >= outcome.due_s for outcome in result.outcomes)
    assert result.duration_s >= 11 / 200


async def test_a_bound_holds_paced_requests_back_and_the_lag_shows_it(bench, bench_card):
    gateway = FakeGateway(bench_card)
    result = await bench(gateway, concurrency=1, rate=1e5)
    assert result.max_in_flight == 1
    assert result.outcomes[-1].lag_s > 0


async def test_the_warm_up_is_sent_and_not_measured(bench, bench_card):
    gateway = FakeGateway(bench_card)
    result = await bench(gateway, warmup=5)
    assert len(gateway.submitted) == 17
    assert len(result.outcomes) == 12
    assert [outcome.ending for outcome in result.warmup] == [Ending.COMPLETED] * 5
    warm = {r.prompt_token_ids for r in gateway.submitted[:5]}
    assert not warm & {r.prompt_token_ids for r in gateway.submitted[5:]}


async def test_a_closed_loop_for_a_time(bench, bench_card):
    gateway = FakeGateway(bench_card)
    result = await bench(gateway, num_requests=None, duration_s=0.2, concurrency=2, warmup=1)
    assert len(result.outcomes) >= 2
    assert all(outcome.sent_s < 5 for outcome in result.outcomes)


@pytest.mark.parametrize(("ahead_bytes", "ahead_requests"), [(1, 100), (1 << 20, 3)])
async def test_requests_that_were_not_made_ahead_are_sent_too(
    bench, bench_card, monkeypatch, ahead_bytes, ahead_requests
):
    monkeypatch.setattr("pdserve.bench.run.AHEAD_BYTES", ahead_bytes)
    monkeypatch.setattr("pdserve.bench.run.AHEAD_REQUESTS", ahead_requests)
    gateway = FakeGateway(bench_card)
    result = await bench(gateway)
    assert [outcome.index for outcome in result.outcomes] == list(range(12))


async def test_prefixes_really_repeat(bench, bench_card):
    gateway = FakeGateway(bench_card)
    await bench(gateway, prefix_groups=2, prefix_tokens=32, num_requests=30)
    prefixes = {request.prompt_token_ids[:32] for request in gateway.submitted}
    assert len(prefixes) == 2
    assert len({request.prompt_token_ids for request in gateway.submitted}) == 30


async def test_the_key_is_sent_or_asked_for(bench, bench_card):
    gateway = FakeGateway(bench_card)
    await bench(gateway, api_key="k", target={"api_key": "k"})
    with pytest.raises(UnavailableError, match="--api-key"):
        await bench(gateway, api_key="k")
