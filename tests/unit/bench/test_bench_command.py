"""``pdserve bench`` as a person runs it: what it prints, writes, draws and refuses."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from pdserve.api.fake import FakeGateway
from pdserve.bench.options import LoadOptions
from pdserve.bench.plan import make_load
from pdserve.cli import main
from pdserve.core.errors import ConfigError, OverloadedError
from pdserve.plot.cdf import cdf_svg

SMALL = ["--vocab-size", "200", "--input", "6", "--output", "4", "-n", "8", "--concurrency", "3"]


@pytest.fixture
def url(serving_in_thread, make_app, bench_card):
    with serving_in_thread(make_app(FakeGateway(bench_card))) as url:
        yield url


def test_json_is_alone_on_stdout(url, capsys):
    flags = ["--json", "-", "--goodput", "ttft:60000", "tpot:60000", "--save-requests"]
    assert main(["bench", "--url", url, *SMALL, *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["target"] | {"url": ""} == {
        "url": "", "model": "tiny", "endpoint": "completions", "prompt": "ids",
        "temperature": 0.0, "ignore_eos": True, "extra_body": {},
    }  # fmt: skip
    assert document["load"]["arrivals"] == "closed"
    summary = document["summary"]
    assert (summary["completed"], summary["output_tokens"], summary["prompt_tokens"]) == (8, 32, 48)
    assert summary["slo"]["attainment"] == 1.0
    assert summary["slo"]["goodput"] == pytest.approx(8 / summary["duration_s"])
    assert document["client"]["cpu_us_per_token"] > 0
    assert [request["output_tokens"] for request in document["requests"]] == [4] * 8


def test_tables_a_file_and_pictures(url, capsys, tmp_path):
    flags = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "plots")]
    goodput = ["--goodput", "ttft:0.000001", "tpot:60000", "e2e:60000"]
    assert main(["bench", "--url", url, *SMALL, *flags, *goodput]) == 0
    out = capsys.readouterr().out
    assert "8 sent: 8 completed" in out
    assert "0.0% (0 of 8); TTFT 0.0%, TPOT 100.0%, E2E 100.0%" in out
    assert "us of CPU a token" in out
    assert "requests" not in json.loads((tmp_path / "out.json").read_text())
    for name in ("ttft", "tpot", "itl", "e2e"):
        tree = ElementTree.parse(tmp_path / "plots" / f"{name}.svg")
        [curve] = tree.iter("{http://www.w3.org/2000/svg}polyline")
        assert len(curve.attrib["points"].split()) >= 2


def test_refusals_are_shown_and_nothing_completed_is_status_1(
    serving_in_thread, make_app, bench_card, capsys
):
    gateway = FakeGateway(bench_card, fail_before=OverloadedError("no room here", 1.0))
    with serving_in_thread(make_app(gateway)) as url:
        assert main(["bench", "--url", url, *SMALL]) == 1
    out = capsys.readouterr().out
    assert "8 failed" in out
    assert "8 x 429: no room here" in out


def test_a_trace_is_replayed(url, capsys, tmp_path):
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 3000 * (i // 4), "input_length": 20, "output_length": 9, "hash_ids": [i % 2]}
        for i in range(12)
    ]
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    flags = ["--trace", str(trace), "--rate-scale", "100", "--window", "0:6", "--max-output", "3"]
    assert main(["bench", "--url", url, "--vocab-size", "200", *flags, "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["load"]["reusable_prompt_share"] == pytest.approx(6 / 8)
    assert document["summary"]["completed"] == 8
    assert document["summary"]["output_tokens"] == 24
    assert document["summary"]["duration_s"] < 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--concurrency N, --rate R or --trace FILE"),
        (["--rate", "0"], "above 0"),
        (["--rate", "inf"], "needs --num-requests"),
        (["--arrivals", "poisson"], "need --rate"),
        (["--arrivals", "gamma", "--rate", "1"], "need --burstiness"),
        (["--arrivals", "trace", "--rate", "1"], "need --trace"),
        (["--arrivals", "closed", "--concurrency", "1", "--rate", "1"], "have no rate"),
        (["--concurrency", "1", "--burstiness", "2"], "no burstiness"),
        (["--concurrency", "0"], "above 0"),
        (["--concurrency", "1", "--window", "1:2"], "need --trace"),
        (["--concurrency", "1", "--prefix-groups", "2"], "go together"),
        (["--concurrency", "1", "--cancel-rate", "2"], "a share"),
        (["--concurrency", "1", "--header", "x"], "NAME:VALUE"),
        (["--concurrency", "1", "--extra-body", "[]"], "JSON object"),
        (["--concurrency", "1", "--extra-body", "{"], "not JSON"),
        (["--concurrency", "1", "--input", "x"], "no length"),
        (["--concurrency", "1", "--goodput", "speed:1"], "ttft, tpot and e2e"),
        (["--concurrency", "1", "--url", "here"], "http://HOST:PORT"),
        (["--trace", "/no/such/file"], "cannot read"),
        (["--trace", "x", "--window", "5:1"], "START:END"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_sent(flags, says, capsys):
    assert main(["bench", *flags]) == 2
    assert says in capsys.readouterr().err


def test_arrivals_follow_from_the_other_flags(tmp_path):
    def kind(**options):
        return make_load(LoadOptions(num_requests=3, **options)).arrivals

    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-01-01 00:00:00,5,5\n2023-01-01 00:00:09,6,6\n"
    )
    assert kind(rate=1.0) == "poisson"
    assert kind(rate=1.0, burstiness=0.5) == "gamma"
    assert kind(concurrency=2) == "closed"
    assert kind(trace=trace) == "trace"
    assert kind(trace=trace, rate=1.0) == "poisson"
    assert not make_load(LoadOptions(concurrency=2)).is_paced
    moved = list(make_load(LoadOptions(trace=trace, rate=2.0, arrivals="constant")).requests)
    assert [(r.at_s, r.prompt_tokens) for r in moved] == [(0.0, 5), (0.5, 6)]


def test_windows_limits_and_what_is_left(tmp_path):
    trace = tmp_path / "trace.csv"
    rows = "".join(f"2023-01-01 00:00:{i:02},{10 * (i + 1)},{i + 1}\n" for i in range(20))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)

    def load(**options):
        return make_load(LoadOptions(trace=trace, **options))

    assert load().num_requests == 20
    assert load(num_requests=3).num_requests == 3
    assert load(duration_s=5.0).num_requests == 5
    assert load(duration_s=5.0, rate_scale=2.0).num_requests == 10
    assert load(window_s=(4.0, 6.0)).num_requests == 2
    assert load(max_input_tokens=50).num_requests == 5
    assert max(r.output_tokens for r in load(max_output_tokens=7).requests) == 7
    with pytest.raises(ConfigError, match="no request is left"):
        load(window_s=(100.0, 200.0))


@pytest.mark.parametrize(
    ("values", "bound"),
    [([5.0], None), ([0.0, 0.0], 3.0), ([0.001, 5000.0, 7.0], 200.0), ([10.0, 11.5], 0.5),
     ([float(i) for i in range(1, 5000)], None)],
)  # fmt: skip
def test_pictures_of_any_values_stay_in_their_frame(values, bound):
    tree = ElementTree.fromstring(cdf_svg("a < b", values, bound))
    [curve] = tree.iter("{http://www.w3.org/2000/svg}polyline")
    points = [tuple(map(float, point.split(","))) for point in curve.attrib["points"].split()]
    assert all(60 <= x <= 620 and 40 <= y <= 350 for x, y in points)
    assert points == sorted(points, key=lambda point: point[0])
    assert points[-1][1] == 40.0, "the last value completes the share"
