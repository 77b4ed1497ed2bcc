"""What every route needs: the server, the words of its model, and the limits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from pdserve.api.gateway import Gateway
from pdserve.api.request_ids import RequestDirectory
from pdserve.api.settings import ApiSettings
from pdserve.text.chat import ChatTemplate
from pdserve.text.tokenizer import Tokenizer

_INLINE_CHARS = 4096
"""Texts up to this length are encoded in well under a millisecond, on the event loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """Made once by `create_app` and handed to each group of routes."""

    gateway: Gateway
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    settings: ApiSettings
    directory: RequestDirectory

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``. A long text is encoded in a thread: nobody else's tokens wait."""
        if len(text) <= _INLINE_CHARS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(
            self.tokenizer.encode, text, add_special_tokens=add_special_tokens
        )
