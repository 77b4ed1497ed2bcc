"""Copies that are written out, since `dataclasses.replace` takes too long, forget no field."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from types import SimpleNamespace
from typing import Any

from pdserve.core.ids import Epoch, RequestId, WorkerId
from pdserve.core.messages import TokenDelta
from pdserve.core.request import FinishReason, Job, SamplingParams
from pdserve.core.step import PromptNews, TokenLogprobs
from pdserve.core.token_ids import NamedTokens
from pdserve.node.sequence import with_prompt
from pdserve.workload.request import TraceRequest, arriving, own_segment


def set_fields(record: Any) -> Any:
    """The record, none of whose fields has its default: a copy that forgets one is another."""
    same = [f.name for f in fields(record) if f.default == getattr(record, f.name)]
    assert not same, f"give them another value: {same}"
    assert all(f.default_factory is MISSING for f in fields(record))
    return record


def test_a_job_that_is_sent() -> None:
    job = set_fields(
        Job(
            request_id=RequestId("r"),
            epoch=Epoch(2),
            choices=(0, 1),
            token_ids=NamedTokens.of([("prompt", 5)]),
            num_prompt_tokens=5,
            params=SamplingParams(max_tokens=3, seed=8),
            prefill_worker=WorkerId("p"),
            decode_worker=WorkerId("d"),
            cache_salt="salt",
            trace_context="trace",
            route_seq=3,
            number=4,
            answer_tokens=6,
        )
    )
    assert job.sent((1,), 7) == replace(job, choices=(1,), route_seq=7)


def test_a_request_at_another_time() -> None:
    request = set_fields(
        TraceRequest(
            index=1,
            at_s=2.0,
            segments=(own_segment(1, 3),),
            output_tokens=4,
            cancel_after_tokens=5,
            cancel_after_s=6.0,
        )
    )
    assert arriving(request, 7.0) == replace(request, at_s=7.0)


def test_a_first_token_that_tells_of_the_prompt() -> None:
    first = set_fields(
        TokenDelta(
            request_id=RequestId("r"),
            epoch=Epoch(2),
            choice=1,
            index=3,
            token_id=4,
            finish=FinishReason.STOP,
            logprobs=TokenLogprobs(logprob=-1.0, rank=1),
            skipped=5,
            prompt=PromptNews(cached_tokens=1),
        )
    )
    told = with_prompt(SimpleNamespace(is_scored=False), (first,), 9)  # type: ignore[arg-type]
    assert told == (replace(first, prompt=PromptNews(cached_tokens=9)),)
