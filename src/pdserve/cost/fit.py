"""What steps and hand-offs of real workers teach the cost models.

`StepFit` splits each step into the two halves of `StepModel`: a step that only decodes is a sample
of the decode half; from one that computes prompts, what its decoding sequences add by the decode
model of now is taken off, and the rest is a sample of the prompt half. `LinkFit` learns the visible
constant and the time of a byte from hand-offs. Both start from a stated model and say how far off
their predictions have been. How a single line is fitted is told in ``cost.regression``.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.step import StepSample, TransferSample
from pdserve.cost.link import LinkModel
from pdserve.cost.regression import Features, Regression, RegressionState
from pdserve.cost.step import StepModel

PRIOR_PROMPTS = ((64, 0), (512, 0), (2048, 0), (512, 3584))
"""(tokens computed, tokens before them) at which a stated model is believed."""
PRIOR_BATCHES = ((1, 256), (8, 512), (32, 1024), (32, 4096))
"""(sequences, length of each)."""
PRIOR_BYTES = (1e5, 1e7, 1e9)
LEAST_S = 1e-9
LEAST_PROMPT_SHARE = 0.1
"""Of a mixed step at least this share is its prompts', whatever the decode model says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFitState:
    """What a `StepFit` has learned, and from where it started."""

    prior: StepModel
    prompt: RegressionState
    decode: RegressionState


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFitState:
    """What a `LinkFit` has learned, and from where it started."""

    prior: LinkModel
    line: RegressionState


class StepFit:
    """An online fit of `StepModel`. ``prior`` weighs like ``prior_weight`` samples of each half;
    about ``window`` samples of each half count."""

    def __init__(
        self,
        prior: StepModel,
        *,
        prior_weight: float = 4.0,
        window: float = 512.0,
        state: StepFitState | None = None,
    ) -> None:
        """``state`` (whose prior is then used) continues a fit. Raises `ValueError` if it is not
        one of a step fit."""
        self.prior = prior if state is None else state.prior
        self._prompt = Regression(
            [_prompt_prior(self.prior, *shape) for shape in PRIOR_PROMPTS],
            (1.0, 1e3, 1e6),
            prior_weight=prior_weight,
            window=window,
            state=None if state is None else state.prompt,
        )
        self._decode = Regression(
            [_decode_prior(self.prior, *shape) for shape in PRIOR_BATCHES],
            (1.0, 1e1, 1e4),
            prior_weight=prior_weight,
            window=window,
            state=None if state is None else state.decode,
        )
        self._model: StepModel | None = self.prior if state is None else None

    @property
    def num_prompt_samples(self) -> int:
        return self._prompt.num_samples

    @property
    def num_decode_samples(self) -> int:
        return self._decode.num_samples

    @property
    def prompt_error(self) -> float:
        """Running mean of ``|measured - predicted| / measured`` of steps with prompts."""
        return self._prompt.error

    @property
    def decode_error(self) -> float:
        """The same of steps that only decode."""
        return self._decode.error

    def add(self, sample: StepSample) -> None:
        """Learn from a finished step."""
        shape = sample.shape
        if shape.prompt_tokens:
            features = (1.0, float(shape.prompt_tokens), float(shape.prompt_pairs))
            self._prompt.add(features, self._prompt_share_s(sample))
        elif shape.num_decoding:
            features = (1.0, float(shape.num_decoding), float(shape.context_tokens))
            self._decode.add(features, sample.elapsed_s)
        self._model = None

    def model(self) -> StepModel:
        """The coefficients of now."""
        if self._model is None:
            prompt = self._prompt.coefficients
            decode = self._decode.coefficients
            if not self.num_prompt_samples:
                prompt = (
                    self.prior.prompt_base_s,
                    self.prior.per_prompt_token_s,
                    self.prior.per_pair_s,
                )
            if not self.num_decode_samples:
                decode = (
                    self.prior.decode_base_s,
                    self.prior.per_sequence_s,
                    self.prior.per_context_token_s,
                )
            self._model = StepModel(
                prompt_base_s=prompt[0],
                per_prompt_token_s=prompt[1],
                per_pair_s=prompt[2],
                decode_base_s=decode[0],
                per_sequence_s=decode[1],
                per_context_token_s=decode[2],
            )
        return self._model

    def state(self) -> StepFitState:
        return StepFitState(
            prior=self.prior, prompt=self._prompt.state(), decode=self._decode.state()
        )

    def _prompt_share_s(self, sample: StepSample) -> float:
        shape = sample.shape
        if not shape.num_decoding:
            return sample.elapsed_s
        _, per_sequence_s, per_context_token_s = self._decode.coefficients
        decode_s = per_sequence_s * shape.num_decoding + per_context_token_s * shape.context_tokens
        return max(sample.elapsed_s - decode_s, LEAST_PROMPT_SHARE * sample.elapsed_s)


