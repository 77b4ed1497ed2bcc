"""What ``pdserve bench --scenario`` refuses before anything is sent."""

from __future__ import annotations

import os
import signal

import pytest

from pdserve.api.fake import FakeGateway
from pdserve.bench.answer import Answer
from pdserve.bench.processes import check_worker_process, send_signal
from pdserve.cli import main
from pdserve.core.errors import ConfigError
from pdserve.core.ids import WorkerId

SMALL = ["--vocab-size", "200", "--input", "6", "--output", "4", "--concurrency", "3"]
CUT = "[[event]]\nat_s = 0\nkind = 'partition'\nworker = 'fake-0'\n"
KILL = "[[event]]\nat_s = 0\nkind = 'kill'\nworker = 'fake-0'\n"
W = WorkerId("decode-0")


class OneWorker(FakeGateway):
    """Shows a worker with a process that is not one."""

    def cluster(self):
        pid = os.getpid()
        return {"workers": [{"id": "fake-0", "role": "mixed", "pid": pid, "state": "ready"}]}


@pytest.fixture
def gateway(bench_card):
    return OneWorker(bench_card)


@pytest.fixture
def url(serving_in_thread, make_app, gateway):
    with serving_in_thread(make_app(gateway)) as url:
        yield url


@pytest.mark.parametrize(
    ("scenario", "flags", "said"),
    [
        (CUT, [], "takes no faults: start it with --allow-faults"),
        (KILL + "restart_after_s = 1", [], "takes no faults: start it with --allow-faults"),
        (KILL, [], "of fake-0 is not on this host: run a scenario that kills"),
        ("[[event]]\nkind = 'kil'", [], "line 1 (event 1): kind is 'kil'"),
        (
            KILL,
            ["--check-answers", "--duration", "1"],
            "--check-answers needs a load that is known",
        ),
    ],
)
def test_what_cannot_be_done_here_is_refused(url, gateway, tmp_path, capsys, scenario, flags, said):
    file = tmp_path / "s.toml"
    file.write_text(scenario)
    assert main(["bench", "--url", url, *SMALL, "--scenario", str(file), *flags]) == 2
    assert said in capsys.readouterr().err
    assert gateway.submitted == []


def test_a_file_that_is_not_there_and_a_check_without_one(capsys):
    assert main(["bench", *SMALL, "--scenario", "/nowhere.toml"]) == 2
    assert "--scenario: cannot read /nowhere.toml" in capsys.readouterr().err
    assert main(["bench", *SMALL, "--check-answers"]) == 2
    assert "--check-answers needs --scenario FILE" in capsys.readouterr().err


def test_only_worker_processes_of_this_host_are_touched():
    for pid in (os.getpid(), 1 << 22):
        with pytest.raises(ConfigError, match="not on this host"):
            check_worker_process(W, pid)
        assert not send_signal(W, pid, signal.SIGKILL)


@pytest.mark.anyio
async def test_a_digest_is_of_the_answer_and_not_of_how_it_was_cut():
    def digest(*chunks: str) -> str:
        answer = Answer(digests=True)
        answer.head(200)
        for chunk in chunks:
            answer.body(f'data: {{"choices": [{{{chunk}}}]}}\n\n'.encode(), 0.0)
        return answer.digest

    assert digest('"text": "ab"', '"text": "c"') == digest('"text": "a"', '"text": "bc"')
    assert digest('"text": "ab"') != digest('"text": "ac"')
    assert digest('"text": "x", "token_ids": [1, 2]') == digest(
        '"text": "y", "token_ids": [1]', '"text": "", "token_ids": [2]'
    )
    assert digest('"delta": {"content": "ab"}') == digest('"text": "ab"')
    assert Answer().digest == ""
