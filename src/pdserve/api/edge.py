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
from pdserve.core.errors import RequestError
from pdserve.core.request import Constraint
from pdserve.obs.key_metrics import KeyMetrics
from pdserve.text.chat import ChatTemplate
from pdserve.text.tokenizer import Tokenizer

_INLINE_CHARS = 4096
"""Texts of this length together are encoded in about a millisecond, on the event loop."""


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

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text. Much text is encoded in a thread: nobody else's tokens wait."""

        def work() -> list[list[int]]:
            encode = self.tokenizer.encode
            return [encode(text, add_special_tokens=add_special_tokens) for text in texts]

        if sum(map(len, texts)) <= _INLINE_CHARS:
            return work()
        return await asyncio.to_thread(work)
