"""The clients of all requests: takes what the router delivers, and holds it to the contract."""

from __future__ import annotations

from dataclasses import dataclass, field

from pdserve.core.effects import Deliver, Fail, Refusal
from pdserve.core.ids import Epoch, RequestId
from pdserve.core.messages import StartJob
from virtual_cluster.oracle import Ask


@dataclass
class Answer:
    """What one client has. ``wanted``: choices that it still reads; ``epochs``: the attempt from
    which each choice's next token may come."""

    ask: Ask
    tokens: list[list[int]]
    wanted: set[int]
    epochs: dict[int, Epoch] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    aborted: bool = False
    failure: Fail | None = None

    @property
    def is_over(self) -> bool:
        return self.failure is not None or self.aborted or self.wanted <= self.finished

    @property
    def is_complete(self) -> bool:
        """True if every choice has all of its right tokens."""
        return tuple(map(tuple, self.tokens)) == self.ask.answers and self.failure is None

    @property
    def has_tokens(self) -> bool:
        return any(self.tokens)


class Client:
    """All answers, by request id. Every method raises if the router breaks its word."""

    def __init__(self) -> None:
        self.answers: dict[RequestId, Answer] = {}

    def asks(self, ask: Ask) -> None:
        assert ask.request_id not in self.answers
        choices = range(ask.request.num_choices)
        self.answers[ask.request_id] = Answer(ask, [[] for _ in choices], set(choices))

    def goes(self, request_id: RequestId, choices: tuple[int, ...] | None) -> None:
        """It reads no more of these choices."""
        answer = self.answers[request_id]
        answer.wanted -= set(range(len(answer.tokens)) if choices is None else choices)
        answer.aborted |= not answer.wanted - answer.finished

    def started(self, message: StartJob) -> None:
        """The router has started an attempt: no earlier one may speak for its choices."""
        job = message.job
        answer = self.answers[job.request_id]
        num_prompt_tokens = len(answer.ask.request.prompt_token_ids)
        assert job.num_prompt_tokens == num_prompt_tokens
        assert not answer.is_over, f"{job.attempt} is started after the end"
        for choice in job.choices:
            assert choice in answer.wanted - answer.finished, f"{job.attempt}: {choice} is over"
            assert job.epoch > answer.epochs.get(choice, 0), "an epoch is used again"
            taken = answer.ask.request.prompt_token_ids + tuple(answer.tokens[choice])
            assert job.token_ids == taken, f"{job.attempt} resumes from other tokens than taken"
            answer.epochs[choice] = job.epoch

    def hears(self, deliver: Deliver) -> None:
        answer = self.answers[deliver.request_id]
        ask = answer.ask
        assert answer.failure is None, "tokens after a failure"
        for delta in deliver.deltas:
            choice, index = delta.choice, delta.index
            assert delta.request_id == deliver.request_id
            assert choice in answer.wanted, f"{delta} is not wanted any more"
            assert choice not in answer.finished, f"{delta} after the end"
            assert delta.epoch == answer.epochs[choice], f"{delta} is of a stale attempt"
            assert index == len(answer.tokens[choice]), f"{delta} is not the next token"
            assert delta.token_id == ask.answers[choice][index], f"{delta} is wrong"
            is_last = index == len(ask.answers[choice]) - 1
            assert delta.finish == (ask.finishes[choice] if is_last else None), delta
            answer.tokens[choice].append(delta.token_id)
            if is_last:
                answer.finished.add(choice)

    def fails(self, fail: Fail) -> None:
        answer = self.answers[fail.request_id]
        assert not answer.is_over, f"{fail} after the end"
        if answer.has_tokens:
            assert fail.kind in (Refusal.UNAVAILABLE, Refusal.INTERNAL), f"{fail} after token 0"
        assert (fail.kind == Refusal.OVERLOADED) == (fail.retry_after_s is not None), fail
        answer.failure = fail
