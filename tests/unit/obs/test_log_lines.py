"""Log lines: one line an event, readable by people or by machines, not to be forged."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from pdserve.core.errors import ConfigError
from pdserve.obs.life import LifeLog
from pdserve.obs.logs import LOGGER_NAME, log_life_event, setup, teardown

CLOCK = r"\d\d:\d\d:\d\d\.\d\d\d"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    teardown()


def lines(format: str, level: str = "info") -> io.StringIO:  # noqa: A002
    stream = io.StringIO()
    setup(format, level, stream)
    return stream


def test_a_life_in_text(split_life) -> None:
    stream = lines("text")
    log = LifeLog()
    log.subscribe(log_life_event)
    for moment in split_life:
        log.append(moment)
    written = stream.getvalue().splitlines()
    assert len(written) == len(split_life)
    assert all(re.match(CLOCK + " ", line) for line in written)
    assert re.sub(CLOCK, "T", written[-1]) == (
        "T finished req-1#1 gateway choices=1 output_tokens=11 reason=length"
    )
    assert re.sub(CLOCK, "T", written[1]) == (
        'T routed req-1#1 gateway decode=d0 local=false prefill=p0 reason="fewest tokens"'
    )


def test_a_life_in_json(resumed_life) -> None:
    stream = lines("json")
    for moment in resumed_life:
        log_life_event(moment)
    documents = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [document["event"] for document in documents] == [e.name for e in resumed_life]
    resumed = documents[10]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", resumed.pop("time"))
    assert resumed == {
        "level": "info",
        "logger": "pdserve",
        "event": "resumed",
        "request_id": "req-1",
        "epoch": 2,
        "node": "gateway",
        "at_s": 1.0,
        "detail": {"reason": "worker_lost", "taken_tokens": 5},
    }


def test_other_handlers_can_format_a_life_event(event) -> None:
    """It is a log record with everything that formatters name."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        logging.Formatter("%(levelname)s %(name)s %(filename)s:%(lineno)d %(process)d %(message)s")
    )
    logger = logging.getLogger(LOGGER_NAME)
    logger.addHandler(handler)
    try:
        log_life_event(event("failed", 0.0, kind="overloaded"))
    finally:
        logger.removeHandler(handler)
    assert re.fullmatch(
        r"WARNING pdserve \S+:\d+ \d+ failed \S+#1 gateway kind=overloaded\n", stream.getvalue()
    )


def test_only_failures_pass_at_warning(split_life, failed_life) -> None:
    stream = lines("text", "WARNING")
    for moment in (*split_life, *failed_life):
        log_life_event(moment)
    (line,) = stream.getvalue().splitlines()
    assert line.endswith('warning failed req-1#1 gateway detail="no room" kind=overloaded')


@pytest.mark.parametrize("format", ["text", "json"])
@pytest.mark.parametrize("text", ["a\nb", "a\r\x1b[2Jb", "a\u2028b", 'a "b" \\', "a=b", "", "\x85"])
def test_what_a_client_sends_stays_on_its_line(event, format: str, text: str) -> None:  # noqa: A002
    stream = lines(format)
    log_life_event(event("failed", 0.0, request=text or "r", kind=text))
    logging.getLogger(f"{LOGGER_NAME}.api").info("path %s", text)
    written = stream.getvalue()
    assert len(written.splitlines()) == 2
    assert "\x1b" not in written
    if format == "json":
        life, plain = map(json.loads, written.splitlines())
        assert (life["detail"]["kind"], plain["message"]) == (text, f"path {text}")


def test_other_lines_name_their_level_from_warning_on() -> None:
    stream = lines("text")
    logger = logging.getLogger(f"{LOGGER_NAME}.serve")
    logger.info("listening on %s", "127.0.0.1:8000")
    logger.warning("worker d0 is lost")
    logger.debug("unseen")
    assert re.sub(CLOCK, "T", stream.getvalue()) == (
        "T listening on 127.0.0.1:8000\nT warning worker d0 is lost\n"
    )


@pytest.mark.parametrize("format", ["text", "json"])
def test_tracebacks_are_kept(format: str) -> None:  # noqa: A002
    stream = lines(format)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger(LOGGER_NAME).exception("step failed")
    written = stream.getvalue()
    if format == "json":
        assert "ValueError: broken" in json.loads(written)["exception"]
    else:
        assert "error step failed\nTraceback" in written
        assert written.endswith("ValueError: broken\n")


def test_a_second_set_up_replaces_the_first() -> None:
    first, second = lines("text"), lines("json")
    logging.getLogger(LOGGER_NAME).info("once")
    assert first.getvalue() == ""
    assert json.loads(second.getvalue())["message"] == "once"


def test_tear_down_leaves_the_logger_as_it_was() -> None:
    logger = logging.getLogger(LOGGER_NAME)
    before = (list(logger.handlers), logger.level, logger.propagate)
    lines("text")
    assert (logger.handlers, logger.level, logger.propagate) != before
    teardown()
    assert (logger.handlers, logger.level, logger.propagate) == before


@pytest.mark.parametrize(("format", "level"), [("xml", "info"), ("text", "loud")])
def test_settings_that_cannot_work_are_refused(format: str, level: str) -> None:  # noqa: A002
    with pytest.raises(ConfigError, match="use one of"):
        setup(format, level)
