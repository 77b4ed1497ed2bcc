"""Trace readers: what they make of a file, what they refuse, that real traces come out right."""

from __future__ import annotations

import io
import json
import math
import os
import random
import statistics
from pathlib import Path

import pytest

from pdserve.core.errors import ConfigError
from pdserve.core.events import LifeEvent, LifeName, detail
from pdserve.core.ids import GATEWAY, Epoch, RequestId
from pdserve.obs import logs
from pdserve.workload.prompts import token_ids
from pdserve.workload.request import Segment
from pdserve.workload.reuse import prefix_reuse
from pdserve.workload.traces import read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,0
2023-11-16 18:15:51.2224670,879,55
"""


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
        (AZURE + "2023-11-16 18:15:52,x,1\n", "line 5"),
        (AZURE + "2023-11-16 18:15:52,1\n", "line 5"),
        (AZURE + "2023-11-16 18:15:52,0,1\n", "at least one token"),
        (AZURE.splitlines()[0], "no request"),
        (line(0, 512, 1, [1]) + line(0, 513, 1, [1]), "line 2.*do not make 513 tokens"),
        (line(0, 512, 1, [1]) + "{}", "line 2"),
        (line(0, 0, 1, []), "line 1"),
        ('{"event": "submitted"}', "line 1"),
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


# What is known of the published traces: mean input and output, then the percentages of blocks that
# a cache of so many tokens (inf: all) hits. PDSERVE_TRACES names a folder with the user's copies.
PUBLISHED = {
    "mooncake_conversation.jsonl": (
        12035, 343,
        {math.inf: 36.6, 3e5: 4.2, 1e6: 5.3, 3e6: 13.6, 10e6: 28.5, 30e6: 35.9, 50e6: 36.4},
    ),
    "mooncake_synthetic.jsonl": (
        15325, 149, {math.inf: 64.0, 3e5: 4.9, 1e6: 14.0, 3e6: 30.9, 10e6: 56.7, 30e6: 64.0},
    ),
    "azure_2023_code.csv": (2048, 28, {math.inf: 0}),
    "azure_2023_conv.csv": (1155, 211, {math.inf: 0}),
}  # fmt: skip


def small_published(folder):
    """Half of the blocks repeat: a prompt is twelve blocks of one of twelve prefixes, then own."""
    rng, new = random.Random(0), iter(range(1000, 10**6))
    lines = []
    for index in range(600):
        prefix = rng.randrange(12)
        ids = [prefix * 12 + i for i in range(12)] + [next(new) for _ in range(12)]
        lines.append(line(index * 1000, 24 * 512 - 255, 343, ids))
    (folder / "small.jsonl").write_text("".join(lines))
    return {"small.jsonl": (12033, 343, {math.inf: 49.0, 1e3: 0.0})}


def test_published_traces_come_out_as_published(tmp_path):
    found = {tmp_path / name: known for name, known in small_published(tmp_path).items()}
    if "PDSERVE_TRACES" in os.environ:
        folder = Path(os.environ["PDSERVE_TRACES"])
        found |= {folder / name: known for name, known in PUBLISHED.items()}
    for path, (inputs, outputs, hits) in found.items():
        requests = read_trace(path)
        assert statistics.fmean(r.prompt_tokens for r in requests) == pytest.approx(inputs, abs=1)
        assert statistics.fmean(r.output_tokens for r in requests) == pytest.approx(outputs, abs=1)
        for capacity_tokens, percent in hits.items():
            reuse = prefix_reuse(requests, capacity_tokens)
            assert reuse.segment_share * 100 == pytest.approx(percent, abs=0.7), capacity_tokens
