"""The model's tokenizer: text to token ids, and the bytes behind each id.

Loaded once from a folder's ``tokenizer.json`` and shared by all requests. That file alone decides
how text becomes ids, BOS and EOS included: ``add_bos_token`` in ``tokenizer_config.json`` counts
for nothing beside it, as in transformers 5. The other file adds which tokens are special.
Everything that is not understood about how ids become text is refused here, since `token_bytes`
and the incremental detokenizer must say the same as `decode`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from pdserve.core.errors import ModelError, RequestError
from pdserve.text.token_pieces import PieceReader

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_MAX_TOKEN_ID = 2**32 - 1


class Tokenizer:
    """Encodes and decodes. Safe to call from many threads at once: nothing changes after start.

    ``vocab_size`` is the highest id + 1 (the model's vocabulary may be padded beyond it);
    ``named_tokens`` maps ``bos_token``, ``eos_token``, ``unk_token`` and ``pad_token`` to their
    text, as far as the model has them; ``special_ids`` are left out of text by default.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        """Take over ``backend``; ``config`` is a parsed tokenizer_config.json.

        Raises `ModelError` if the tokenizer is of an unknown kind.
        """
        self.named_tokens = {
            name: text for name in _NAMED_TOKENS if (text := configured_token(config.get(name)))
        }
        backend.no_truncation()
        backend.no_padding()
        _mark_special(backend, config, self.named_tokens)
        self._backend = backend
        description = json.loads(backend.to_str())
        self._pieces = PieceReader.from_decoder(description.get("decoder"))
        self.drops_first_space = self._pieces.drops_first_space
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.special_ids = frozenset(
            token["id"] for token in description.get("added_tokens", ()) if token["special"]
        )
        self._token_bytes: list[bytes] = [b""] * self.vocab_size
        for text, token_id in vocabulary.items():
            self._token_bytes[token_id] = self._pieces.read(text)

    @classmethod
    def from_folder(cls, path: Path | str) -> Tokenizer:
        """The tokenizer of a model folder. Raises `ModelError` with the remedy."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelError(
                f"{folder} has no tokenizer.json; load the tokenizer with transformers' "
                "AutoTokenizer and save_pretrained it there"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # The library raises bare Exception.
            raise ModelError(f"cannot read {file}: {error}; copy it again") from error
        config = read_tokenizer_config(folder)
        try:
            return cls(backend, config)
        except ModelError as error:
            raise ModelError(f"cannot use the tokenizer in {folder}: {error}") from error

    def special_ids_of(self, texts: Iterable[str]) -> frozenset[int]:
        """Ids of the special tokens that are spelled so."""
        ids = frozenset(map(self._backend.token_to_id, texts))
        return self.special_ids & ids

    def is_special(self, text: str) -> bool:
        """Whether this is a special token, which no text can spell."""
        return bool(self.special_ids_of((text,)))

    def to_json(self) -> str:
        """The tokenizer as a tokenizer.json, with what is special marked in it."""
        description: str = self._backend.to_str()
        return description

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; with BOS and EOS only if the model's tokenizer adds them.

        Special tokens that are spelled out in the text become their ids, as in transformers. Pass
        ``add_special_tokens=False`` for a rendered chat template, which brings its own.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD, ids without a token nothing.

        Raises `RequestError` for a number that cannot be a token id.
        """
        for token_id in token_ids:
            if not 0 <= token_id <= _MAX_TOKEN_ID:
                raise RequestError(f"{token_id} is no token id", param="tokens")
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text, often not whole characters; empty for unknown ids."""
        return self._token_bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, for logprobs: incomplete characters show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` of a model folder; empty if there is none. Raises `ModelError`."""
    file = folder / "tokenizer_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {file}: {error}; copy it again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} must hold a JSON object; copy it again")
    return config


def configured_token(value: Any) -> str | None:
    """A token of tokenizer_config.json: a string, or an object with ``content``; else None."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _mark_special(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named_tokens: Mapping[str, str]
) -> None:
    """Make special what tokenizer_config.json calls special. Adds no ids: the model has none."""
    texts = list(named_tokens.values())
    added = config.get("added_tokens_decoder")
    for token in added.values() if isinstance(added, Mapping) else ():
        text = configured_token(token)
        if text and isinstance(token, Mapping) and token.get("special"):
            texts.append(text)
    special = {
        token.content for token in backend.get_added_tokens_decoder().values() if token.special
    }
    for text in dict.fromkeys(texts):
        if text not in special and backend.token_to_id(text) is not None:
            backend.add_special_tokens([AddedToken(text, normalized=False, special=True)])
