"""How the text of a vocabulary entry becomes bytes of the output.

Two families of tokenizers exist among Llama-like models. *Byte-level* ones (GPT-2's, Llama 3,
SmolLM) spell each byte as one printable character. *SentencePiece* ones (Llama 2, Mistral) spell a
space as U+2581 and a byte that has no entry as ``<0xE4>``. Either way the output is the
concatenation of the tokens' bytes, read as UTF-8; that makes incremental decoding exact and cheap.
Any other decoder is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdserve.core.errors import ModelError

_SPACE_MARK = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte. Printable Latin-1 stands for itself, the rest is moved up from U+0100.

    (GPT-2's table: https://github.com/openai/gpt-2, encoder.py)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(moved)})
    return alphabet


_BYTE_OF_CHARACTER = _byte_alphabet()


# The steps of a SentencePiece decoder, in order; the last one is optional.
_SENTENCEPIECE_STEPS: tuple[dict[str, Any], ...] = (
    {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
)


@dataclass(frozen=True, slots=True)
class PieceReader:
    """Reads vocabulary entries. ``drops_first_space``: one space at the very start is no output."""

    byte_level: bool
    drops_first_space: bool

    @classmethod
    def from_decoder(cls, decoder: Mapping[str, Any] | None) -> PieceReader:
        """Understand the ``decoder`` of a tokenizer.json, or raise `ModelError`."""
        steps = [decoder] if decoder is not None else []
        if decoder is not None and decoder.get("type") == "Sequence":
            steps = list(decoder["decoders"])
        kinds = [step.get("type") for step in steps]
        if kinds == ["ByteLevel"]:
            return cls(byte_level=True, drops_first_space=False)
        if len(steps) in (3, 4) and steps == list(_SENTENCEPIECE_STEPS[: len(steps)]):
            return cls(byte_level=False, drops_first_space=len(steps) == 4)
        raise ModelError(
            f"its decoder is {kinds or None}; pdserve knows byte-level decoders and those of "
            "SentencePiece models with byte fallback"
        )

    def read(self, text: str) -> bytes:
        """The bytes of one vocabulary entry."""
        if self.byte_level:
            try:
                return bytes([_BYTE_OF_CHARACTER[character] for character in text])
            except KeyError:
                # A character outside the alphabet: an added token, which is plain text.
                return text.encode("utf-8")
        if _BYTE_TOKEN.fullmatch(text):
            return bytes([int(text[3:5], 16)])
        return text.replace(_SPACE_MARK, " ").encode("utf-8")
