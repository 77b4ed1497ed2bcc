"""Log lines: one line an event, for people (``text``) or for machines (``json``), on stderr.

`setup` is called once by each process, before anything is logged. `log_life_event` is a listener of
the `LifeLog`; at the gateway it turns every life event into a line such as::

    12:00:01.123 finished req-1#1 gateway reason=stop

Everything else is logged with the standard library's ``logging`` below the logger ``pdserve``. A
line's time is the wall clock of the process that writes it (local time in text, UTC in JSON); the
monotonic time of a life event is in the JSON line as ``at_s``. Values that hold spaces, quotes or
line breaks are quoted, so what a client sends cannot forge a line. Only a traceback takes more than
one line, and only in text.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from functools import lru_cache
from typing import Any, TextIO

import msgspec

from pdserve.core.errors import ConfigError
from pdserve.core.events import LifeEvent, LifeName, Scalar

LOGGER_NAME = "pdserve"
FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error", "critical")
_HANDLER_NAME = "pdserve-lines"
_LOGGER = logging.getLogger(LOGGER_NAME)
_PLAIN = re.compile(r"[^\s\"\\=\x00-\x1f\x80-\x9f\u2028\u2029]+")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x80-\x9f\u2028\u2029]")


def setup(format: str = "text", level: str = "info", stream: TextIO | None = None) -> None:  # noqa: A002
    """Send everything below the logger ``pdserve`` to ``stream`` (stderr), one line an event.

    A later call replaces an earlier one. Raises `ConfigError` for an unknown format or level.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown log format {format!r}: use one of {', '.join(FORMATS)}")
    if level.lower() not in LEVELS:
        raise ConfigError(f"unknown log level {level!r}: use one of {', '.join(LEVELS)}")
    handler = _Lines(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonLines() if format == "json" else TextLines())
    logger = logging.getLogger(LOGGER_NAME)
    teardown()
    handler.set_name(_HANDLER_NAME)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False


def teardown() -> None:
    """Undo `setup`."""
    logger = logging.getLogger(LOGGER_NAME)
    for handler in [handler for handler in logger.handlers if handler.name == _HANDLER_NAME]:
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


def log_life_event(event: LifeEvent) -> None:
    """Log a life event: a failure as warning, everything else as info."""
    level = logging.WARNING if event.name is LifeName.FAILED else logging.INFO
    if _LOGGER.isEnabledFor(level):
        _LOGGER.handle(_LifeRecord(event, level))


class _LifeRecord(logging.LogRecord):
    """A life event on its way to the handlers: there are a dozen for each request, so what is the
    same for all of them (the caller, the thread, the process) is looked up once."""

    _shared = vars(logging.LogRecord(LOGGER_NAME, logging.INFO, __file__, 0, "", None, None))

    def __init__(self, event: LifeEvent, level: int) -> None:
        self.__dict__.update(self._shared)
        self.life_event = event
        self.levelno = level
        self.levelname = logging.getLevelName(level)
        self.created = now_s = time.time()
        self.msecs = float(int(now_s % 1.0 * 1e3))

    def getMessage(self) -> str:  # noqa: N802
        return _life_text(self.life_event)


class _Lines(logging.StreamHandler[TextIO]):
    """Writes a line and its end at once, under one lock."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.stream.write(self.format(record) + "\n")
            self.stream.flush()
        except RecursionError:  # as the base has it
            raise
        except Exception:
            self.handleError(record)


class TextLines(logging.Formatter):
    """``time message``, with the level in between from warning on."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{_local_clock(int(record.created))}.{int(record.msecs):03d}"
        level = f" {record.levelname.lower()}" if record.levelno >= logging.WARNING else ""
        line = f"{head}{level} {_one_line(record.getMessage())}"
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line


class JsonLines(logging.Formatter):
    """One JSON object a line; a life event has ``request_id``, ``epoch``, ``node``, ``detail``."""

    def format(self, record: logging.LogRecord) -> str:
        document = _head(record.created, record.levelname.lower(), record.name)
        event: LifeEvent | None = getattr(record, "life_event", None)
        document |= {"message": record.getMessage()} if event is None else _life_fields(event)
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return _encoded(document)


def life_line(event: LifeEvent, written_s: float) -> str:
    """The JSON line of a life event that is written at this wall clock time (Unix seconds)."""
    level = "warning" if event.name is LifeName.FAILED else "info"
    return _encoded(_head(written_s, level, LOGGER_NAME) | _life_fields(event))


def _head(written_s: float, level: str, logger: str) -> dict[str, Any]:
    second = int(written_s)
    return {
        "time": f"{_utc(second)}.{int((written_s - second) * 1e3):03d}Z",
        "level": level,
        "logger": logger,
    }


def _life_fields(event: LifeEvent) -> dict[str, Any]:
    return {
        "event": event.name,
        "request_id": event.request_id,
        "epoch": event.epoch,
        "node": event.node,
        "at_s": event.at_s,
        "detail": dict(event.detail),
    }


def _encoded(document: dict[str, Any]) -> str:
    line = msgspec.json.encode(document)
    # What is not ASCII may hold Unicode's line ends: escape all of it.
    return line.decode() if line.isascii() else json.dumps(document)


@lru_cache(maxsize=1)
def _local_clock(second: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(second))


@lru_cache(maxsize=1)
def _utc(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _life_text(event: LifeEvent) -> str:
    parts = [event.name, f"{_quoted(event.request_id)}#{event.epoch}", _quoted(event.node)]
    parts += [f"{key}={_quoted(value)}" for key, value in event.detail]
    return " ".join(parts)


def _quoted(value: Scalar) -> str:
    """The value, as a JSON string if it would not stay one word."""
    if isinstance(value, bool):
        return str(value).lower()
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _one_line(message: str) -> str:
    return _UNPRINTABLE.sub(lambda match: json.dumps(match.group())[1:-1], message)
