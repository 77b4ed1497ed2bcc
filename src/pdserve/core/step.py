"""One forward pass: what the batch machine asks of a model runner, and what comes back.

A plan is complete in itself. The runner keeps no state per sequence, which is what makes a resume,
a hand-off and a recompute the same to it.
"""

from __future__ import annotations

from pdserve.core.ids import AttemptId, BlockId, StepId, WorkerId
from pdserve.core.request import SamplingParams
from pdserve.core.token_ids import TokenIds
from pdserve.core.values import value

SILENT_TOKEN = 0
"""What a row has drawn in a step of which nobody says what it has drawn (`StepsDone`)."""


@value(kw_only=True)
class SampleSpec:
    """Draw output token ``index`` of each of ``choices`` from the logits of the row's last token.

    ``history`` holds prompt and output token ids so far, and only if a penalty needs them;
    its first ``num_prompt_tokens`` entries are the prompt (presence and frequency penalties count
    output tokens only, the repetition penalty counts both, as vLLM does). A constraint alone needs
    output tokens only: there is no prompt in its history.
    """

    params: SamplingParams
    choices: tuple[int, ...]
    index: int
    history: tuple[int, ...] | None = None
    num_prompt_tokens: int = 0

    @property
    def output(self) -> tuple[int, ...]:
        """The output tokens so far, of a spec that has a history."""
        assert self.history is not None, "the planner gives history to rows that need it"
        return self.history[self.num_prompt_tokens :]


@value()
class PromptScore:
    """Tell the log-probability of each of ``targets`` after the row's tokens up to the one before
    it: target i follows token i of the row. ``num_top`` likely ones are told beside each."""

    targets: TokenIds
    num_top: int


@value(kw_only=True)
class StepRow:
    """One sequence's share of a step: ``token_ids`` at positions ``start``, ``start`` + 1, ...

    ``block_ids`` is the sequence's table from position 0 and covers the last new token. KV of the
    new tokens is written, KV of ``[0, start)`` is read. ``sample`` is None for a chunk that does
    not reach the end of the known tokens.
    """

    attempt: AttemptId
    token_ids: TokenIds
    start: int
    block_ids: tuple[BlockId, ...]
    sample: SampleSpec | None
    pushes: bool = False
    """True if a transfer is open for this row: the layer sink pushes its blocks."""
    score: PromptScore | None = None
    """For a chunk of a prompt whose log-probabilities are wanted."""

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@value(kw_only=True)
class StepPlan:
    """``copies`` (source, destination block) are done in all layers before the forward pass."""

    step_id: StepId
    rows: tuple[StepRow, ...]
    copies: tuple[tuple[BlockId, BlockId], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)

    @property
    def shape(self) -> StepShape:
        """What the step's duration depends on."""
        prompt_tokens = prompt_pairs = num_decoding = context_tokens = 0
        for row in self.rows:
            if len(row.token_ids) == 1 and row.start > 0:
                num_decoding += 1
                context_tokens += row.end
            else:
                prompt_tokens += len(row.token_ids)
                prompt_pairs += row.end * row.end - row.start * row.start
        return StepShape(prompt_tokens, prompt_pairs, num_decoding, context_tokens)


@value()
class StepShape:
    """The size of a step, as step-time models see it (``cost.step``).

    ``prompt_tokens``: tokens of prompts computed in it. ``prompt_pairs``: sum over their chunks of
    end² - start², which for whole prompts is the sum of their squared lengths, however they are
    chunked. ``num_decoding``: sequences that decode one token. ``context_tokens``: the sum of
    their lengths. A prompt's last token alone counts as decoding: it costs the same.
    """

    prompt_tokens: int = 0
    prompt_pairs: int = 0
    num_decoding: int = 0
    context_tokens: int = 0


@value(kw_only=True)
class BarePlan(StepPlan):
    """A plan without rows, for a driver that computes nothing: ``size`` is what it needs of them.
    Rows cost far more to make than all else in a step of many decodes."""

    size: StepShape

    @property
    def shape(self) -> StepShape:
        return self.size


@value()
class StepSample:
    """How long a step took, in seconds on the worker's clock."""

    shape: StepShape
    elapsed_s: float


@value()
class TransferSample:
    """How a hand-off went: ``num_bytes`` were sent to ``peer``, and ``exposed_s`` passed from when
    both the prefill was done and the ticket was there (waiting for room is not the link's doing)
    until the peer had accepted. ``hidden_s``: for how long bytes could be sent before that."""

    peer: WorkerId
    num_bytes: int
    exposed_s: float
    hidden_s: float = 0.0


@value()
class TokenLogprobs:
    """Natural log-probabilities before temperature and filters (as OpenAI and vLLM report them).

    ``top`` holds (token id, log-probability), most likely first; ``rank`` of the chosen token
    counts from 1.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@value(kw_only=True)
class PromptNews:
    """What is told of a prompt: how many of its tokens a prefix cache held, and the
    log-probabilities of its tokens from the second one on, if they are wanted."""

    cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None


@value()
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None = None


@value(kw_only=True)
class StepResult:
    """``tokens[i]`` belongs to ``plan.rows[i]``: one entry per choice of its sample spec, in order;
    empty for a row that samples nothing. ``scores[i]`` is what the score of row i asks for; empty
    for rows without, and altogether if none has one. If the step failed, ``error`` says why.
    ``failures`` holds (row, why) of rows that could draw nothing through a fault of their own, in a
    step that is good.
    """

    step_id: StepId
    tokens: tuple[tuple[SampledToken, ...], ...]
    scores: tuple[tuple[TokenLogprobs, ...], ...] = ()
    error: str | None = None
    failures: tuple[tuple[int, str], ...] = ()
