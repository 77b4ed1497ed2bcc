"""Options of the HTTP edge: who may ask, how much, how long, how, and over what kind of connection.

`EdgeConfig` is part of ``config.ServeConfig``; its fields are flags, variables and keys of the file
like all others. What has to be read from disk (keys, certificates) is read by ``serve.edge_files``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path
from urllib.parse import urlsplit

from pdserve.core.errors import ConfigError
from pdserve.options import (
    flag_of,
    option,
    parse_names,
    parse_path,
    parse_seconds,
    parse_size,
    parse_text,
)

PER_KEY = "per-key"
CACHE_SALTS = (PER_KEY, "none")
ANY_ORIGIN = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeConfig:
    """Raises `ConfigError` if the options cannot work together."""

    api_keys_file: Path | None = option(
        None,
        parse_path,
        "file of API keys: lines 'NAME KEY', or TOML; read again when it changes (docs/secure.md)",
    )
    cache_salt: str = option(
        PER_KEY,
        parse_text,
        "whose prompts share cached prefixes: per-key (only those of one API key) or none (all)",
    )
    max_body_size: int = option(16 * 2**20, parse_size, "largest body of a request, such as 16MiB")
    read_timeout: float = option(
        30.0, parse_seconds, "seconds a client may take to send headers, and again for the body"
    )
    request_timeout: float | None = option(
        None, parse_seconds, "seconds an answer may take in all; then it is broken off"
    )
    cors_origin: tuple[str, ...] = option(
        (), parse_names, "origins whose web pages may call the API, comma-separated, or *"
    )
    tool_call_parser: str | None = option(
        None,
        parse_text,
        "how the model writes calls of tools: hermes or llama3_json (default: as its template)",
    )
    ssl_certfile: Path | None = option(None, parse_path, "certificate chain (PEM): serve HTTPS")
    ssl_keyfile: Path | None = option(None, parse_path, "its private key, if not in the same file")
    ssl_ca_certs: Path | None = option(
        None, parse_path, "certificates (PEM) of which clients must show one signed by"
    )

    def __post_init__(self) -> None:
        if self.cache_salt not in CACHE_SALTS:
            raise ConfigError(
                f"--cache-salt is {self.cache_salt!r}; it is one of {', '.join(CACHE_SALTS)}"
            )
        if self.max_body_size < 1024:
            raise ConfigError("--max-body-size must be at least 1024 bytes")
        for name in ("read_timeout", "request_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise ConfigError(f"{flag_of(name)} is {value:g}; it must be above 0 seconds")
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            given = "ssl_keyfile" if self.ssl_keyfile else "ssl_ca_certs"
            raise ConfigError(
                f"{flag_of(given)} is for HTTPS, which needs a certificate: give --ssl-certfile too"
            )
        for origin in self.cors_origin:
            _check_origin(origin)


def _check_origin(origin: str) -> None:
    """As browsers write it in the header ``Origin``: they compare letter by letter."""
    if origin == ANY_ORIGIN:
        return
    parts = urlsplit(origin)
    if not parts.scheme or not parts.netloc or f"{parts.scheme}://{parts.netloc}" != origin:
        raise ConfigError(
            f"--cors-origin is {origin!r}; an origin is a scheme, a host and perhaps a port, such "
            "as https://chat.example.org, with nothing after them"
        )
