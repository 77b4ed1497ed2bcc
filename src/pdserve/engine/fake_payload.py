"""What the fake foreign engine computes, and the bytes in which it hands that over.

Its "KV" is one state of 8 bytes for each token: a hash of the state before it and of the token's
id. A token is drawn from the last state, so it depends on every token before it and on nothing
else, and whoever continues from wrong states says something else from there on.

A payload is, with big-endian integers::

    4 bytes magic | u16 version | u16 reserved, 0 | u32 number of tokens
    16 bytes name of the weights | 16 bytes name of the tokens
    8 bytes state of each token
    16 bytes checksum of all before it
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from pdserve.core.errors import PayloadError
from pdserve.core.request import SamplingParams
from pdserve.core.step import SampledToken, TokenLogprobs

PAYLOAD_FORMAT = "fake-foreign/1"
STATE_BYTES = 8

_MAGIC = b"PDFF"
_VERSION = 1
_HEAD = struct.Struct(">4sHHI16s16s")
_CHECKSUM_BYTES = 16


def root_state(weights_digest: str) -> bytes:
    """The state before the first token."""
    return blake2b(weights_digest.encode(), digest_size=STATE_BYTES).digest()


def next_state(state: bytes, token_id: int) -> bytes:
    """The state after one more token."""
    return blake2b(state + struct.pack(">q", token_id), digest_size=STATE_BYTES).digest()


def draw(
    state: bytes, params: SamplingParams, choice: int, index: int, vocab_size: int
) -> SampledToken:
    """Output token ``index`` of a choice, a function of (tokens so far, seed, choice, index).

    A token that would end the choice before ``min_tokens`` is passed over for the next one.
    """
    name = state + f"{params.seed}/{choice}/{index}".encode()
    token_id = int.from_bytes(blake2b(name, digest_size=8).digest()) % vocab_size
    if index < params.min_tokens:
        for _ in range(vocab_size):
            if token_id not in params.ending_token_ids:
                break
            token_id = (token_id + 1) % vocab_size
    if params.logprobs is None:
        return SampledToken(token_id)
    top = tuple(((token_id + i) % vocab_size, -1.0 - i) for i in range(params.logprobs))
    return SampledToken(token_id, TokenLogprobs(logprob=-1.0, rank=1, top=top))


def pack_payload(weights_digest: str, token_ids: Sequence[int], states: Iterable[bytes]) -> bytes:
    """The payload of these tokens and their states, one for each."""
    head = _HEAD.pack(
        _MAGIC, _VERSION, 0, len(token_ids), _name(weights_digest), _name_of_tokens(token_ids)
    )
    body = head + b"".join(states)
    return body + _checksum(body)


def unpack_payload(payload: bytes, weights_digest: str, token_ids: Sequence[int]) -> list[bytes]:
    """The states of ``token_ids``. Raises `PayloadError`, which says what is wrong."""
    if len(payload) < _HEAD.size + _CHECKSUM_BYTES:
        raise PayloadError(f"a payload of {len(payload)} bytes is too short to be one")
    magic, version, _, num_tokens, weights, tokens = _HEAD.unpack_from(payload)
    if magic != _MAGIC:
        raise PayloadError(f"no payload of format {PAYLOAD_FORMAT}: it begins with {magic!r}")
    if version != _VERSION:
        raise PayloadError(f"payload version {version} is not {_VERSION}")
    body, checksum = payload[:-_CHECKSUM_BYTES], payload[-_CHECKSUM_BYTES:]
    if _checksum(body) != checksum:
        raise PayloadError("the payload is damaged: its checksum does not match")
    if weights != _name(weights_digest):
        raise PayloadError("the payload was computed with other weights")
    if tokens != _name_of_tokens(token_ids) or num_tokens != len(token_ids):
        raise PayloadError("the payload is of other tokens")
    states = body[_HEAD.size :]
    if len(states) != num_tokens * STATE_BYTES:
        raise PayloadError(f"{len(states)} bytes of states do not fit {num_tokens} tokens")
    return [states[at : at + STATE_BYTES] for at in range(0, len(states), STATE_BYTES)]


def _name(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _name_of_tokens(token_ids: Sequence[int]) -> bytes:
    return blake2b(struct.pack(f">{len(token_ids)}q", *token_ids), digest_size=16).digest()


def _checksum(body: bytes) -> bytes:
    return blake2b(body, digest_size=_CHECKSUM_BYTES).digest()
