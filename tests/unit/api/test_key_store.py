"""Keys that change while the server runs, and what a key may still ask for."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from pdserve.api.allowances import Allowance, duration
from pdserve.api.key_file import Rights
from pdserve.api.keys import LOOK_EVERY_S, KeyStore
from pdserve.core.errors import AuthError, ConfigError, RateLimitError, RequestError

ALICE = "sk-alice-0123456789"
BOB = "sk-bob-0123456789ab"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def write(file: Path, text: str, age_s: float = 0.0) -> None:
    """Replace the file whole, as an editor does; it was last written ``age_s`` ago."""
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.chmod(0o600)
    if age_s:
        then = fresh.stat().st_mtime - age_s
        os.utime(fresh, (then, then))
    fresh.replace(file)


def is_taken(store: KeyStore, key: str) -> bool:
    try:
        store.caller(key.encode())
    except AuthError:
        return False
    return True


def test_the_own_key_the_keys_of_classes_and_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    write(file, f"alice {ALICE} class=batch\n")
    store = KeyStore("own", {"bound": "batch"}, file, ("default", "batch"))
    own, bound, alice = (store.caller(key) for key in (b"own", b"bound", ALICE.encode()))
    assert (own.rights, own.class_name) == (Rights.OPERATE, None)
    assert (bound.rights, bound.class_name) == (Rights.GENERATE, "batch")
    assert (alice.rights, alice.class_name, alice.tenant) == (Rights.GENERATE, "batch", "alice")
    assert not is_taken(store, "somebody")
    assert not is_taken(store, "")
    assert ALICE not in repr(alice)
    assert bool(store)
    assert not KeyStore(None, {})


def test_a_changed_file_is_read_again_within_a_second(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "keys"
    write(file, f"alice {ALICE}\n", age_s=60)
    store = KeyStore(None, {}, file, clock=clock)
    write(file, f"bob {BOB}\n", age_s=30)
    clock.now += LOOK_EVERY_S / 2
    assert is_taken(store, ALICE)  # it has not looked yet
    clock.now += LOOK_EVERY_S
    assert not is_taken(store, ALICE)
    assert is_taken(store, BOB)


def test_a_file_written_twice_within_one_tick_of_its_clock(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice {ALICE}\n")
    file.chmod(0o600)
    store = KeyStore(None, {}, file, clock=clock)
    found = file.stat()
    with file.open("r+") as opened:  # the same file, of the same size, with the same time
        opened.write(f"carol {ALICE}\n")
    os.utime(file, ns=(found.st_mtime_ns, found.st_mtime_ns))
    clock.now += LOOK_EVERY_S
    assert store.caller(ALICE.encode()).tenant == "carol"


def test_a_broken_file_changes_nothing_and_is_told_once(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    write(file, f"alice {ALICE}\n", age_s=60)
    store = KeyStore(None, {}, file, clock=clock)
    with caplog.at_level(logging.INFO, "pdserve"):
        for text in (f"alice {ALICE}\nbob\n", ""):
            write(file, text)
            for _ in range(3):
                clock.now += LOOK_EVERY_S
                assert is_taken(store, ALICE)
        file.unlink()
        clock.now += LOOK_EVERY_S
        assert is_taken(store, ALICE)
        write(file, f"alice {ALICE}\nbob {BOB}\n")
        clock.now += LOOK_EVERY_S
        assert is_taken(store, BOB)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4, told
    assert all("the API keys stay as they were" in line for line in told[:3])
    assert "line 2" in told[0]
    assert "holds no key" in told[1]
    assert "cannot read" in told[2]
    assert told[3] == f"API keys read again from {file}: 2 names"
    assert ALICE not in caplog.text


def test_a_signal_has_the_file_read_at_once(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "keys"
    write(file, f"alice {ALICE}\n", age_s=60)
    store = KeyStore(None, {}, file, clock=clock)
    write(file, f"bob {BOB}\n", age_s=60)
    store.reload()
    assert is_taken(store, BOB)


def test_new_limits_do_not_forget_what_was_used(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "keys"
    write(file, f"alice {ALICE} requests_per_minute=2 concurrent_tokens=100\n", age_s=60)
    store = KeyStore(None, {}, file, clock=clock)
    used = store.caller(ALICE.encode()).allowance
    assert used is not None
    used.take_request(clock.now)
    used.take_request(clock.now)
    used.reserve(70)
    write(file, f"alice {ALICE} requests_per_minute=4 concurrent_tokens=60\n")
    clock.now += LOOK_EVERY_S
    again = store.caller(ALICE.encode()).allowance
    assert again is used
    with pytest.raises(RateLimitError):
        again.take_request(clock.now)
    with pytest.raises(RateLimitError):
        again.reserve(1)
    assert store.tokens_in_flight() == [("alice", 70)]
    again.release(70)
    again.reserve(60)


@pytest.mark.parametrize(("mode", "text", "warns"), [
    (0o604, f"alice {ALICE}\n", True),
    (0o600, f"alice {ALICE}\n", False),
    (0o604, f"alice sha256:{'ab' * 32}\n", False),
])  # fmt: skip
def test_keys_that_all_can_read_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, text: str, warns: bool
) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    file.chmod(mode)
    KeyStore(None, {}, file)
    assert ("chmod 600" in caplog.text) is warns


def test_a_file_that_is_not_there_is_told_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        KeyStore(None, {}, tmp_path / "nowhere")


def test_requests_come_back_evenly() -> None:
    allowance = Allowance("alice")
    allowance.limit(60, None, 0.0)
    for _ in range(60):
        allowance.take_request(0.0)
    with pytest.raises(RateLimitError) as caught:
        allowance.take_request(0.25)
    assert caught.value.retry_after_s == pytest.approx(0.75)
    assert caught.value.limit == "requests"
    allowance.take_request(1.0)
    with pytest.raises(RateLimitError):
        allowance.take_request(1.5)
    assert dict(allowance.headers(31.0)) == {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-remaining-requests": b"30",
        b"x-ratelimit-reset-requests": b"30s",
    }
    assert dict(allowance.headers(1e6))[b"x-ratelimit-remaining-requests"] == b"60"


def test_tokens_are_those_in_flight() -> None:
    allowance = Allowance("alice")
    allowance.limit(None, 100, 0.0)
    allowance.reserve(60)
    with pytest.raises(RateLimitError) as caught:
        allowance.reserve(41)
    assert caught.value.limit == "tokens"
    allowance.reserve(40)
    assert dict(allowance.headers(0.0)) == {
        b"x-ratelimit-limit-tokens": b"100",
        b"x-ratelimit-remaining-tokens": b"0",
    }
    allowance.release(60)
    with pytest.raises(RequestError, match="max_tokens"):  # no waiting makes room for it
        allowance.reserve(101)


def test_without_limits_tokens_are_counted_all_the_same() -> None:
    allowance = Allowance("alice")
    allowance.reserve(10**9)
    allowance.take_request(0.0)
    assert allowance.tokens_in_flight == 10**9
    assert allowance.headers(0.0) == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0ms"), (0.12, "120ms"), (1.0, "1s"), (6.01, "7s"), (360, "6m0s")]
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
