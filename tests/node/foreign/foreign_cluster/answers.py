"""What each request must answer, and what its client has of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from pdserve.core.effects import Deliver, Fail
from pdserve.core.engine_work import EnginePhase, EngineWork
from pdserve.core.ids import AttemptId, Epoch, RequestId
from pdserve.core.messages import TokenDelta
from pdserve.core.request import Request, RoutePreference, SamplingParams
from pdserve.engine.fake_foreign import FakeForeignEngine

VOCAB_SIZE = 32
WEIGHTS = "w"
ENDING = (3, 17)


def make_request(
    name: str,
    prompt: tuple[int, ...] = tuple(range(10)),
    *,
    max_tokens: int = 5,
    num_choices: int = 1,
    seed: int = 1,
    min_tokens: int = 0,
    stops: bool = False,
    route: RoutePreference = RoutePreference.AUTO,
) -> Request:
    return Request(
        request_id=RequestId(name),
        prompt_token_ids=prompt,
        params=SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            min_tokens=min_tokens,
            stop_token_ids=ENDING if stops else (),
        ),
        num_choices=num_choices,
        route=route,
    )


def expected_answer(request: Request, max_model_tokens: int) -> dict[int, list[TokenDelta]]:
    """The one right answer, by an engine that does nothing else."""
    engine = FakeForeignEngine(
        max_model_tokens=max_model_tokens, vocab_size=VOCAB_SIZE, weights_digest=WEIGHTS
    )
    work = EngineWork(
        attempt=AttemptId(request.request_id, Epoch(0)),
        choices=tuple(range(request.num_choices)),
        token_ids=request.prompt_token_ids,
        num_prompt_tokens=len(request.prompt_token_ids),
        params=request.params,
    )
    engine.submit(work, EnginePhase.WHOLE)
    found: dict[int, list[TokenDelta]] = {choice: [] for choice in work.choices}
    while (output := engine.step()) is not None:
        for delta in output.deltas:
            found[delta.choice].append(delta)
    return found


@dataclass
class Answer:
    """One client. ``wanted``: choices that it still reads."""

    request: Request
    expected: dict[int, list[TokenDelta]]
    wanted: set[int]
    taken: dict[int, int] = field(default_factory=dict)
    failure: Fail | None = None

    @classmethod
    def of(cls, request: Request, max_model_tokens: int) -> Answer:
        wanted = set(range(request.num_choices))
        return cls(request, expected_answer(request, max_model_tokens), wanted)

    @property
    def open_choices(self) -> list[int]:
        """Choices that are wanted and have not ended."""
        return [c for c in sorted(self.wanted) if self.taken.get(c, 0) < len(self.expected[c])]

    @property
    def is_over(self) -> bool:
        return self.failure is not None or not self.open_choices

    def hears(self, deliver: Deliver) -> None:
        """Each token is the next one of a choice that is wanted, and the right one."""
        assert self.failure is None
        for delta in deliver.deltas:
            index = self.taken.get(delta.choice, 0)
            assert delta.choice in self.wanted, f"{delta} is not wanted any more"
            assert index < len(self.expected[delta.choice]), f"{delta} after the end"
            right = self.expected[delta.choice][index]
            assert (delta.index, delta.token_id, delta.finish) == (
                right.index,
                right.token_id,
                right.finish,
            ), f"{delta} in place of {right}"
            self.taken[delta.choice] = index + 1
