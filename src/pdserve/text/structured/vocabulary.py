"""The model's tokens, as llguidance needs them: their bytes, and which of them are special.

The bytes are those of our own detokenizer, so that what a mask allows is what the client reads.
"""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLTokenizer

from pdserve.core.errors import ModelError
from pdserve.text.tokenizer import Tokenizer

_ANCHOR = "\x02"
"""Put before a text whose first word must not be taken for the first of a document."""


class _Words:
    """What `LLTokenizer` asks of a tokenizer; attributes are named as it reads them."""

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < vocab_size)
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode(_ANCHOR, add_special_tokens=False)

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text in the middle of an answer."""
        tokenizer = self._tokenizer
        ids = tokenizer.encode(text, add_special_tokens=False)
        if b"".join(map(tokenizer.token_bytes, ids)) == text.encode("utf-8"):
            return ids
        anchored = tokenizer.encode(_ANCHOR + text, add_special_tokens=False)
        return anchored[len(self._anchor) :]


def make_vocabulary(
    tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]
) -> LLTokenizer:
    """Tokens 0 to ``vocab_size`` - 1 (ids without a token are never allowed), of which any of
    ``eos_token_ids`` ends an answer. Takes a third of a second for 50 000 tokens.

    Raises `ModelError` for a model without an ending token.
    """
    if not eos_token_ids:
        raise ModelError(
            "the model has no end-of-text token, so an answer of a given form could not end; add "
            "eos_token_id to its generation_config.json"
        )
    words = _Words(tokenizer, vocab_size, eos_token_ids[0])
    return LLTokenizer(words, n_vocab=vocab_size, eos_token=list(eos_token_ids))  # type: ignore[arg-type]
