"""A server over HTTPS with keys in a file that changes: real processes, a real signal."""

from __future__ import annotations

import json
import signal
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

TLS = Path(__file__).parents[1] / "unit" / "serve" / "tls"
ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789ab"


def test_keys_and_certificate_of_a_running_server(
    start_server: Callable[..., Any],
    tiny_model_path: Path,
    paced: tuple[str, ...],
    tmp_path: Path,
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"alice {ALICE}\n")
    keys.chmod(0o600)
    server = start_server(
        *("--model", str(tiny_model_path), *paced, "--mixed", "1"),
        *("--api-keys-file", str(keys)),
        *("--ssl-certfile", str(TLS / "server.pem"), "--request-timeout", "300"),
    )
    assert server.url.startswith("https://127.0.0.1:")
    trust = ssl.create_default_context(cafile=str(TLS / "ca.pem"))

    def status(key: str | None) -> int:
        body = json.dumps({"prompt": "hello", "max_tokens": 2}).encode()
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{server.url}/v1/completions", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=120, context=trust) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    assert [status(key) for key in (ALICE, BOB, None)] == [200, 401, 401]
    keys.write_text(f"bob {BOB}\n")
    server.signal(signal.SIGHUP)
    while status(BOB) != 200:  # the signal is on its way
        pass
    assert status(ALICE) == 401
    keys.write_text("bob\n")
    server.signal(signal.SIGHUP)
    while "the API keys stay as they were" not in server.log:
        pass
    assert status(BOB) == 200
    server.signal(signal.SIGTERM)
    assert server.wait() == 0, server.log
    assert '"tenant":"alice"' in server.log
    assert "the certificate was read again" in server.log
    assert ALICE not in server.log
    assert BOB not in server.log
