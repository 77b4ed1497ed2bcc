"""The key file, as lines and as TOML: what is taken, and how a mistake is told."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pdserve.api.key_file import KeyEntry, Rights, digest_of, parse_key_file
from pdserve.core.errors import ConfigError

KEY = "sk-0123456789abcdef"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
CLASSES = ("default", "batch")


def lines(text: str) -> tuple[KeyEntry, ...]:
    return parse_key_file(Path("keys.txt"), text.encode(), CLASSES)


def toml(text: str) -> tuple[KeyEntry, ...]:
    return parse_key_file(Path("keys.toml"), text.encode(), CLASSES)


def test_both_forms_say_the_same() -> None:
    from_lines = lines(
        "# who may\n\n"
        f"alice {KEY}  # plain\n"
        f"bob sha256:{'ab' * 32} requests_per_minute=60 concurrent_tokens=20000 class=batch\n"
        f"prom sha256:{'CD' * 32} rights=watch\n"
    )
    from_toml = toml(
        f"[keys.alice]\nkey = '{KEY}'\n"
        f"[keys.bob]\nkey = 'sha256:{'ab' * 32}'\nrequests_per_minute = 60\n"
        "concurrent_tokens = 20000\nclass = 'batch'\n"
        f"[keys.prom]\nkey = 'sha256:{'cd' * 32}'\nrights = 'watch'\n"
    )
    assert from_lines == from_toml
    alice, bob, prom = from_lines
    assert alice == KeyEntry(name="alice", digests=(digest_of(KEY.encode()),), is_plain=True)
    assert (bob.requests_per_minute, bob.concurrent_tokens, bob.class_name) == (60, 20000, "batch")
    assert not bob.is_plain
    assert (prom.rights, prom.digests) == (Rights.WATCH, (bytes.fromhex("cd" * 32),))


def test_a_name_can_have_an_old_key_and_a_new_one() -> None:
    [entry] = toml(f"[keys.carol]\nkey = ['{KEY}', 'sha256:{'ab' * 32}']\n")
    assert entry.digests == (digest_of(KEY.encode()), bytes.fromhex("ab" * 32))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "keys.txt holds no key"),
        ("# nobody\n", "keys.txt holds no key"),
        (f"\nalice {KEY}\nbob\n", "keys.txt, line 3: a line has a name, then a key"),
        (f"al/ice {KEY}\n", "line 1: a name has"),
        ("alice short-key\n", "line 1: a key has at least 16 characters"),
        ("alice sk-0123456789abcdéf\n", "line 1: a key has printable ASCII characters only"),
        ("alice sha256:abc\n", "line 1: after sha256: come 64 hexadecimal digits"),
        (f"alice {KEY} more-of-the-key\n", "line 1: after the key come FIELD=VALUE"),
        (f"alice {KEY} rights=watch rights=watch\n", "line 1: after the key come FIELD=VALUE"),
        (f"alice {KEY} rpm=5\n", "line 1: unknown: rpm; it may have key, requests_per_minute"),
        (f"alice {KEY} requests_per_minute=0\n", "requests_per_minute must be a number of 1"),
        (f"alice {KEY} concurrent_tokens=many\n", "concurrent_tokens must be a number of 1"),
        (f"alice {KEY} concurrent_tokens=nan\n", "concurrent_tokens must be a number of 1"),
        (f"alice {KEY} class=gold\n", "class is 'gold'; the classes here are: default, batch"),
        (f"alice {KEY} rights=all\n", "rights must be generate, watch or operate"),
        (f"alice {KEY}\nalice {KEY}2\n", "line 2: the name 'alice' is there twice"),
        (f"alice {KEY}\nbob sha256:{DIGEST}\n", "line 2: its key is that of 'alice' too"),
    ],
)
def test_a_wrong_line_is_named_and_no_key_is_shown(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        lines(text)
    assert told in str(caught.value)
    assert "0123456789" not in str(caught.value)
    assert "more-of-the-key" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[keys.alice]\nkey = \n", "keys.toml is not TOML: Invalid value (at line 2"),
        ("[key.alice]\n", "must hold tables [keys.NAME]"),
        ("keys = 5\n", "must hold tables [keys.NAME]"),
        ("keys.alice = 5\n", "[keys.alice]: it must be a table"),
        ("[keys.alice]\n", "[keys.alice]: key must be a text"),
        ("[keys.alice]\nkey = []\n", "[keys.alice]: key must be a text"),
        (f"[keys.alice]\nkey = '{KEY}'\nrights = 5\n", "rights must be generate"),
        (f"[keys.alice]\nkey = '{KEY}'\nrequests_per_minute = true\n", "must be a number of 1"),
    ],
)
def test_a_wrong_table_is_named(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        toml(text)
    assert told in str(caught.value)


def test_bytes_that_are_not_text_are_told() -> None:
    with pytest.raises(ConfigError, match="not UTF-8"):
        parse_key_file(Path("keys.txt"), b"alice \xff\xfe", CLASSES)
