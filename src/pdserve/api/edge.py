"""What every route needs: the server, the words of its model, and the limits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.api.constraint_check import ConstraintCheck
from pdserve.api.gateway import Gateway
from pdserve.api.keys import KeyStore
from pdserve.api.openai.formats import FormatFields
from pdserve.api.request_ids import RequestDirectory
from pdserve.api.settings import ApiSettings
from pdserve.core.errors import ContextLengthError, RequestError
from pdserve.core.request import Constraint
from pdserve.obs.key_metrics import KeyMetrics
from pdserve.text.chat import ChatTemplate
from pdserve.text.tokenizer import Tokenizer

_INLINE_CHARS = 4096
"""Texts of this length together are encoded in about a millisecond, on the event loop."""
_CHARS_PER_TOKEN = 16
"""Ordinary text has four or fewer. Where a text is longer than the model can read even so, its
beginning is encoded first; all of it would take seconds of a core and a hundred bytes a letter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """Made once by `create_app` and handed to each group of routes."""

    gateway: Gateway
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    settings: ApiSettings
    directory: RequestDirectory
    check_constraint: ConstraintCheck
    keys: KeyStore | None = None
    key_metrics: KeyMetrics | None = None

    async def constraint_of(self, fields: FormatFields) -> Constraint | None:
        """What the answer is to be held to; tried, so that it can be used.

        Raises `RequestError`.
        """
        form = fields.asked_form()
        if form is None:
            return None
        await self.try_constraint(*form)
        return form[0]

    async def try_constraint(self, constraint: Constraint, field: str) -> None:
        """Raises `RequestError` if the engine or the model cannot follow the constraint."""
        if not self.gateway.card.constrains:
            raise RequestError(
                f"{field} is not served: this server's engine cannot hold an answer to a form",
                field,
            )
        await self.check_constraint(constraint, field)

    async def encode(
        self, texts: Sequence[str], param: str, *, add_special_tokens: bool
    ) -> list[list[int]]:
        """Token ids of each text. Much text is encoded in a thread: nobody else's tokens wait.

        Raises `ContextLengthError`, which names ``param``, for a text that is longer by far than
        the model can read.
        """

        def work() -> list[list[int]]:
            encode = self.tokenizer.encode
            for text in texts:
                self._check_beginning(text, param)
            return [encode(text, add_special_tokens=add_special_tokens) for text in texts]

        if sum(map(len, texts)) <= _INLINE_CHARS:
            return work()
        return await asyncio.to_thread(work)

    def _check_beginning(self, text: str, param: str) -> None:
        """Raises `ContextLengthError` if its beginning has twice the tokens that fit: what follows
        may change the last tokens of it, not half of them."""
        limit = self.gateway.card.max_model_tokens
        num_chars = _CHARS_PER_TOKEN * limit
        if len(text) <= 2 * num_chars:
            return
        num_tokens = len(self.tokenizer.encode(text[:num_chars], add_special_tokens=False))
        if num_tokens > 2 * limit:
            raise ContextLengthError(
                f"this model's maximum context length is {limit} tokens, and the first {num_chars} "
                f"of the {len(text)} characters in the prompt have {num_tokens} already: shorten "
                "the prompt",
                param,
            )
