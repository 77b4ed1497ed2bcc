"""Trace readers: what they make of a file, what they refuse, that real traces come out right."""

from __future__ import annotations

import gzip
import io
import json
import math
import random
import statistics
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pdserve.core.errors import ConfigError
from pdserve.core.events import LifeEvent, LifeName, detail
from pdserve.core.ids import GATEWAY, Epoch, RequestId
from pdserve.obs import logs
from pdserve.workload.build import build
from pdserve.workload.options import WorkloadOptions
from pdserve.workload.prompts import token_ids
from pdserve.workload.request import Segment
from pdserve.workload.reuse import prefix_reuse
from pdserve.workload.summary import percentile
from pdserve.workload.traces import iter_trace, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,0
2023-11-16 18:15:51.2224670,879,55
"""

SPLITWISE = (
    "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
    "0,2,0,2.0,1,374,44\n"
    "1,2,0,6.314579,1,396,109\n"
)


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "trace"
        path.write_text(text)
        return path

    return write


def line(timestamp, inputs, outputs, ids):
    row = {"timestamp": timestamp, "input_length": inputs, "output_length": outputs}
    return json.dumps(row | {"hash_ids": ids}) + "\n"


def test_azure_rows(written):
    requests = read_trace(written(AZURE))
    assert [request.index for request in requests] == [0, 1, 2]
    assert [request.prompt_tokens for request in requests] == [374, 396, 879]
    assert [request.output_tokens for request in requests] == [44, 1, 55]
    assert [request.at_s for request in requests] == pytest.approx(
        [0, 4.314579, 4.541877], abs=2e-6
    )


def test_azure_rows_with_a_zone_and_columns_in_another_order(written):
    text = (
        "GeneratedTokens,TIMESTAMP,ContextTokens\n"
        "5,2024-05-10 00:00:01.5+00:00,7\n\n"
        "6,2024-05-10 02:00:01.0+02:00,8\n"
    )
    requests = read_trace(written(text))
    assert [(r.at_s, r.prompt_tokens, r.output_tokens) for r in requests] == [
        (0, 8, 6),
        (0.5, 7, 5),
    ]


def test_mooncake_blocks_become_segments(written):
    requests = read_trace(written(line(2000, 1100, 9, [4, 5, 6]) + line(500, 512, 3, [4])))
    assert [request.at_s for request in requests] == [0, 1.5]
    assert requests[0].segments == (Segment("block:4", 512),)
    assert requests[1].segments == (
        Segment("block:4", 512), Segment("block:5", 512), Segment("block:6", 76),
    )  # fmt: skip
    assert requests[1].prompt_tokens == 1100


def test_mooncake_prompts_repeat_where_their_ids_do(written):
    text = line(0, 1500, 1, [1, 2, 3]) + line(1, 1400, 1, [1, 2, 4])
    first, second = (token_ids(request.segments, 0, 32000) for request in read_trace(written(text)))
    assert first[:1024] == second[:1024]
    assert sum(a == b for a, b in zip(first[1024:], second[1024:], strict=False)) < 5


def life(name, request, at_s, **values):
    return LifeEvent(
        name=LifeName(name),
        request_id=RequestId(request),
        epoch=Epoch(0),
        at_s=at_s,
        node=GATEWAY,
        detail=detail(**values),
    )


def test_our_own_log_is_a_trace(written):
    stream = io.StringIO()
    logs.setup("json", stream=stream)
    try:
        for event in (
            life("submitted", "a", 100.0, prompt_tokens=10, choices=1, max_tokens=50),
            life("submitted", "b", 100.5, prompt_tokens=20, choices=2, max_tokens=50),
            life("routed", "a", 100.6),
            life("finished", "a", 101.0, reason="stop", output_tokens=7, choices=1),
            life("submitted", "a", 102.0, prompt_tokens=30, choices=1, max_tokens=60),
            life("finished", "b", 103.0, reason="length", output_tokens=84, choices=2),
            life("finished", "a", 104.0, reason="abort", output_tokens=2, choices=1),
            life("submitted", "c", 105.0, prompt_tokens=40, choices=1, max_tokens=70),
            life("failed", "c", 105.0, kind="overloaded"),
        ):
            logs.log_life_event(event)
    finally:
        logs.teardown()
    text = '{"event": "ready", "url": "http://127.0.0.1:8000"}\nnot JSON\n' + stream.getvalue()
    assert [
        (request.at_s, request.prompt_tokens, request.output_tokens)
        for request in read_trace(written(text))
    ] == [(0.0, 10, 7), (0.5, 20, 42), (2.0, 30, 60), (5.0, 40, 70)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "columns"),
        ("a,b,c\n1,2,3\n", "line 1: the columns"),
        (AZURE + "2023-11-16 18:15:52,x,1\n", "line 5.*ContextTokens is 'x', not a whole number"),
        (AZURE + "2023-11-16 18:15:52,1\n", "line 5"),
        (AZURE + "2023-11-16 18:15:52,0,1\n", "at least one token"),
        (AZURE + "2023-11-16 18:15:52,99999999999,1\n", "line 5.*at most 1000000000"),
        (AZURE.splitlines()[0], "no request"),
        (line(0, 512, 1, [1]) + line(0, 513, 1, [1]), "line 2.*do not make 513 tokens"),
        (line(0, 512, 1, [1]) + "{}", "line 2.*it has no 'hash_ids'"),
        (line(0, 0, 1, []), "line 1"),
        ('{"event": "submitted"}', "line 1"),
        (SPLITWISE + "2,2,0,7.0,4,9,9\n", "line 4.*batch_size of 4"),
        (SPLITWISE + "2,2,0,7.0,1,9\n", "line 4: 6 columns instead of 7"),
        (SPLITWISE + "2,2,0,nan,1,9,9\n", "line 4.*nan is no time"),
        (SPLITWISE + "2,2,0,7.0,1,9.5,9\n", "line 4.*whole"),
        ('{"event": "ready"}', "no request"),
    ],
)
def test_what_cannot_be_read_is_named(written, text, says):
    with pytest.raises(ConfigError, match=says):
        read_trace(written(text))


def test_a_missing_file_and_an_unknown_kind(tmp_path, written):
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(tmp_path / "none")
    with pytest.raises(ConfigError, match="azure, mooncake, splitwise, life-log"):
        read_trace(written(AZURE), "burst")


DATA = Path(__file__).parent / "data"


def test_azure_2024_has_zones_and_whole_seconds():
    requests = read_trace(DATA / "azure_2024.csv")
    assert len(requests) == 64
    assert [(r.at_s, r.prompt_tokens, r.output_tokens) for r in requests[:2]] == [
        (0.0, 1130, 7),
        (0.011086, 164, 13),
    ]
    whole = next(r for r in requests if r.prompt_tokens == 761)
    assert whole.at_s == 0.99007, "of 00:00:01+00:00, exact to the microsecond"
    assert list(iter_trace(DATA / "azure_2024.csv")) == requests


def test_splitwise_rows_may_keep_their_times(written):
    path = written(SPLITWISE)
    assert [(r.at_s, r.prompt_tokens, r.output_tokens) for r in read_trace(path)] == [
        (0.0, 374, 44),
        (pytest.approx(4.314579), 396, 109),
    ]
    assert [r.at_s for r in iter_trace(path, keep_times=True)] == [2.0, 6.314579]
    with pytest.raises(ConfigError, match="are dates"):
        iter_trace(written(AZURE), keep_times=True)


def test_a_packed_trace_is_unpacked_on_the_way(tmp_path):
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(SPLITWISE.encode()))
    assert len(read_trace(path)) == 2
    path.write_bytes(gzip.compress(SPLITWISE.encode())[:-12])
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(path)


def shuffled(reach, n=20_000):
    """Rows whose places are at most ``reach`` from where they belong."""
    order = sorted(range(n), key=lambda row: row + random.Random(row).uniform(0, reach))
    return "".join(line(1000 * row, 512, 1, [row]) for row in order)


def test_a_little_disorder_is_put_in_order(written):
    path = written(shuffled(4000))
    requests = list(iter_trace(path))
    assert [request.at_s for request in requests] == list(range(20_000))
    assert requests == read_trace(path)


def test_much_disorder_is_refused_with_its_line(written):
    path = written(line(0, 512, 1, [0]) + "".join(line(9000, 5, 1, [i]) for i in range(4096)) * 2
                   + line(3000, 512, 1, [0]))  # fmt: skip
    requests = iter_trace(path)
    with pytest.raises(ConfigError, match=r"line 8194: it arrives 6 s before.*sort the file"):
        list(requests)
    assert len(read_trace(path)) == 8194


def test_a_trace_is_read_with_little_memory(tmp_path):
    def peak_bytes(num_rows):
        path = tmp_path / f"{num_rows}.csv"
        start = datetime(2024, 5, 10, tzinfo=UTC)
        with path.open("w") as file:
            file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
            for row in range(num_rows):
                file.write(f"{start + timedelta(milliseconds=22 * row)},{row % 7000 + 1},9\n")
        options = WorkloadOptions(trace=path, rate_scale=2.0, window_s=(1.0, 1e9), cancel_rate=0.1)
        tracemalloc.start()
        try:
            assert sum(1 for _ in build(options).requests) == num_rows - 46
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_bytes(30_000) < 1.2 * peak_bytes(10_000)


def test_an_open_life_waits_for_its_end_and_holds_the_later_ones(written):
    def event(name, request, at_s, **values):
        values = {"event": name, "request_id": request, "at_s": at_s, "detail": values}
        return json.dumps(values) + "\n"

    asked = {"prompt_tokens": 5, "max_tokens": 40}
    text = (
        event("submitted", "a", 1.0, **asked) + event("submitted", "b", 2.0, **asked)
        + event("finished", "b", 3.0, reason="stop", output_tokens=6, choices=1)
        + event("submitted", "b", 4.0, **asked)
        + event("finished", "a", 5.0, reason="stop", output_tokens=7, choices=1)
    )  # fmt: skip
    assert [(r.at_s, r.output_tokens) for r in iter_trace(written(text))] == [
        (0.0, 7), (1.0, 6), (3.0, 40),
    ]  # fmt: skip


# What is known of the published traces: mean input and output, the input's P50, P90 and P99, then
# the percentages of blocks that a cache of so many tokens (inf: all) hits, and of tokens with all.
PUBLISHED = {
    "mooncake_conversation.jsonl": (
        12035, 343, (6909, 27367, 85401),
        {math.inf: 36.6, 3e5: 4.2, 1e6: 5.3, 3e6: 13.6, 10e6: 28.5, 30e6: 35.9, 50e6: 36.4}, 37.4,
    ),
    "mooncake_synthetic.jsonl": (
        15325, 149, None,
        {math.inf: 64.0, 3e5: 4.9, 1e6: 14.0, 3e6: 30.9, 10e6: 56.7, 30e6: 64.0, 50e6: 64.0}, 65.1,
    ),
    "azure_2023_code.csv": (2048, 28, (1469, 5187, 7436), {math.inf: 0}, 0),
    "azure_2023_conv.csv": (1155, 211, (1020, 2734, 4142), {math.inf: 0}, 0),
}  # fmt: skip
# Of our own fixture, counted from the hash ids alone.
OURS = {
    "mooncake_ticks.jsonl": (
        3218, 247, None, {math.inf: 70.35, 4096: 12.56, 8192: 28.98, 16384: 43.22}, 75.93,
    ),
}  # fmt: skip


def test_traces_come_out_as_published(user_data):
    found = {DATA / name: known for name, known in OURS.items()}
    if user_data is not None:
        found |= {user_data / name: known for name, known in PUBLISHED.items()}
    for path, (inputs, outputs, percentiles, hits, tokens) in found.items():
        requests = read_trace(path)
        sizes = sorted(r.prompt_tokens for r in requests)
        assert statistics.fmean(sizes) == pytest.approx(inputs, abs=1)
        assert statistics.fmean(r.output_tokens for r in requests) == pytest.approx(outputs, abs=1)
        if percentiles is not None:
            values = [percentile(sizes, percent) for percent in (50, 90, 99)]
            assert values == pytest.approx(percentiles, rel=0.001, abs=1)
        for capacity_tokens, percent in hits.items():
            reuse = prefix_reuse(requests, capacity_tokens)
            assert reuse.segment_share * 100 == pytest.approx(percent, abs=0.6), capacity_tokens
        everything = prefix_reuse(requests, math.inf)
        assert everything.token_share * 100 == pytest.approx(tokens, abs=0.06)
