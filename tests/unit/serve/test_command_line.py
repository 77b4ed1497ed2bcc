"""The command line: errors in one line with status 2, JSON alone on stdout, help for everything."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rich.console import Console

import pdserve
from pdserve.cli import main
from pdserve.config import OPTIONS
from pdserve.core.errors import ConfigError, UnavailableError
from pdserve.options import flag_of
from pdserve.page import page
from pdserve.serve import explain as explain_module
from pdserve.serve.client import Client
from pdserve.serve.top import Look, once, rates, render, watch

CLUSTER: dict[str, Any] = {
    "model": "tiny",
    "max_model_tokens": 4096,
    "uptime_s": 61.2,
    "draining": True,
    "open_requests": 3,
    "requests": 10,
    "output_tokens": 1000,
    "workers": [
        {
            "id": "prefill-0",
            "role": "mixed",
            "home_role": "prefill",
            "pid": 4242,
            "epoch": 1,
            "state": "ready",
            "load": {
                "pending_prefill_tokens": 77,
                "num_waiting": 5,
                "num_running": 6,
                "num_steps": 100,
                "transfer_bytes": 5_000_000,
            },
            "blocks": {"total": 50, "free": 20, "cached": 10, "quarantined": 0},
        },
        {
            "id": "decode-0",
            "role": "decode",
            "home_role": "decode",
            "pid": None,
            "epoch": 2,
            "state": "down",
            "load": None,
            "blocks": None,
        },
    ],
}


@pytest.fixture
def server_url() -> Iterator[str]:
    """A server that answers with `CLUSTER`, to who knows the key if the path is below /locked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            locked = self.path.startswith("/locked")
            allowed = self.headers["Authorization"] == "Bearer key" or not locked
            body = json.dumps(CLUSTER).encode() if allowed else b"{}"
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["serve", "--block-size", "24"], "must divide 64"),
        (["serve", "--model", "no-such-model"], "is no model. Give a folder"),
        (["serve", "--config", "no-such-file.toml"], "cannot read no-such-file.toml"),
        (["pull", "no-such-model"], "is no model. Give a folder"),
        (["replay", "no-such-folder"], "holds no recording"),
        (["top", "--once", "--url", "ftp://x"], "begins with http"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pdserve: ")
    assert reason in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "the following arguments are required: COMMAND; see pdserve --help"),
        (["simm"], "invalid choice: 'simm'"),
        (["sim", "--clustr", "1xa100:mixed"],
         "unknown: --clustr 1xa100:mixed; did you mean --cluster? see pdserve sim --help"),
        (["bench", "--rate", "fast"], "argument --rate: invalid float value: 'fast'; see pdserve"),
        (["role", "prefill-0"], "required: role; see pdserve role --help"),
    ],
)  # fmt: skip
def test_what_is_typed_wrong_is_told_in_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pdserve: ")
    assert told in captured.err
    assert captured.err.count("\n") == 1


def test_what_is_piped_is_not_wrapped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    sentence = "one sentence of many words " * 20
    page().print(sentence)
    assert capsys.readouterr().out == f"{sentence}\n"
    monkeypatch.setenv("COLUMNS", "40")
    page().print(sentence)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40


def test_help_names_every_option_and_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in (["serve", "--help"], ["--help"]):
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert [name for name in OPTIONS if flag_of(name) not in text] == []
    assert "\n    replay " in text
    assert "\n    worker " in text


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert pdserve.__version__ in capsys.readouterr().out


def test_a_worker_started_by_hand_explains_itself() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "pdserve", "worker"], input=b"hello", capture_output=True
    )
    assert ended.returncode == 2
    assert b"started by pdserve serve" in ended.stderr
    assert ended.stderr.count(b"\n") == 1


