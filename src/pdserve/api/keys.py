"""Which keys this server takes: those it was started with, and those of a file that may change.

`KeyStore` finds the `Caller` of a key. Once a second at most, when a key is looked up, it looks at
the file's times (and `KeyStore.reload`, at SIGHUP, at the file itself). A file that has changed
takes effect whole: names that are gone are let in no more, those that stay keep what their
`Allowance` has counted. A file that cannot be read, or is wrong, changes nothing; the log says
why. A request that has begun ends as it would have.
"""

from __future__ import annotations

import hmac
import logging
import os
import stat
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from pdserve.api.allowances import Allowance
from pdserve.api.callers import Caller
from pdserve.api.key_file import KeyEntry, Rights, digest_of, parse_key_file
from pdserve.api.settings import ApiSettings
from pdserve.core.errors import AuthError, ConfigError

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
_YOUNG_NS = 2_000_000_000
"""A file that was written just now may be written again without its time showing it."""
_TENANT_CHARS = 12
_Stamp = tuple[int, int, int, int]


class KeyStore:
    """Event loop's thread only."""

    def __init__(
        self,
        api_key: str | None,
        class_of_key: Mapping[str, str],
        file: Path | None = None,
        classes: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``api_key`` may do everything; ``class_of_key`` names the class of others. Raises
        `ConfigError` if the file cannot be used."""
        self._fixed: dict[bytes, Caller] = {}
        for key, class_name in class_of_key.items():
            self._add_fixed(key, class_name, Rights.GENERATE)
        if api_key is not None:
            self._add_fixed(api_key, None, Rights.OPERATE)
        self._file = file
        self._classes = tuple(classes)
        self._clock = clock
        self._callers = dict(self._fixed)
        self._allowances: dict[str, Allowance] = {}
        self._stamp: _Stamp | None = None
        self._content = b""
        self._look_s = -LOOK_EVERY_S
        self._said = ""
        if file is not None:
            self._take(*_read(file))
            self._look_s = clock()

    def __bool__(self) -> bool:
        """False if no key is asked for."""
        return bool(self._callers)

    def caller(self, key: bytes) -> Caller:
        """Whose key it is. Raises `AuthError`."""
        self._look()
        # By its digest, of which nobody can choose even the first byte without trying: how long
        # the search takes tells nothing about a key.
        digest = digest_of(key)
        caller = self._callers.get(digest)
        if caller is None or not hmac.compare_digest(caller.digest, digest):
            raise AuthError("the API key is not one that this server takes")
        return caller

    def reload(self) -> None:
        """Read the file again, whatever its time says."""
        self._stamp = None
        self._look_s = -LOOK_EVERY_S
        self._look()

    def tokens_in_flight(self) -> list[tuple[str, int]]:
        """(name, tokens) of the file's keys."""
        return [(name, each.tokens_in_flight) for name, each in self._allowances.items()]

    # --- inside -------------------------------------------------------------------------------

    def _add_fixed(self, key: str, class_name: str | None, rights: Rights) -> None:
        digest = digest_of(key.encode())
        tenant = digest.hex()[:_TENANT_CHARS]
        self._fixed[digest] = Caller(tenant, class_name, rights=rights, digest=digest)

    def _look(self) -> None:
        now = self._clock()
        if self._file is None or now - self._look_s < LOOK_EVERY_S:
            return
        self._look_s = now
        try:
            if self._stamp is not None and _stamp_of(os.stat(self._file)) == self._stamp:
                return
            stamp, mode, content = _read(self._file)
            if content != self._content:
                self._take(stamp, mode, content)
                logger.info(
                    "API keys read again from %s: %d names", self._file, len(self._allowances)
                )
            self._stamp, self._said = stamp, ""
        except (ConfigError, OSError) as error:
            said = str(error)
            if isinstance(error, OSError):
                said = f"cannot read {self._file}: {error.strerror}"
            if said != self._said:
                self._said = said
                logger.error("the API keys stay as they were: %s", said)

    def _take(self, stamp: _Stamp | None, mode: int, content: bytes) -> None:
        assert self._file is not None
        entries = parse_key_file(self._file, content, self._classes)
        callers = dict(self._fixed)
        allowances: dict[str, Allowance] = {}
        now = self._clock()
        for entry in entries:
            allowance = self._allowances.get(entry.name) or Allowance(entry.name)
            allowance.limit(entry.requests_per_minute, entry.concurrent_tokens, now)
            allowances[entry.name] = allowance
            callers.update(_callers_of(entry, allowance))
        self._callers, self._allowances = callers, allowances
        self._stamp, self._content = stamp, content
        if mode & stat.S_IROTH and any(entry.is_plain for entry in entries):
            logger.warning(
                "everybody on this machine can read the keys in %s: chmod 600 it, or write the "
                "keys as sha256: digests",
                self._file,
            )


def key_store(settings: ApiSettings) -> KeyStore:
    """The keys of these settings. Raises `ConfigError` if their file cannot be used."""
    return KeyStore(
        settings.api_key, settings.class_of_key, settings.api_keys_file, tuple(settings.classes)
    )


def _callers_of(entry: KeyEntry, allowance: Allowance) -> dict[bytes, Caller]:
    return {
        digest: Caller(
            entry.name, entry.class_name, rights=entry.rights, digest=digest, allowance=allowance
        )
        for digest in entry.digests
    }


def _stamp_of(found: os.stat_result) -> _Stamp:
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


def _read(file: Path) -> tuple[_Stamp | None, int, bytes]:
    """(stamp, or None if it may be written yet; mode; content). Raises `ConfigError`."""
    try:
        with file.open("rb") as opened:
            found = os.fstat(opened.fileno())
            content = opened.read()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from error
    is_young = time.time_ns() - found.st_mtime_ns < _YOUNG_NS
    return None if is_young else _stamp_of(found), found.st_mode, content
