"""Tokens of a prompt: numbers, or content that is only named.

A server has the ids of a prompt's tokens. A simulator has no text: it knows that two prompts begin
alike and how long they are, and moving twelve thousand made-up numbers through router and workers
for each request would be most of its work. `NamedTokens` stands in for them. It is a row of
pieces, each the first tokens of a content that has a name; prompts whose rows begin alike begin
with the same tokens. Lengths, slices, concatenation and block hashes are all that the machines ask
of a prompt, and those it gives at a cost that grows with its pieces, not with its tokens.

Named tokens never leave their process: there is no encoding for them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple, Self, overload

_NAMED = b"pdserve-named"
_TAG = blake2b(_NAMED, digest_size=16).digest()
_PLACE = struct.Struct("<QQI")


class Piece(NamedTuple):
    """Tokens ``start`` to ``start + length`` of a content: of the one of this name, or of the very
    numbers (then from 0 on, and all of them)."""

    content: str | tuple[int, ...]
    start: int
    length: int

    def cut(self, first: int, length: int) -> Piece:
        """So many tokens of the piece, from its ``first`` on."""
        if isinstance(self.content, tuple):
            return _literal(self.content[first : first + length])
        return Piece(self.content, self.start + first, length)

    def packed(self) -> bytes:
        """See `NamedTokens.packed`. A name stands behind 16 bytes that no numbers are likely to be,
        and with its length."""
        content, start, length = self
        if isinstance(content, tuple):
            return packed(content)
        return packed_name(content, start, length)


class NamedTokens(Sequence[int]):
    """Immutable. Two are equal if they are the same tokens, however they were put together.

    As numbers (which only somebody asks for who needs numbers) tokens are what a hash of name and
    place says: the same wherever the same content is.
    """

    __slots__ = ("_length", "chains", "pieces")

    def __init__(self, pieces: tuple[Piece, ...]) -> None:
        """``pieces`` as `_joined` leaves them; others call `of`."""
        self.pieces = pieces
        self._length = sum([length for _, _, length in pieces])
        self.chains: dict[tuple[bytes, int], object] = {}
        """Block hashes by root and block size: made, and kept here, by ``kv.hashing``."""

    @classmethod
    def of(cls, pieces: Iterable[tuple[str, int]]) -> Self:
        """The first ``number`` tokens of each (name, number), one after the other."""
        # None goes on where the one before it ends, so there is nothing to join.
        make = tuple.__new__  # a named tuple's own takes twice as long
        return cls(tuple([make(Piece, (name, 0, number)) for name, number in pieces if number]))

    def __len__(self) -> int:
        return self._length

    def __bool__(self) -> bool:
        return self._length > 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NamedTokens):
            return NotImplemented
        return self.pieces == other.pieces

    def __hash__(self) -> int:
        return hash(self.pieces)

    def __repr__(self) -> str:
        shown = ", ".join(f"{content}[{start}:+{length}]" for content, start, length in self.pieces)
        return f"NamedTokens({shown})"

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> int | Self:
        if isinstance(index, slice):
            first, end, step = index.indices(self._length)
            assert step == 1, "named tokens are cut into runs"
            return self if end - first == self._length else type(self)(self._cut(first, end))
        if index < 0:
            index += self._length
        cut = self._cut(index, index + 1)
        if index < 0 or not cut:
            raise IndexError(index)
        return next(_numbers(cut[0]))

    def __iter__(self) -> Iterator[int]:
        for piece in self.pieces:
            yield from _numbers(piece)

    def __add__(self, other: tuple[int, ...] | NamedTokens) -> Self:
        """Followed by other tokens, named or not."""
        if not other:
            return self
        added = other.pieces if isinstance(other, NamedTokens) else (_literal(other),)
        return type(self)(_joined([*self.pieces, *added]))

    def packed(self) -> bytes:
        """Bytes that are the same for the same tokens and, as far as a hash goes, for no others.
        Tokens that are all given as numbers pack as numbers do."""
        return b"".join([piece.packed() for piece in self.pieces])

    def _cut(self, first: int, end: int) -> tuple[Piece, ...]:
        found = []
        for piece in self.pieces:
            if end <= 0:
                break
            if first < piece.length and end > first:
                skipped = max(0, first)
                found.append(piece.cut(skipped, min(end, piece.length) - skipped))
            first -= piece.length
            end -= piece.length
        return tuple(found)


if TYPE_CHECKING:
    TokenIds = tuple[int, ...] | NamedTokens
else:
    # What decodes messages reads this alias. Only numbers travel, so it shall look for no others.
    TokenIds = tuple[int, ...]


def packed(token_ids: Sequence[int]) -> bytes:
    """Numbers as little-endian u32; for named tokens see `NamedTokens.packed`. An id outside of u32
    is a bug of the caller and raises `struct.error`."""
    if isinstance(token_ids, NamedTokens):
        return token_ids.packed()
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def packed_name(name: str, start: int, length: int) -> bytes:
    """`Piece.packed` of one that is named."""
    encoded = name.encode("utf-8", "surrogatepass")
    return _TAG + _PLACE.pack(start, length, len(encoded)) + encoded


def _literal(numbers: tuple[int, ...]) -> Piece:
    return Piece(numbers, 0, len(numbers))


def _joined(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """The one row of pieces that stands for these tokens: what continues is one piece, and nothing
    is empty."""
    found: list[Piece] = []
    for piece in pieces:
        content, start, length = piece
        if not length:
            continue
        if found:
            before = found[-1]
            if isinstance(content, tuple):
                if isinstance(before.content, tuple):
                    found[-1] = _literal(before.content + content)
                    continue
            elif before.content == content and before.start + before.length == start:
                found[-1] = Piece(content, before.start, before.length + length)
                continue
        found.append(piece)
    return tuple(found)


def _numbers(piece: Piece) -> Iterator[int]:
    content, start, length = piece
    if isinstance(content, tuple):
        yield from content
        return
    name = content.encode("utf-8", "surrogatepass")
    for place in range(start, start + length):
        made = blake2b(place.to_bytes(8, "little") + name, digest_size=4, person=_NAMED)
        yield int.from_bytes(made.digest(), "little")