def test_a_taken_port_is_told_before_anything_starts(
    server_url: str, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = server_url.rsplit(":", 1)[1]
    assert main(["serve", "--model", str(tiny_model_path), "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_the_gateway_process_never_imports_torch() -> None:
    code = (
        "import sys, pdserve.cli, pdserve.serve.server, pdserve.serve.deployment\n"
        "sys.exit(' '.join(m for m in ('torch', 'transformers') if m in sys.modules) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_top_shows_workers_and_json_is_the_document_alone(
    server_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", "--json", "--url", server_url]) == 0
    assert json.loads(capsys.readouterr().out) == CLUSTER
    console = Console(width=100, record=True, file=io.StringIO())
    once(Client(server_url), console)
    text = console.export_text()
    assert "tiny" in text
    assert "draining" in text
    (row,) = (line for line in text.splitlines() if line.startswith("prefill-0"))
    assert row.split()[:5] == ["prefill-0", "mixed", "(prefill)", "ready", "4242"]
    assert row.split()[5:] == ["77", "5", "6", "30/50", "10", "-", "-"]
    (row,) = (line for line in text.splitlines() if line.startswith("decode-0"))
    assert row.split()[1:4] == ["decode", "down", "-"]


def test_top_shows_where_workers_are_once_one_is_elsewhere() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    joined = json.loads(json.dumps(CLUSTER))
    joined["workers"][0]["host"] = "10.0.0.2"
    console.print(render(None, Look(0.0, joined)))
    rows = {line.split()[0]: line.split()[1] for line in console.export_text().splitlines()[1:]}
    assert rows == {"worker": "host", "prefill-0": "10.0.0.2", "decode-0": "here"}


def test_rates_are_per_second_and_a_restarted_counter_counts_from_zero() -> None:
    later = json.loads(json.dumps(CLUSTER))
    later["output_tokens"] = 1500
    later["workers"][0]["load"]["num_steps"] = 40
    per_s = rates(Look(10.0, CLUSTER), Look(12.0, later))
    assert per_s["tokens"] == 250
    assert per_s["requests"] == 0
    assert per_s["prefill-0 num_steps"] == 20
    assert rates(None, Look(1.0, CLUSTER)) == {}


def test_top_needs_the_key_of_a_server_that_has_one(server_url: str) -> None:
    with pytest.raises(UnavailableError, match="--api-key"):
        Client(f"{server_url}/locked").cluster()
    assert Client(f"{server_url}/locked", "key").cluster() == CLUSTER


def test_top_says_when_nobody_is_there_and_how_often_it_may_look(server_url: str) -> None:
    with pytest.raises(UnavailableError, match="name the right one with --url"):
        Client("http://127.0.0.1:1").cluster()
    with pytest.raises(ConfigError, match="more than 0"):
        watch(Client(server_url), 0)
    with pytest.raises(UnavailableError, match=r"refused\); name the right one with --live"):
        Client("http://127.0.0.1:1", flag="--live").cluster()
    with pytest.raises(ConfigError, match=r"--live is 'localhost'; it begins with http://"):
        Client("localhost", flag="--live")


def test_explain_shows_candidates_and_what_came_of_it() -> None:
    candidate = dict.fromkeys((f"{column}_ms" for column in explain_module.PARTS), 12.34)
    document = {
        "request_id": "cmpl-1",
        "status": "finished",
        "request": {"prompt_tokens": 100},
        "result": {
            "output_tokens": 4,
            "ttft_ms": 250.0,
            "predicted_ttft_ms": 210.0,
            "regret_ms": -50.0,
        },
        "attempts": [
            {
                "epoch": 1,
                "route": "split",
                "prefill_worker": "p0",
                "decode_worker": "d0",
                "reason": "cheaper",
                "resumed": None,
                "moves": [{"to": "d1", "reason": "crowded"}],
                "candidates": [
                    {"prefill": "p0", "decode": "d0", "fetch_from": "p1", **candidate},
                    {"prefill": "d0", "decode": "d0", **candidate},
                ],
                "phases": {"prefill": {"duration_ms": 200.0}, "decode": {"duration_ms": None}},
            }
        ],
    }
    shown = io.StringIO()
    explain_module.explain(document, Console(file=shown, width=80))
    text = shown.getvalue()
    for words in (
        "because: cheaper",
        "(prefix from p1)",
        "moved to d1: crowded",
        "took: prefill 200.0 ms",
        "measured 250.0 ms to the first token; predicted 210.0 ms",
        "the runner-up, as predicted, would have been 50.0 ms slower",
    ):
        assert words in text
