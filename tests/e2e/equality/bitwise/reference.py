"""The plain reference: one runner, one sequence, steps written by hand.

The whole prompt is one step, each further token is another one, in a pool that nobody has used. No
machine, no batch, no chunks, no cache and no hand-off: what comes out is what the model says.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.ids import AttemptId, BlockId, Epoch, RequestId, StepId
from pdserve.core.request import FinishReason, SamplingParams
from pdserve.core.step import SampledToken, SampleSpec, StepPlan, StepRow, TokenLogprobs
from pdserve.engine.base import ModelRunner


@dataclass(frozen=True, slots=True)
class Token:
    """One output token with the bits of its log-probabilities; two are equal or they are not."""

    token_id: int
    logprob: str
    rank: int
    top: tuple[tuple[int, str], ...]
    finish: FinishReason | None

    @classmethod
    def of(
        cls, token_id: int, logprobs: TokenLogprobs | None, finish: FinishReason | None
    ) -> Token:
        assert logprobs is not None, "log-probabilities were asked for"
        top = tuple((other, value.hex()) for other, value in logprobs.top)
        return cls(token_id, logprobs.logprob.hex(), logprobs.rank, top, finish)


class Reference:
    """Answers, each computed once. ``runner`` is used for nothing else, by one thread."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._answers: dict[tuple[tuple[int, ...], SamplingParams, int], tuple[Token, ...]] = {}
        self._attempt = AttemptId(RequestId("alone"), Epoch(1))

    def answer(
        self, prompt: tuple[int, ...], params: SamplingParams, choice: int = 0
    ) -> tuple[Token, ...]:
        """All tokens of one choice."""
        key = (prompt, params, choice)
        if key not in self._answers:
            self._answers[key] = self._compute(prompt, params, choice)
        return self._answers[key]

    def close(self) -> None:
        self._runner.close()

    def _compute(
        self, prompt: tuple[int, ...], params: SamplingParams, choice: int
    ) -> tuple[Token, ...]:
        layout = self._runner.info.layout
        num_blocks = layout.num_blocks_for(len(prompt) + params.max_tokens)
        self._runner.attach_pool(memoryview(bytearray(layout.pool_bytes(num_blocks))), num_blocks)
        known = prompt
        answer: list[Token] = []
        while not answer or answer[-1].finish is None:
            new = known if not answer else known[-1:]
            index = len(answer)
            row = StepRow(
                attempt=self._attempt,
                token_ids=new,
                start=len(known) - len(new),
                block_ids=tuple(BlockId(block) for block in range(num_blocks)),
                sample=SampleSpec(
                    params=params,
                    choices=(choice,),
                    index=index,
                    history=known,
                    num_prompt_tokens=len(prompt),
                ),
            )
            result = self._runner.execute(StepPlan(step_id=StepId(index), rows=(row,)))
            ((drawn,),) = result.tokens
            answer.append(Token.of(drawn.token_id, drawn.logprobs, _finish(params, index, drawn)))
            known += (drawn.token_id,)
        return tuple(answer)


def _finish(params: SamplingParams, index: int, drawn: SampledToken) -> FinishReason | None:
    endings = set(params.stop_token_ids)
    if not params.ignore_eos:
        endings |= set(params.eos_token_ids)
    if drawn.token_id in endings:
        assert index >= params.min_tokens, "an ending token was drawn before min_tokens"
        return FinishReason.STOP
    return FinishReason.LENGTH if index + 1 == params.max_tokens else None
