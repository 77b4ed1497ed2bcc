"""Log-probabilities in the two shapes of OpenAI's endpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pdserve.api.openai.choice import LoggedToken
from pdserve.core.step import TokenLogprobs
from pdserve.text.tokenizer import Tokenizer

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not know (the same number as in vLLM)."""


class LogprobWriter:
    """Writes the tokens of one HTTP request; remembers their texts, as the likely ones recur."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def completion(
        self, tokens: Sequence[LoggedToken], num_chars_before: int = 0
    ) -> dict[str, list[Any]]:
        """``logprobs`` of a completion choice: parallel lists, one entry per token. So many
        characters of an echo stand before its text."""
        return {
            "text_offset": [num_chars_before + token.text_offset for token in tokens],
            "token_logprobs": [_finite(token.logprobs.logprob) for token in tokens],
            "tokens": [self._text(token.token_id) for token in tokens],
            "top_logprobs": [self._likely(token.token_id, token.logprobs) for token in tokens],
        }

    def echoed(
        self,
        prompt: Sequence[int],
        scores: Sequence[TokenLogprobs] | None,
        num_top: int,
        num_chars: int,
    ) -> dict[str, list[Any]]:
        """The same of a prompt's tokens, ``scores`` of the second and later ones; the first has
        none. The prompt's text has so many characters."""
        offsets, raw = [], b""
        for token_id in prompt:
            offsets.append(min(len(raw.decode(errors="ignore")), num_chars))
            raw += self._look_up(token_id)[1]
        known = scores or ()
        return {
            "text_offset": offsets,
            "token_logprobs": [None, *(_finite(score.logprob) for score in known)],
            "tokens": [self._text(token_id) for token_id in prompt],
            "top_logprobs": [
                None,
                *(
                    self._likely(
                        token_id, TokenLogprobs(score.logprob, score.rank, score.top[:num_top])
                    )
                    for token_id, score in zip(prompt[1:], known, strict=False)
                ),
            ],
        }

    def prompt(
        self, prompt: Sequence[int], scores: Sequence[TokenLogprobs] | None
    ) -> list[dict[str, Any] | None]:
        """``prompt_logprobs`` as vLLM writes them: per token its own and the likely ones, by id and
        with their ranks; none of the first."""
        return [None, *map(self._ranked, prompt[1:], scores or ())]

    def _ranked(self, token_id: int, score: TokenLogprobs) -> dict[str, Any]:
        ranks = {likely: (logprob, rank) for rank, (likely, logprob) in enumerate(score.top, 1)}
        return {
            str(known): {
                "logprob": _finite(logprob),
                "rank": rank,
                "decoded_token": self._text(known),
            }
            for known, (logprob, rank) in ({token_id: (score.logprob, score.rank)} | ranks).items()
        }

    def _likely(self, token_id: int, logprobs: TokenLogprobs) -> dict[str, float]:
        """By text. The chosen token is in it even if it is not among the likely ones."""
        pairs = (*logprobs.top, (token_id, logprobs.logprob))
        return {self._text(known): _finite(logprob) for known, logprob in pairs}

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
