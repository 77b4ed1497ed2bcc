"""All choices of one HTTP request, as their tokens come in: the state that both endpoints share."""

from __future__ import annotations

from collections.abc import Callable

from pdserve.api.openai.choice import ChoiceText, Piece
from pdserve.api.openai.requests import Order
from pdserve.core.ids import RequestId
from pdserve.core.messages import TokenDelta
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

    @property
    def is_complete(self) -> bool:
        """True once every choice has ended."""
        return self._num_open == 0

    def take(self, prompt: int, delta: TokenDelta) -> Piece | None:
        """What the client is to be told after this token of prompt number ``prompt``, if anything.

        Tokens of a choice that has ended are dropped: they were on their way when it was stopped.
        """
        choice = self._choices[prompt * self._num_choices + delta.choice]
        if choice.has_ended:
            return None
        piece = choice.push(delta)
        if choice.has_ended:
            self._num_open -= 1
            if delta.finish is None:
                self._stop_choice(self._order.requests[prompt].request_id, delta.choice)
        return piece

    def usage(self) -> dict[str, int]:
        """Tokens of all prompts and choices."""
        return _usage(
            sum(len(request.prompt_token_ids) for request in self._order.requests),
            sum(choice.num_tokens for choice in self._choices),
        )

    def usage_of(self, choice: int) -> dict[str, int]:
        """Tokens of one choice and its prompt, so far."""
        request = self._order.requests[choice // self._num_choices]
        return _usage(len(request.prompt_token_ids), self._choices[choice].num_tokens)


def _usage(num_prompt_tokens: int, num_answer_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_answer_tokens,
        "total_tokens": num_prompt_tokens + num_answer_tokens,
    }
