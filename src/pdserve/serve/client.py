"""A running server as its operators' commands see it: ``pdserve top``, ``role``, ``drain``."""

from __future__ import annotations

import contextlib
import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from pdserve.core.errors import ConfigError, UnavailableError

TIMEOUT_S = 5.0


class Client:
    """Asks a server over HTTP. Methods raise `UnavailableError` if it does not answer, or refuses;
    what it says about that is in the message. ``flag``: which one names the URL."""

    def __init__(self, url: str, api_key: str | None = None, *, flag: str = "--url") -> None:
        self.url = url.rstrip("/")
        self._flag = flag
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"{flag} is {url!r}; it begins with http:// or https://")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def cluster(self) -> dict[str, Any]:
        """The ``/cluster`` document."""
        return self._ask("/cluster")

    def traffic(self) -> dict[str, Any]:
        """The ``/cluster/traffic`` document."""
        return self._ask("/cluster/traffic")

    def timeline(self, request_id: str) -> dict[str, Any]:
        """The ``/v1/requests/{id}/timeline`` document."""
        return self._ask(f"/v1/requests/{urllib.parse.quote(request_id, safe='')}/timeline")

    def set_role(self, worker: str, role: str) -> dict[str, Any]:
        return self._ask(f"{_place(worker)}/role", {"role": role})

    def drain(self, worker: str, *, restart: bool) -> dict[str, Any]:
        """Waits as long as it takes."""
        return self._ask(f"{_place(worker)}/drain", {"restart": restart}, timeout_s=None)

    def undrain(self, worker: str) -> dict[str, Any]:
        return self._ask(f"{_place(worker)}/undrain", {})

    def _ask(
        self, path: str, body: dict[str, Any] | None = None, timeout_s: float | None = TIMEOUT_S
    ) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = self._headers | ({} if data is None else {"Content-Type": "application/json"})
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                document: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            hint = "; give its key with --api-key" if error.code == 401 else ""
            raise UnavailableError(
                f"{self.url} answers with status {error.code}{hint}{_words(error)}"
            ) from error
        except (OSError, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise UnavailableError(
                    f"the certificate of {self.url} is not trusted here "
                    f"({reason.verify_message}); SSL_CERT_FILE names a PEM file with its authority"
                ) from error
            raise UnavailableError(
                f"no pdserve answers at {self.url} ({reason}); name the right one with {self._flag}"
            ) from error
        return document


def _place(worker: str) -> str:
    return f"/cluster/workers/{urllib.parse.quote(worker, safe='')}"


def _words(error: urllib.error.HTTPError) -> str:
    """What the server says about it, if it is one of ours."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return f": {json.load(error)['error']['message']}"
    return ""
