"""Mutual TLS between the processes of a cluster, for those who ask for it.

Each side shows a certificate and insists on one of the other's; both must come from the cluster's
own certificate authority. Host names are not compared: workers come and go under any address, and
who may take part is decided by the authority, and by the cluster secret inside of it.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from pdserve.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Paths of PEM files: certificate (with its chain) and key of this process, authority."""

    cert: str
    key: str
    ca: str


@dataclass(frozen=True, slots=True)
class Tls:
    """Both directions: for links that come in, and for those that are made."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def tls_files(cert: str | None, key: str | None, ca: str | None) -> TlsFiles | None:
    """All three or none. Raises `ConfigError` for anything between."""
    if cert is None and key is None and ca is None:
        return None
    if cert is None or key is None or ca is None:
        raise ConfigError(
            "TLS between hosts needs --cluster-tls-cert, --cluster-tls-key and --cluster-tls-ca; "
            "give all three, on every host"
        )
    return TlsFiles(cert=cert, key=key, ca=ca)


def load_tls(files: TlsFiles | None) -> Tls | None:
    """Raises `ConfigError` if a file cannot be read or they do not belong together."""
    if files is None:
        return None
    return Tls(
        _context(ssl.PROTOCOL_TLS_SERVER, files),
        _context(ssl.PROTOCOL_TLS_CLIENT, files),
    )


def _context(protocol: int, files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(files.cert, files.key)
        context.load_verify_locations(files.ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"TLS for the cluster cannot be set up with {files.cert}, {files.key} and {files.ca}: "
            f"{error}; give PEM files: a certificate, its key and the authority that signed it"
        ) from error
    return context
