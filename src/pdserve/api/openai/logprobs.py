"""Log-probabilities in the two shapes of OpenAI's endpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pdserve.api.openai.choice import LoggedToken
from pdserve.text.tokenizer import Tokenizer

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not know (the same number as in vLLM)."""


class LogprobWriter:
    """Writes the tokens of one HTTP request; remembers their texts, as the likely ones recur."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def completion(self, tokens: Sequence[LoggedToken]) -> dict[str, Any]:
        """``logprobs`` of a completion choice: parallel lists, one entry per token."""
        return {
            "text_offset": [token.text_offset for token in tokens],
            "token_logprobs": [_finite(token.logprobs.logprob) for token in tokens],
            "tokens": [self._text(token.token_id) for token in tokens],
            "top_logprobs": [
                {
                    self._text(token_id): _finite(logprob)
                    # The chosen token is in it even if it is not among the likely ones.
                    for token_id, logprob in (
                        *token.logprobs.top,
                        (token.token_id, token.logprobs.logprob),
                    )
                }
                for token in tokens
            ],
        }

    def chat(self, tokens: Iterable[LoggedToken]) -> dict[str, Any]:
        """``logprobs`` of a chat choice: one object per token."""
        return {
            "content": [
                {
                    **self._entry(token.token_id, token.logprobs.logprob),
                    "top_logprobs": [self._entry(*likely) for likely in token.logprobs.top],
                }
                for token in tokens
            ]
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = self._look_up(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}

    def _text(self, token_id: int) -> str:
        return self._look_up(token_id)[0]

    def _look_up(self, token_id: int) -> tuple[str, bytes]:
        known = self._known.get(token_id)
        if known is None:
            raw = self._tokenizer.token_bytes(token_id)
            known = self._known[token_id] = (_readable(raw), raw)
        return known


def _readable(raw: bytes) -> str:
    """A token's text; for a piece of a character ``bytes:\\xe2\\x80``, which stays distinct."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
