"""From segment names to prompts: token ids, or words.

The content of a segment is cut from a stream that SHAKE-128 makes of (seed, name): the same on
every machine and Python, and the first part of a longer segment of the same name. Another seed
gives prompts that have nothing in common with those of the first, which is how to keep a server's
prefix cache from answering for an earlier run.

Words are for servers and routes that take only text. Each is short and common enough to be one
token (with the space before it) in the vocabularies that models have today, so a prompt of n words
has n tokens, give or take a beginning-of-text and what a chat template adds; the server's own count
is what gets reported.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from pdserve.workload.request import Segment

_TEXT = """
the of and to in is that for it as was with be by on not he his but at are this have from or had
an they which one you were her all she there would their we him been has when who will more no if
out so said what up its about into than them can only other new some could time these two may then
do first any my now such like our over man me even most made after also did many before must
through back years where much your way well down should because each just those people how too
little state good very make world still own see men work long get here between both life being
under never day same another know while last might us great old year off come since against go
came right used take three
"""
WORDS: tuple[str, ...] = tuple(_TEXT.split())
_FIRST_ORDINARY_TOKEN = 256
"""Vocabularies often begin with control tokens and single bytes."""


def token_ids(segments: Sequence[Segment], seed: int, vocab_size: int) -> list[int]:
    """Ids below ``vocab_size``; those of control tokens and bytes are left out if it is large."""
    low = _FIRST_ORDINARY_TOKEN if vocab_size >= 2 * _FIRST_ORDINARY_TOKEN else 0
    span = vocab_size - low
    ids: list[int] = []
    for segment in segments:
        ids.extend([low + number % span for number in _numbers(segment, seed)])
    return ids


def words(segments: Sequence[Segment], seed: int) -> str:
    """One word per token, with a space between two."""
    count = len(WORDS)
    numbers = (number for segment in segments for number in _numbers(segment, seed))
    return " ".join([WORDS[number % count] for number in numbers])


def _numbers(segment: Segment, seed: int) -> tuple[int, ...]:
    """``num_tokens`` numbers of 32 bits."""
    stream = hashlib.shake_128(f"{seed}/{segment.name}".encode())
    return struct.unpack(f"<{segment.num_tokens}I", stream.digest(4 * segment.num_tokens))
