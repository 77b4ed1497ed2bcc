"""The process in which a constraint is tried before a request with it is accepted.

It reads the tokenizer once and then constraints, each a length-prefixed message of msgpack on
standard input, and answers each with what is wrong with it. Every constraint has a budget of CPU
time: when that is spent the kernel ends the process, and whoever asked starts another. The same
for memory. It ends when its standard input does, and dies with its parent's pipe.
"""

from __future__ import annotations

import resource
import signal
import struct
import sys
from typing import IO

import msgspec
import tokenizers
from llguidance import LLMatcher

from pdserve.core.errors import PdserveError
from pdserve.core.request import Constraint
from pdserve.text.structured.grammar import grammar_of
from pdserve.text.structured.masks import what_went_wrong
from pdserve.text.structured.vocabulary import make_vocabulary
from pdserve.text.tokenizer import Tokenizer

LENGTH = struct.Struct(">I")
MEMORY_BYTES = 4 << 30


class Vocabulary(msgspec.Struct):
    """The first message. ``tokenizer``: as `Tokenizer.to_json`; ``cpu_s``: the budget of each."""

    tokenizer: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    cpu_s: float


class Verdict(msgspec.Struct):
    """An answer. ``error``: why the constraint cannot be used, or None."""

    error: str | None


def read_message(stream: IO[bytes]) -> bytes | None:
    """The next message; None at the end, also in its middle."""
    prefix = stream.read(LENGTH.size)
    if len(prefix) < LENGTH.size:
        return None
    num_bytes: int = LENGTH.unpack(prefix)[0]
    body = stream.read(num_bytes)
    return body if len(body) == num_bytes else None


def framed(body: bytes) -> bytes:
    """A message with its length."""
    return LENGTH.pack(len(body)) + body


def main() -> int:
    """Answer until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    first = read_message(sys.stdin.buffer)
    if first is None:
        return 0
    vocabulary = msgspec.msgpack.decode(first, type=Vocabulary)
    # Its own tokenizer.json says all: the special tokens are marked in it.
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(vocabulary.tokenizer), {})
    words = make_vocabulary(tokenizer, vocabulary.vocab_size, vocabulary.eos_token_ids)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (body := read_message(sys.stdin.buffer)) is not None:
        constraint = msgspec.msgpack.decode(body, type=Constraint)
        signal.setitimer(signal.ITIMER_PROF, vocabulary.cpu_s)  # SIGPROF ends the process
        try:
            matcher = LLMatcher(words, grammar_of(constraint), log_level=0)
            if not matcher.is_error():
                matcher.compute_bitmask()
            error = what_went_wrong(matcher.get_error()) if matcher.is_error() else None
        except PdserveError as refused:
            error = what_went_wrong(str(refused))
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        sys.stdout.buffer.write(framed(msgspec.msgpack.encode(Verdict(error))))
        sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
