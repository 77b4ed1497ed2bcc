"""What the HTTP edge reads from files, at start and again while it serves: keys and certificates.

Everything is read before a worker starts, so that a wrong path is told at once. Keys are read again
when their file changes; keys and certificate both at SIGHUP, and connections that are made from
then on get the new certificate. What cannot be read then changes nothing, and the log says so.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping
from ipaddress import ip_address

from pdserve.api.keys import KeyStore, key_store
from pdserve.api.settings import ApiSettings
from pdserve.config import ServeConfig
from pdserve.core.errors import ConfigError
from pdserve.core.request import ServiceClass
from pdserve.edge_config import PER_KEY, EdgeConfig

log = logging.getLogger(__name__)


class EdgeFiles:
    """Raises `ConfigError` if a file cannot be used."""

    def __init__(self, config: ServeConfig) -> None:
        self._edge = config.edge
        self.settings = _settings(config)
        self.keys: KeyStore = key_store(self.settings)
        self.ssl = _ssl_context(config.edge)

    @property
    def can_change(self) -> bool:
        """True if anything was read from a file."""
        return self._edge.api_keys_file is not None or self.ssl is not None

    def reload(self) -> None:
        """Read all of it again."""
        self.keys.reload()
        if self.ssl is None:
            return
        try:
            _load(self.ssl, self._edge)
            log.info("the certificate was read again")
        except ConfigError as error:
            log.error("the certificate stays as it was: %s", error)

    def warn(self, host: str) -> None:
        """Say what those who can reach the address ``host`` could do that they should not."""
        if ip_address(host.partition("%")[0]).is_loopback:
            return
        if not self.keys:
            log.warning(
                "listening on %s without API keys: whoever reaches this port may use the model, "
                "see what others ask for, and move workers about; give --api-key or "
                "--api-keys-file (docs/secure.md), or --host 127.0.0.1",
                host,
            )
        elif self.ssl is None:
            log.warning(
                "listening on %s without TLS: keys and prompts travel in the clear, unless a proxy "
                "before this server encrypts; give --ssl-certfile and --ssl-keyfile",
                host,
            )


def _settings(config: ServeConfig) -> ApiSettings:
    edge = config.edge
    classes: Mapping[str, ServiceClass] = {each.name: each for each in config.classes.classes}
    return ApiSettings(
        tool_call_parser=edge.tool_call_parser,
        api_key=config.api_key,
        api_keys_file=edge.api_keys_file,
        salt_per_key=edge.cache_salt == PER_KEY,
        classes=classes,
        class_of_key=config.classes.class_of_key,
        max_body_bytes=edge.max_body_size,
        read_timeout_s=edge.read_timeout,
        request_timeout_s=edge.request_timeout,
        cors_origins=edge.cors_origin,
    )


def _ssl_context(edge: EdgeConfig) -> ssl.SSLContext | None:
    """TLS 1.2 or newer, with Python's choice of ciphers."""
    if edge.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load(context, edge)
    if edge.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(edge.ssl_ca_certs)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"--ssl-ca-certs {edge.ssl_ca_certs}: {_reason(error)}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load(context: ssl.SSLContext, edge: EdgeConfig) -> None:
    certfile, keyfile = edge.ssl_certfile, edge.ssl_keyfile
    assert certfile is not None

    def no_password() -> str:
        raise ConfigError(
            f"the private key in {keyfile or certfile} is encrypted, and nobody is there to type "
            "its password: decrypt it with openssl pkey, and chmod 600 what comes out"
        )

    try:
        context.load_cert_chain(certfile, keyfile, no_password)
    except (OSError, ssl.SSLError) as error:
        files = f"{certfile} and {keyfile}" if keyfile else str(certfile)
        raise ConfigError(
            f"--ssl-certfile, --ssl-keyfile: {files}: {_reason(error)}; both are PEM files, and "
            "the key is that of the first certificate"
        ) from error


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return error.strerror or str(error)
