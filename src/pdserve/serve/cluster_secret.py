"""The secret that all processes of a cluster prove to each other, and where it comes from.

It comes from a file or from the environment, never from a command line, where every user of the
host could read it. A server that takes no workers of other hosts makes one of its own at each
start.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from pdserve.core.errors import ConfigError

log = logging.getLogger(__name__)

VARIABLE = "PDSERVE_CLUSTER_SECRET"
MIN_BYTES = 16
MAKE_ONE = "make one with `openssl rand -hex 32` and give the same to every host"


def read_secret(file: str | None, environment: Mapping[str, str]) -> bytes | None:
    """The secret, without white space around it; None if there is none. Raises `ConfigError`."""
    if file is None:
        found = environment.get(VARIABLE, "").strip().encode()
        where = VARIABLE
    else:
        found, where = _read(Path(file).expanduser()), file
    if not found and file is None:
        return None
    if len(found) < MIN_BYTES:
        raise ConfigError(
            f"the cluster secret in {where} has {len(found)} bytes, and anybody could guess it; it "
            f"needs {MIN_BYTES} or more: {MAKE_ONE}"
        )
    return found


def require_secret(file: str | None, environment: Mapping[str, str], why: str) -> bytes:
    """As `read_secret`, and `ConfigError` if there is none."""
    secret = read_secret(file, environment)
    if secret is None:
        raise ConfigError(
            f"{why} needs a cluster secret: give --cluster-secret-file or set {VARIABLE}; "
            f"{MAKE_ONE}"
        )
    return secret


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) and status.st_uid == os.getuid():
            log.warning("%s can be read by other users of this host: chmod 600 %s", path, path)
        return path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"the cluster secret cannot be read from {path}: {error.strerror or error}"
        ) from error
