"""Tokens to text, one token at a time, for one choice.

A character of several bytes is often spread over tokens. `Detokenizer` keeps the bytes of an
incomplete character until the rest comes, so what it returns never changes afterwards, and the
pieces together are what decoding all the tokens at once would give. Each token costs the length of
its bytes, however long the text before it is.
"""

from __future__ import annotations

import codecs

from pdserve.text.tokenizer import Tokenizer


class Detokenizer:
    """Incremental decoder of one choice. Not for use by several threads.

    Bytes that can never become a character turn into U+FFFD as soon as that is certain; the start
    of a character that the stream ends in, at `flush`. ``shown_ids`` are special tokens that are
    not skipped. SentencePiece tokenizers drop the space before the first word of a text: with
    ``continues_text`` the output is the continuation of a prompt, and that space is kept. (When
    such a tokenizer spells invalid UTF-8 in single-byte tokens, the valid characters around the
    invalid byte are kept here; the library's `decode` gives up the whole run.)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        continues_text: bool = False,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        skipped_ids = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._skipped_ids = skipped_ids - shown_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = tokenizer.drops_first_space and not continues_text

    def push(self, token_id: int) -> str:
        """Text that is final now, often empty."""
        if token_id in self._skipped_ids:
            return ""
        return self._without_first_space(
            self._decoder.decode(self._tokenizer.token_bytes(token_id))
        )

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character stayed incomplete, else nothing."""
        return self._without_first_space(self._decoder.decode(b"", final=True))

    def _without_first_space(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text
