"""``--record``: everything that a machine heard and said, in one file per machine process.

A recording is a series of records, appended with one write each, so that after a ``kill -9`` it is
complete up to the last whole record::

    u32 length | u32 CRC-32 of the rest | u8 tag | content

    tag H  first record: JSON of what the machine was told at its birth (`Birth`)
    tag I  one input: f64 ``now``, then the record of ``transport.records``
    tag E  its effects: each one u32 length and record

Integers and floats are big-endian. An input is written before the machine sees it: if the machine
breaks on it, it is the last one in the file. `read` gives the records back and stops at the first
one that is not whole.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pdserve.core.effects import Effect, Input
from pdserve.core.errors import ConfigError, why
from pdserve.core.ids import GATEWAY
from pdserve.node.settings import RouterSettings, WorkerSettings
from pdserve.transport.records import decode_record, encode_record

log = logging.getLogger(__name__)

SUFFIX = ".rec"
FORMAT = 1
_PREFIX = struct.Struct(">II")
_NOW = struct.Struct(">d")
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """What a replay needs to make the machine again. One of the two settings is given; the policy
    is written as `policy.registry` takes it, and empty if the worker's engine batches for itself.
    """

    format: int
    node: str
    policy: str
    worker: WorkerSettings | None = None
    router: RouterSettings | None = None


@dataclass(frozen=True, slots=True)
class Heard:
    """One input and, unless the process ended over it, the records of its effects."""

    event: Input
    now: float
    effects: tuple[bytes, ...] | None


class FileRecorder:
    """Writes the recording of one machine. Implements ``driver.Recorder``."""

    def __init__(self, path: Path, birth: Birth) -> None:
        """Raises `ConfigError` if the file cannot be made, or is there already."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot record to {path}: {error}; give an empty folder") from error
        self._write(b"H", msgspec.json.encode(birth))

    def write_input(self, event: Input, now: float) -> None:
        self._write(b"I", _NOW.pack(now) + encode_record(event))

    def write_effects(self, effects: list[Effect]) -> None:
        self._write(b"E", join_records([encode_record(effect) for effect in effects]))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, tag: bytes, content: bytes) -> None:
        if self._file < 0:
            return
        record = tag + content
        framed = _PREFIX.pack(len(record), zlib.crc32(record)) + record
        try:
            written = os.write(self._file, framed)
        except OSError as error:
            written, reason = 0, str(error)
        else:
            reason = "the disk is full"
        if written < len(framed):  # serving goes on; what is in the file stays readable
            log.error("recording stops: %s", reason)
            self.close()


def recorder_of(
    folder: str | None,
    policy: str,
    *,
    worker: WorkerSettings | None = None,
    router: RouterSettings | None = None,
) -> FileRecorder | None:
    """A recorder for the machine with these settings; None if ``folder`` is None."""
    if folder is None:
        return None
    node = GATEWAY if worker is None else worker.worker
    name = f"router{SUFFIX}" if worker is None else f"{worker.worker}.{worker.epoch}{SUFFIX}"
    birth = Birth(format=FORMAT, node=node, policy=policy, worker=worker, router=router)
    return FileRecorder(Path(folder) / name, birth)


def join_records(records: Sequence[bytes]) -> bytes:
    """Records one after the other, each with its length."""
    return b"".join(_LENGTH.pack(len(record)) + record for record in records)


def _split_records(content: bytes) -> tuple[bytes, ...]:
    records, start = [], 0
    while start < len(content):
        (length,) = _LENGTH.unpack_from(content, start)
        start += _LENGTH.size + length
        records.append(content[start - length : start])
    return tuple(records)


def read(path: Path) -> tuple[Birth, Iterator[Heard]]:
    """Open a recording. Raises `ConfigError` if it is none, or of another format."""
    records = _whole_records(path)
    first = next(records, b"")
    try:
        if first[:1] != b"H":
            raise ValueError("it does not begin with a header")
        birth = msgspec.json.decode(first[1:], type=Birth)
        if birth.format != FORMAT:
            raise ValueError(f"its format is {birth.format} and this build reads {FORMAT}")
    except (ValueError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path} is no recording that can be replayed: {error}") from error
    return birth, _inputs(records)


def _inputs(records: Iterator[bytes]) -> Iterator[Heard]:
    pending: bytes | None = None
    for record in records:
        tag, content = record[:1], record[1:]
        if tag == b"E" and pending is not None:
            yield _heard(pending, _split_records(content))
            pending = None
        elif tag == b"I":
            if pending is not None:
                yield _heard(pending, None)
            pending = content
    if pending is not None:
        yield _heard(pending, None)


def _heard(content: bytes, effects: tuple[bytes, ...] | None) -> Heard:
    (now,) = _NOW.unpack_from(content)
    event = decode_record(content[_NOW.size :])
    return Heard(event, now, effects)  # type: ignore[arg-type]


def _whole_records(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while len(prefix := file.read(_PREFIX.size)) == _PREFIX.size:
                length, checksum = _PREFIX.unpack(prefix)
                record = file.read(length)
                if len(record) != length or zlib.crc32(record) != checksum:
                    return
                yield record
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {why(error)}") from error
