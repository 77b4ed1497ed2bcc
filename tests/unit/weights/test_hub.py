"""The hub's own library against a hub of our own: whole, cut off, refused, and gone."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from pdserve.core.errors import ModelError, PullError
from pdserve.weights.folder import ModelFolder
from pdserve.weights.hub import fetch_from_hub, is_hub_id
from pdserve.weights.json_values import read_json_object

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves files as the hub's API does. ``cut_bytes``: so many of a longer body, then the line
    drops, once."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.cut_bytes: int | None = None
        self.got: list[tuple[str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.partition("?")[0]
        if re.fullmatch(r"/api/models/owner/tiny(/revision/[\w-]+)?", path):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"_id": "1", "id": "owner/tiny", "sha": COMMIT, "siblings": siblings}
            return self.send(request, 200, json.dumps(info).encode(), body, {})
        name = re.sub(f"^/owner/tiny/resolve/({COMMIT}|main)/", "", path)
        if name not in self.files:
            return self.send(request, 404, b"", body, {"X-Error-Code": "EntryNotFound"})
        content, begin = self.files[name], 0
        asked = request.headers.get("Range")
        if body:
            self.got.append((name, asked))
        if asked:
            begin = int(asked.removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{hash(content) & 0xFFFFFFFF:x}"', "X-Repo-Commit": COMMIT}
        headers["Accept-Ranges"] = "bytes"
        if asked:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        return self.send(request, 206 if asked else 200, content[begin:], body, headers)

    def send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        body: bool,
        headers: dict[str, str],
    ) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(name, value)
        request.end_headers()
        if not body:
            return
        if self.cut_bytes is not None and len(content) > self.cut_bytes:
            request.wfile.write(content[: self.cut_bytes])
            self.cut_bytes = None
            request.close_connection = True
            return
        request.wfile.write(content)


@pytest.fixture
def hub(tiny_model_path: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in tiny_model_path.iterdir()}
    served = Hub({**files, "consolidated.safetensors": b"", "README.md": b"hello"})
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Callable[..., Path]:
    def fetch(model: str = "owner/tiny", url: str = "") -> Path:
        return fetch_from_hub(
            model, progress=False, endpoint=url or hub.url, hub_cache=tmp_path / "hub"
        )

    return fetch


def test_what_reads_as_an_id() -> None:
    for model in ("Qwen/Qwen3-0.6B", "a/b@main", "a/b-GGUF/q4/b.Q4_K_M.gguf", "a/b/c.gguf@v1"):
        assert is_hub_id(model)
    for model in ("smollm2", "/a/b", "./a/b", "../b", "a/b/c", "a/b@", "~/b", "a b/c"):
        assert not is_hub_id(model)


def test_fetches_what_a_model_needs_and_no_more(fetch: Callable[..., Path], hub: Hub) -> None:
    folder = fetch()
    ModelFolder.open(folder).load_tensors()
    names = [name for name, _ in hub.got]
    assert names[0] == "config.json", "what may refuse the model comes first"
    assert names[-1] == "model.safetensors"
    assert not {"consolidated.safetensors", "README.md"} & set(names)
    hub.got.clear()
    assert fetch("owner/tiny@main") == folder
    assert hub.got == [], "what is there is not fetched again"


def test_goes_on_where_it_was_cut_off(
    fetch: Callable[..., Path], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library writes pieces of 10 MB; of smaller ones, those that arrived whole are kept."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    hub.cut_bytes = 170_000
    ModelFolder.open(fetch()).load_tensors()
    assert hub.got[-2:] == [("model.safetensors", None), ("model.safetensors", "bytes=150000-")]


def test_a_model_that_cannot_be_served_costs_no_weights(
    fetch: Callable[..., Path], hub: Hub, tiny_model_path: Path
) -> None:
    config = read_json_object(tiny_model_path / "config.json")
    config["architectures"] = ["MambaForCausalLM"]
    hub.files["config.json"] = json.dumps(config).encode()
    with pytest.raises(ModelError, match=r"MambaForCausalLM is not supported.*LlamaForCausalLM"):
        fetch()
    assert "model.safetensors" not in [name for name, _ in hub.got]


def test_a_gguf_file_must_be_named(fetch: Callable[..., Path], hub: Hub) -> None:
    hub.files = {"tiny.Q4_0.gguf": b"GGUF", "README.md": b""}
    with pytest.raises(ModelError, match=r"name one of its GGUF files: tiny.Q4_0.gguf"):
        fetch()
    assert fetch("owner/tiny/tiny.Q4_0.gguf").read_bytes() == b"GGUF"
    with pytest.raises(ModelError, match=r"no other.gguf, but tiny.Q4_0.gguf"):
        fetch("owner/tiny/other.gguf")


def test_without_a_network_the_cache_is_served(fetch: Callable[..., Path], hub: Hub) -> None:
    nobody = "http://127.0.0.1:9"
    with pytest.raises(PullError, match="hf download owner/tiny"):
        fetch(url=nobody)
    folder = fetch()
    assert fetch(url=nobody) == folder


def test_what_the_hub_does_not_have(fetch: Callable[..., Path]) -> None:
    with pytest.raises(
        PullError, match="no file or folder here is called owner/other, and it cannot be"
    ):
        fetch("owner/other")
