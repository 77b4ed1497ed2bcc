"""What every engine that batches for itself promises, over all that are shipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.engine_work import EngineOutput, EnginePhase, EngineWork
from pdserve.core.errors import ConfigError, ContextLengthError, PayloadError
from pdserve.core.ids import AttemptId, Epoch, RequestId
from pdserve.core.messages import TokenDelta
from pdserve.core.request import FinishReason, SamplingParams
from pdserve.engine.fake_foreign import FakeForeignEngine
from pdserve.engine.foreign import Capabilities, Engine

MAX_MODEL_TOKENS = 96
PROMPT = tuple(range(40, 65))

MakeEngine = Callable[..., Engine]


def _fake(**ours: int | bool) -> MakeEngine:
    def make(**theirs: str) -> Engine:
        options = {"capacity_tokens": 1024, "max_model_tokens": MAX_MODEL_TOKENS, **ours, **theirs}
        return FakeForeignEngine(**options)

    return make


ENGINES: dict[str, MakeEngine] = {
    "roomy": _fake(),
    "one token at a time": _fake(max_step_tokens=1, max_running=2, block_tokens=3),
    "hardly any memory": _fake(capacity_tokens=MAX_MODEL_TOKENS, block_tokens=4, max_step_tokens=7),
    "draws the first token again": _fake(recomputes_first_token=True, max_step_tokens=16),
}


@pytest.fixture(params=ENGINES)
def make_engine(request: pytest.FixtureRequest) -> MakeEngine:
    return ENGINES[request.param]


def params(**values: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 8, "seed": 1, **values})  # type: ignore[arg-type]


def work(
    name: str = "r",
    token_ids: Iterable[int] = PROMPT,
    *,
    choices: tuple[int, ...] = (0,),
    taken: Iterable[int] = (),
    **values: object,
) -> EngineWork:
    prompt = tuple(token_ids)
    return EngineWork(
        attempt=AttemptId(RequestId(name), Epoch(1)),
        choices=choices,
        token_ids=prompt + tuple(taken),
        num_prompt_tokens=len(prompt),
        params=params(**values),
    )


@dataclass
class Heard:
    """Everything that an engine has said, checked as it comes."""

    deltas: dict[tuple[AttemptId, int], list[TokenDelta]] = field(default_factory=dict)
    started: list[AttemptId] = field(default_factory=list)
    num_steps: int = 0

    def hear(self, output: EngineOutput) -> None:
        self.num_steps += 1
        assert not output.failed
        for start in output.started:
            assert start.attempt not in self.started
            self.started.append(start.attempt)
        for delta in output.deltas:
            mine = self.deltas.setdefault(_key(delta), [])
            assert not mine or mine[-1].finish is None, "a token after the end"
            assert not mine or delta.index == mine[-1].index + 1, "a token out of order"
            mine.append(delta)

    def tokens(self, asked: EngineWork, choice: int = 0) -> list[int]:
        return [delta.token_id for delta in self.deltas.get((asked.attempt, choice), [])]

    def finish(self, asked: EngineWork, choice: int = 0) -> FinishReason | None:
        return self.deltas[asked.attempt, choice][-1].finish


def _key(delta: TokenDelta) -> tuple[AttemptId, int]:
    return AttemptId(delta.request_id, delta.epoch), delta.choice


def run(engine: Engine, heard: Heard | None = None, num_steps: int = 10_000) -> Heard:
    """Step until there is nothing to compute, or so many times."""
    heard = heard or Heard()
    for _ in range(num_steps):
        output = engine.step()
        load = engine.load()
        assert 0 <= load.free_tokens <= engine.info.capacity_tokens
        if output is None:
            return heard
        heard.hear(output)
    assert num_steps < 10_000, "the engine does not come to rest"
    return heard


def answer(engine: Engine, asked: EngineWork) -> Heard:
    engine.submit(asked, EnginePhase.WHOLE)
    return run(engine)


def assert_empty(engine: Engine) -> None:
    assert engine.load().free_tokens == engine.info.capacity_tokens
    assert engine.step() is None


def hand_over(
    asked: EngineWork, prefiller: Engine, decoder: Engine
) -> tuple[tuple[TokenDelta, ...], Heard]:
    """First tokens by one engine, the rest by another: as a prefill and a decode worker would."""
    prefiller.submit(asked, EnginePhase.PREFILL)
    heard = run(prefiller)
    first = tuple(heard.deltas[asked.attempt, choice][0] for choice in asked.choices)
    live = tuple(delta for delta in first if delta.finish is None)
    payload = prefiller.export(asked.attempt)
    prefiller.abort(asked.attempt)
    assert_empty(prefiller)
    later = replace(asked, choices=tuple(delta.choice for delta in live))
    decoder.adopt(later, live, payload)
    return first, run(decoder)


def whole_of(
    engine: Engine, first: tuple[TokenDelta, ...], heard: Heard, asked: EngineWork, choice: int
) -> list[int]:
    """First token and rest; if the engine drew the first one again, it is the same."""
    (token,) = (delta.token_id for delta in first if delta.choice == choice)
    rest = heard.tokens(asked, choice)
    if engine.info.capabilities.recomputes_first_token and rest:
        assert rest.pop(0) == token
    return [token, *rest]


# --- what it is ---------------------------------------------------------------------------------


def test_an_engine_says_what_it_is(make_engine: MakeEngine) -> None:
    info = make_engine().info
    assert info.capacity_tokens >= info.max_model_tokens > 0
    assert info.vocab_size > 0
    assert info.capabilities.opaque_payload
    assert info.capabilities.batch_policies == ()
    assert not info.capabilities.layer_wise_push
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.capabilities.payload_format = "other"  # type: ignore[misc]


def test_blocks_are_no_payload() -> None:
    assert not Capabilities(payload_format="", batch_policies=("FcfsBatching",)).opaque_payload


def test_an_idle_engine_has_nothing_to_do(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert_empty(engine)
    assert engine.load().num_steps == 0


# --- answers ------------------------------------------------------------------------------------


def test_tokens_come_in_order_and_end(make_engine: MakeEngine) -> None:
    engine, asked = make_engine(), work(max_tokens=8)
    heard = answer(engine, asked)
    deltas = heard.deltas[asked.attempt, 0]
    assert [delta.index for delta in deltas] == list(range(8))
    assert all(0 <= delta.token_id < engine.info.vocab_size for delta in deltas)
    assert [delta.finish for delta in deltas] == [None] * 7 + [FinishReason.LENGTH]
    assert heard.started == [asked.attempt]
    assert_empty(engine)


def test_tokens_leave_one_by_one(make_engine: MakeEngine) -> None:
    """An engine does not keep an answer back until it is whole."""
    engine = make_engine()
    engine.submit(work(), EnginePhase.WHOLE)
    sizes = []
    while (output := engine.step()) is not None:
        sizes.append(len(output.deltas))
    assert max(sizes) == 1
    assert sum(sizes) == 8


def test_company_changes_nothing(make_engine: MakeEngine) -> None:
    asks = [
        work(f"r{i}", PROMPT[i:] + PROMPT[:i], choices=(0, 1, 2)[: 1 + i % 3], seed=i)
        for i in range(7)
    ]
    alone = [answer(make_engine(), asked) for asked in asks]
    engine = make_engine()
    together = Heard()
    for asked in asks:
        engine.submit(asked, EnginePhase.WHOLE)
        run(engine, together, num_steps=2)
    run(engine, together)
    for asked, heard in zip(asks, alone, strict=True):
        for choice in asked.choices:
            assert together.tokens(asked, choice) == heard.tokens(asked, choice)
            assert len(heard.tokens(asked, choice)) == 8
    assert_empty(engine)


def test_choices_and_seeds_differ(make_engine: MakeEngine) -> None:
    engine = make_engine()
    one, other = work("one", choices=(0, 1), seed=1), work("other", choices=(0,), seed=2)
    engine.submit(one, EnginePhase.WHOLE)
    engine.submit(other, EnginePhase.WHOLE)
    heard = run(engine)
    answers = {tuple(heard.tokens(a, c)) for a, c in ((one, 0), (one, 1), (other, 0))}
    assert len(answers) == 3


def test_a_later_choice_alone_is_the_same_as_in_company(make_engine: MakeEngine) -> None:
    both, second = work(choices=(0, 1)), work(choices=(1,))
    expected = answer(make_engine(), both).tokens(both, 1)
    assert answer(make_engine(), second).tokens(second, 1) == expected


@pytest.mark.parametrize("num_taken", [1, 3, 7])
def test_a_resume_goes_on_where_the_client_is(make_engine: MakeEngine, num_taken: int) -> None:
    asked = work()
    tokens = answer(make_engine(), asked).tokens(asked)
    rest = work(taken=tokens[:num_taken])
    heard = answer(make_engine(), rest)
    assert heard.tokens(rest) == tokens[num_taken:]
    assert heard.deltas[rest.attempt, 0][0].index == num_taken
    assert heard.finish(rest) is FinishReason.LENGTH


def test_a_stop_on_the_first_token(make_engine: MakeEngine) -> None:
    tokens = answer(make_engine(), work()).tokens(work())
    engine, asked = make_engine(), work(stop_token_ids=(tokens[0],))
    heard = answer(engine, asked)
    assert heard.tokens(asked) == tokens[:1]
    assert heard.finish(asked) is FinishReason.STOP
    assert_empty(engine)


def test_an_end_that_the_client_ignores(make_engine: MakeEngine) -> None:
    tokens = answer(make_engine(), work()).tokens(work())
    ends = work(eos_token_ids=(tokens[2],))
    assert len(answer(make_engine(), ends).tokens(ends)) == tokens.index(tokens[2]) + 1
    goes_on = work(eos_token_ids=(tokens[2],), ignore_eos=True)
    assert answer(make_engine(), goes_on).tokens(goes_on) == tokens


def test_no_choice_ends_before_min_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine()
    every = tuple(range(engine.info.vocab_size - 1))
    asked = work(stop_token_ids=every, min_tokens=3)
    heard = answer(engine, asked)
    assert not set(heard.tokens(asked)[:3]) & set(every)
    assert len(heard.tokens(asked)) >= 4


def test_one_token_only(make_engine: MakeEngine) -> None:
    engine, asked = make_engine(), work(max_tokens=1, choices=(0, 1))
    heard = answer(engine, asked)
    for choice in (0, 1):
        assert len(heard.tokens(asked, choice)) == 1
        assert heard.finish(asked, choice) is FinishReason.LENGTH
    assert_empty(engine)


def test_an_answer_ends_where_the_model_does(make_engine: MakeEngine) -> None:
    engine = make_engine()
    limit = engine.info.max_model_tokens
    asked = work(token_ids=[5] * (limit - 3), max_tokens=50)
    heard = answer(engine, asked)
    assert len(heard.tokens(asked)) == 3
    assert heard.finish(asked) is FinishReason.LENGTH
    assert_empty(engine)


def test_what_can_never_fit_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with pytest.raises(ContextLengthError, match="no room"):
        engine.submit(work(token_ids=[5] * engine.info.max_model_tokens), EnginePhase.WHOLE)
    assert_empty(engine)


def test_logprobs_are_reported_if_asked_for(make_engine: MakeEngine) -> None:
    plain, asked = work("plain"), work("asked", logprobs=2)
    heard = answer(make_engine(), plain)
    assert heard.deltas[plain.attempt, 0][0].logprobs is None
    heard = answer(make_engine(), asked)
    for delta in heard.deltas[asked.attempt, 0]:
        assert delta.logprobs is not None
        assert len(delta.logprobs.top) == 2
        assert delta.logprobs.logprob <= 0


def test_more_work_than_memory_is_answered_all_the_same(make_engine: MakeEngine) -> None:
    engine = make_engine()
    each = MAX_MODEL_TOKENS - 1
    count = 1 + engine.info.capacity_tokens // each
    asks = [work(f"r{i}", [i] * 20, max_tokens=each - 20) for i in range(count)]
    for asked in asks:
        engine.submit(asked, EnginePhase.WHOLE)
    heard = run(engine)
    assert [len(heard.tokens(asked)) for asked in asks] == [each - 20] * count
    assert_empty(engine)


# --- hand-off -----------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", [(0,), (0, 1, 2), (3,)])
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 9, 24])
def test_an_adopted_attempt_goes_on_exactly(
    make_engine: MakeEngine, choices: tuple[int, ...], num_tokens: int
) -> None:
    asked = work(token_ids=PROMPT[:num_tokens], choices=choices)
    expected = answer(make_engine(), asked)
    decoder = make_engine()
    first, heard = hand_over(asked, make_engine(), decoder)
    for choice in choices:
        assert whole_of(decoder, first, heard, asked, choice) == expected.tokens(asked, choice)
        assert heard.finish(asked, choice) is FinishReason.LENGTH
    assert_empty(decoder)


def test_an_adoption_starts_where_its_capabilities_say(make_engine: MakeEngine) -> None:
    decoder, asked = make_engine(), work()
    _, heard = hand_over(asked, make_engine(), decoder)
    again = decoder.info.capabilities.recomputes_first_token
    assert heard.deltas[asked.attempt, 0][0].index == (0 if again else 1)
    assert asked.attempt not in heard.started


def test_a_resumed_attempt_is_handed_over_too(make_engine: MakeEngine) -> None:
    tokens = answer(make_engine(), work()).tokens(work())
    decoder, asked = make_engine(), work(taken=tokens[:3])
    first, heard = hand_over(asked, make_engine(), decoder)
    assert first[0].index == 3
    assert whole_of(decoder, first, heard, asked, 0) == tokens[3:]


def test_choices_that_have_ended_are_not_adopted(make_engine: MakeEngine) -> None:
    tokens = answer(make_engine(), work(choices=(0, 1))).tokens(work(), 0)
    asked = work(choices=(0, 1), stop_token_ids=(tokens[0],))
    expected = answer(make_engine(), asked)
    decoder = make_engine()
    first, heard = hand_over(asked, make_engine(), decoder)
    assert first[0].finish is FinishReason.STOP
    assert heard.tokens(asked, 0) == []
    assert whole_of(decoder, first, heard, asked, 1) == expected.tokens(asked, 1)


def test_adoptions_amid_other_work(make_engine: MakeEngine) -> None:
    asks = [work(f"r{i}", PROMPT[i:], choices=(0, 1)) for i in range(5)]
    expected = [answer(make_engine(), asked) for asked in asks]
    decoder, heard = make_engine(), Heard()
    busy = work("busy", [9] * 30, max_tokens=50)
    decoder.submit(busy, EnginePhase.WHOLE)
    for asked in asks:
        prefiller = make_engine()
        prefiller.submit(asked, EnginePhase.PREFILL)
        prefilled = run(prefiller)
        first = tuple(prefilled.deltas[asked.attempt, choice][0] for choice in asked.choices)
        decoder.adopt(asked, first, prefiller.export(asked.attempt))
        run(decoder, heard, num_steps=3)
    run(decoder, heard)
    again = decoder.info.capabilities.recomputes_first_token
    for asked, alone in zip(asks, expected, strict=True):
        for choice in asked.choices:
            tokens = alone.tokens(asked, choice)
            assert heard.tokens(asked, choice) == (tokens if again else tokens[1:])
    assert len(heard.tokens(busy)) == 50
    assert_empty(decoder)


def test_what_was_prefilled_is_held_until_it_is_aborted(make_engine: MakeEngine) -> None:
    engine, asked = make_engine(), work(choices=(0, 1))
    engine.submit(asked, EnginePhase.PREFILL)
    heard = run(engine)
    assert [len(heard.tokens(asked, choice)) for choice in (0, 1)] == [1, 1]
    payload = engine.export(asked.attempt)
    assert engine.step() is None
    assert engine.export(asked.attempt) == payload
    assert engine.load().free_tokens < engine.info.capacity_tokens
    engine.abort(asked.attempt)
    assert_empty(engine)
    with pytest.raises(PayloadError, match="nothing is held"):
        engine.export(asked.attempt)


def test_a_choice_that_ends_at_once_is_held_too(make_engine: MakeEngine) -> None:
    engine, asked = make_engine(), work(max_tokens=1)
    engine.submit(asked, EnginePhase.PREFILL)
    assert run(engine).finish(asked) is FinishReason.LENGTH
    assert engine.load().free_tokens < engine.info.capacity_tokens
    engine.abort(asked.attempt)
    assert_empty(engine)


def test_what_is_not_prefilled_yet_cannot_be_exported(make_engine: MakeEngine) -> None:
    engine, asked = make_engine(), work()
    engine.submit(asked, EnginePhase.PREFILL)
    with pytest.raises(PayloadError, match="nothing is held"):
        engine.export(asked.attempt)
    engine.abort(asked.attempt)
    assert_empty(engine)


def _payload(make_engine: MakeEngine, asked: EngineWork) -> tuple[bytes, tuple[TokenDelta, ...]]:
    engine = make_engine()
    engine.submit(asked, EnginePhase.PREFILL)
    heard = run(engine)
    return engine.export(asked.attempt), (heard.deltas[asked.attempt, 0][0],)


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_payload_is_refused(name: str, data: st.DataObject) -> None:
    asked = work(token_ids=PROMPT[:9])
    payload, first = _payload(ENGINES[name], asked)
    at = data.draw(st.integers(0, len(payload) - 1))
    damaged = data.draw(
        st.sampled_from(
            [
                payload[:at],
                payload[:at] + payload[at + 1 :],
                payload[:at] + bytes([payload[at] ^ 0x20]) + payload[at + 1 :],
                payload[:at] + b"\x00" + payload[at:],
                payload + payload[at:],
            ]
        )
    )
    engine = ENGINES[name]()
    if damaged != payload:
        with pytest.raises(PayloadError):
            engine.adopt(asked, first, damaged)
        assert_empty(engine)
    engine.adopt(asked, first, payload)
    assert len(run(engine).tokens(asked)) >= 7


@pytest.mark.parametrize("payload", [b"", b"PDFF", b"\x00" * 500])
def test_what_is_no_payload_is_refused(make_engine: MakeEngine, payload: bytes) -> None:
    engine = make_engine()
    with pytest.raises(PayloadError, match="payload"):
        engine.adopt(work(), (), payload)
    assert_empty(engine)


def test_the_payload_of_other_tokens_is_refused(make_engine: MakeEngine) -> None:
    asked = work(token_ids=PROMPT[:9])
    payload, first = _payload(make_engine, asked)
    engine = make_engine()
    for other in (PROMPT[1:10], PROMPT[:8], PROMPT[:10]):
        with pytest.raises(PayloadError, match="other tokens"):
            engine.adopt(work(token_ids=other), first, payload)
    assert_empty(engine)


def test_the_payload_of_other_weights_is_refused(make_engine: MakeEngine) -> None:
    payload, first = _payload(make_engine, work())
    engine = make_engine(weights_digest="others")
    with pytest.raises(PayloadError, match="other weights"):
        engine.adopt(work(), first, payload)
    assert_empty(engine)


# --- the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", EnginePhase)
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5, 9, 30])
def test_an_abort_frees_everything_at_any_time(
    make_engine: MakeEngine, phase: EnginePhase, num_steps: int
) -> None:
    engine, asked = make_engine(), work(choices=(0, 1, 2), max_tokens=20)
    engine.submit(asked, phase)
    run(engine, num_steps=num_steps)
    engine.abort(asked.attempt)
    engine.abort(asked.attempt)
    assert_empty(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_an_adopted_attempt_can_be_aborted(make_engine: MakeEngine, num_steps: int) -> None:
    payload, first = _payload(make_engine, work())
    engine = make_engine()
    engine.adopt(work(), first, payload)
    assert engine.load().free_tokens < engine.info.capacity_tokens
    run(engine, num_steps=num_steps)
    engine.abort(work().attempt)
    assert_empty(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 6, 12, 40])
def test_an_abort_of_some_choices_leaves_the_others(
    make_engine: MakeEngine, num_steps: int
) -> None:
    asked = work(choices=(0, 1, 2), max_tokens=12)
    expected = answer(make_engine(), asked)
    engine = make_engine()
    engine.submit(asked, EnginePhase.WHOLE)
    before = run(engine, num_steps=num_steps)
    counts = {choice: len(before.tokens(asked, choice)) for choice in (0, 2)}
    engine.abort(asked.attempt, (0, 2))
    heard = run(engine, before)
    assert heard.tokens(asked, 1) == expected.tokens(asked, 1)
    assert {choice: len(heard.tokens(asked, choice)) for choice in (0, 2)} == counts
    assert_empty(engine)


def test_an_unknown_attempt_can_be_aborted(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.submit(work(), EnginePhase.WHOLE)
    engine.abort(work("other").attempt)
    engine.abort(work().attempt, (7,))
    assert len(run(engine).tokens(work())) == 8


def test_close_lets_go_of_everything_and_may_come_twice(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.submit(work("waits"), EnginePhase.WHOLE)
    engine.submit(work("held", max_tokens=4), EnginePhase.PREFILL)
    run(engine, num_steps=3)
    engine.close()
    assert engine.load().free_tokens == engine.info.capacity_tokens
    engine.close()


# --- the fake alone -----------------------------------------------------------------------------


def test_the_fake_preempts_when_its_blocks_run_out() -> None:
    engine = FakeForeignEngine(capacity_tokens=48, max_model_tokens=48, block_tokens=4)
    asks = [work(f"r{i}", [i] * 10, max_tokens=20) for i in range(3)]
    for asked in asks:
        engine.submit(asked, EnginePhase.WHOLE)
    heard = run(engine)
    assert engine.load().num_preemptions > 0
    roomy = FakeForeignEngine(max_model_tokens=48)
    assert all(heard.tokens(asked) == answer(roomy, asked).tokens(asked) for asked in asks)


def test_the_fake_can_draw_another_first_token() -> None:
    """As other kernels may: whoever believes it gives another answer from there on."""
    asked = work()
    payload, first = _payload(FakeForeignEngine, asked)
    engine = FakeForeignEngine(recomputes_first_token=True, first_token_drift=1)
    engine.adopt(asked, first, payload)
    drifted = run(engine).tokens(asked)
    assert drifted[0] == (first[0].token_id + 1) % engine.info.vocab_size
    assert drifted[1:] != answer(FakeForeignEngine(), asked).tokens(asked)[1:]


def test_the_fake_needs_memory_for_one_answer() -> None:
    with pytest.raises(ConfigError, match="give more KV"):
        FakeForeignEngine(capacity_tokens=50, max_model_tokens=49, block_tokens=8)