class LinkFit:
    """An online fit of `LinkModel`.

    ``hidden_share`` is the prior's. What a prefill has hidden of a hand-off is not seen: if by the
    model of now all of it was hidden, and no more than twice the constant is visible, only the
    constant learns from it. So the time of a byte is at most that of a link as fast as was seen.
    """

    def __init__(
        self,
        prior: LinkModel,
        *,
        prior_weight: float = 4.0,
        window: float = 256.0,
        state: LinkFitState | None = None,
    ) -> None:
        """As `StepFit`."""
        self.prior = prior if state is None else state.prior
        self._line = Regression(
            [_link_prior(self.prior, num_bytes) for num_bytes in PRIOR_BYTES],
            (1.0, 1e7),
            prior_weight=prior_weight,
            window=window,
            state=None if state is None else state.line,
        )
        self._model: LinkModel | None = self.prior if state is None else None

    @property
    def num_samples(self) -> int:
        return self._line.num_samples

    @property
    def error(self) -> float:
        """Running mean of ``|measured - predicted| / measured``."""
        return self._line.error

    def add(self, sample: TransferSample) -> None:
        """Learn from a hand-off that was accepted."""
        fixed_s, per_byte_s = self._line.coefficients
        helped_s = self.prior.hidden_share * sample.hidden_s
        hidden = sample.num_bytes * per_byte_s <= helped_s
        if hidden and sample.exposed_s <= 2.0 * fixed_s:
            self._line.add((1.0, 0.0), sample.exposed_s)
        else:
            self._line.add((1.0, float(sample.num_bytes)), sample.exposed_s + helped_s)
        self._model = None

    def model(self) -> LinkModel:
        """The coefficients of now."""
        if self._model is None:
            fixed_s, per_byte_s = self._line.coefficients
            self._model = LinkModel(
                fixed_s=fixed_s, per_byte_s=per_byte_s, hidden_share=self.prior.hidden_share
            )
        return self._model

    def state(self) -> LinkFitState:
        return LinkFitState(prior=self.prior, line=self._line.state())


def _prompt_prior(model: StepModel, tokens: int, before: int) -> tuple[Features, float]:
    pairs = (before + tokens) ** 2 - before**2
    features = (1.0, float(tokens), float(pairs))
    return features, max(LEAST_S, model.prompt_s(tokens, pairs))


def _decode_prior(model: StepModel, batch: int, length: int) -> tuple[Features, float]:
    context_tokens = batch * length
    features = (1.0, float(batch), float(context_tokens))
    return features, max(LEAST_S, model.decode_s(batch, context_tokens))


def _link_prior(model: LinkModel, num_bytes: float) -> tuple[Features, float]:
    return (1.0, num_bytes), max(LEAST_S, model.fixed_s + num_bytes * model.per_byte_s)


def halves(prompt: StepModel, decode: StepModel) -> StepModel:
    """The prompt half of one model beside the decode half of another."""
    return StepModel(
        prompt_base_s=prompt.prompt_base_s,
        per_prompt_token_s=prompt.per_prompt_token_s,
        per_pair_s=prompt.per_pair_s,
        decode_base_s=decode.decode_base_s,
        per_sequence_s=decode.per_sequence_s,
        per_context_token_s=decode.per_context_token_s,
    )
