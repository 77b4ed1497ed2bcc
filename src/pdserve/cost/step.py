"""How long a step takes, by its shape.

A step that computes prompts takes ``prompt_base_s + per_prompt_token_s * tokens + per_pair_s *
pairs`` (``pairs``: `StepShape.prompt_pairs`, quadratic attention included); one that only decodes
takes ``decode_base_s + per_sequence_s * batch + per_context_token_s * context``. One that does both
reads the weights once: it takes what its prompts take, and what its sequences add. Splitwise's
tables (sec. III) and Mooncake's estimate of prefill time have this form.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.step import StepShape


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """Coefficients in seconds; none is negative."""

    prompt_base_s: float
    per_prompt_token_s: float
    per_pair_s: float
    decode_base_s: float
    per_sequence_s: float
    per_context_token_s: float

    def step_s(self, shape: StepShape) -> float:
        """Seconds of a step of this shape; 0 for one that is empty."""
        decode_s = (
            self.per_sequence_s * shape.num_decoding
            + self.per_context_token_s * shape.context_tokens
        )
        if shape.prompt_tokens:
            return self.prompt_s(shape.prompt_tokens, shape.prompt_pairs) + decode_s
        return self.decode_base_s + decode_s if shape.num_decoding else 0.0

    def decodes_s(self, sequences: int, lengths: range) -> list[float]:
        """`step_s` of steps that decode so many sequences, of these lengths together."""
        base_s, all_s, each_s = (
            self.decode_base_s,
            self.per_sequence_s * sequences,
            self.per_context_token_s,
        )
        return [base_s + (all_s + each_s * context) for context in lengths]

    def prompt_s(self, tokens: int, pairs: int) -> float:
        """Seconds of a step with these prompt tokens alone."""
        return self.prompt_base_s + self.per_prompt_token_s * tokens + self.per_pair_s * pairs

    def prefill_s(self, num_tokens: int, num_cached: int = 0) -> float:
        """Seconds of one prompt, all of it in one step, ``num_cached`` tokens of it already there.

        At least one token is computed, for its logits.
        """
        num_cached = min(num_cached, num_tokens - 1)
        pairs = num_tokens * num_tokens - num_cached * num_cached
        return self.prompt_s(num_tokens - num_cached, pairs)

    def decode_s(self, num_sequences: int, context_tokens: int) -> float:
        """Seconds of a step that decodes so many sequences of this length together."""
        return self.step_s(StepShape(num_decoding=num_sequences, context_tokens=context_tokens))
