"""All choices of one HTTP request, as their tokens come in: the state that both endpoints share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pdserve.api.openai.choice import ChoiceText, Piece
from pdserve.api.openai.requests import Order
from pdserve.core.ids import RequestId
from pdserve.core.messages import TokenDelta
from pdserve.core.step import TokenLogprobs
from pdserve.text.tokenizer import Tokenizer


class Generation:
    """Feeds each token to its choice. Choices are numbered prompt by prompt.

    ``stop_choice`` is told of every choice that a stop string ended while its tokens still come.
    """

    def __init__(
        self, order: Order, tokenizer: Tokenizer, stop_choice: Callable[[RequestId, int], None]
    ) -> None:
        self._order = order
        self._stop_choice = stop_choice
        self._num_choices = order.num_choices
        self._choices = [
            ChoiceText(index, order.options, request.params, tokenizer)
            for index, request in enumerate(
                request for request in order.requests for _ in range(order.num_choices)
            )
        ]
        self._num_open = len(self._choices)
        self._cached_tokens = [0] * len(order.requests)
        self._prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}

    @property
    def is_complete(self) -> bool:
        """True once every choice has ended."""
        return self._num_open == 0

    def take(self, prompt: int, delta: TokenDelta) -> Piece | None:
        """What the client is to be told after this token of prompt number ``prompt``, if anything.

        Tokens of a choice that has ended are dropped: they were on their way when it was stopped.
        """
        news = delta.prompt
        if news is not None:
            self._cached_tokens[prompt] = news.cached_tokens
            if news.logprobs is not None:
                self._prompt_logprobs[prompt] = news.logprobs
        choice = self._choices[prompt * self._num_choices + delta.choice]
        if choice.has_ended:
            return None
        piece = choice.push(delta)
        if piece is not None and delta.index == 0:
            piece.prompt_logprobs = self._prompt_logprobs.get(prompt)
        if choice.has_ended:
            self._num_open -= 1
            if delta.finish is None:
                self._stop_choice(self._order.requests[prompt].request_id, delta.choice)
        return piece

    def usage(self) -> dict[str, Any]:
        """Tokens of all prompts and choices."""
        return _usage(
            sum(len(request.prompt_token_ids) for request in self._order.requests),
            sum(choice.num_tokens for choice in self._choices),
            sum(self._cached_tokens),
        )

    def usage_of(self, choice: int) -> dict[str, Any]:
        """Tokens of one choice and its prompt, so far."""
        prompt = choice // self._num_choices
        return _usage(
            len(self._order.requests[prompt].prompt_token_ids),
            self._choices[choice].num_tokens,
            self._cached_tokens[prompt],
        )


def _usage(num_prompt_tokens: int, num_answer_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Tokens of the prompt that were in a prefix cache are among those of the prompt."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_answer_tokens,
        "total_tokens": num_prompt_tokens + num_answer_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
