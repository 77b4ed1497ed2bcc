"""Faults over HTTP: only where they are allowed, and only what makes sense."""

from __future__ import annotations

from typing import Any

import pytest

from pdserve.core.errors import NotFoundError

pytestmark = pytest.mark.anyio
PAIR = ["decode-0", "prefill-0"]


class Hooks:
    """Writes down what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def disturb(self, pairs, factor, for_s):
        if any("nobody" in pair for pair in pairs):
            raise NotFoundError("no worker is called nobody", "worker")
        self.asked.append((pairs, factor, for_s))

    def hold(self, worker, for_s):
        self.asked.append((worker, for_s))

    def heal(self):
        self.asked.append("heal")

    def shown(self):
        return [{"between": PAIR, "factor": None}]


async def test_a_server_takes_no_faults_unless_it_was_started_so(client_of, gateway):
    async with client_of(gateway) as client:
        answers = [
            await client.post("/cluster/faults/links", json={"pairs": [PAIR]}),
            await client.post("/cluster/faults/holds", json={"worker": "decode-0"}),
            await client.delete("/cluster/faults"),
        ]
    assert [answer.status_code for answer in answers] == [409] * 3
    assert "--allow-faults" in answers[0].json()["error"]["message"]


async def test_each_route_does_what_it_says(client_of, gateway):
    gateway.faults = hooks = Hooks()
    slow = {"pairs": [PAIR, ["a", "b"]], "factor": 4, "for_s": 2.5}
    async with client_of(gateway) as client:
        cut = await client.post("/cluster/faults/links", json={"pairs": [PAIR]})
        await client.post("/cluster/faults/links", json=slow)
        held = await client.post("/cluster/faults/holds", json={"worker": "a", "for_s": 0})
        await client.post("/cluster/faults/holds", json={"worker": "a"})
        healed = await client.delete("/cluster/faults")
    assert hooks.asked == [
        ([tuple(PAIR)], None, None),
        ([tuple(PAIR), ("a", "b")], 4.0, 2.5),
        ("a", 0.0),
        ("a", None),
        "heal",
    ]
    assert cut.json() == healed.json() == {"faults": [{"between": PAIR, "factor": None}]}
    assert held.json() == {"worker": "a", "for_s": 0.0}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"pairs": [["a"]]},
        {"pairs": [PAIR], "factor": 1},
        {"pairs": [PAIR], "for_s": 0},
        {"pairs": [PAIR], "speed": 3},
    ],
)
async def test_a_wrong_body_is_400_and_does_nothing(client_of, gateway, body):
    gateway.faults = hooks = Hooks()
    async with client_of(gateway) as client:
        answer = await client.post("/cluster/faults/links", json=body)
    assert answer.status_code == 400
    assert hooks.asked == []


async def test_an_unknown_worker_is_404(client_of, gateway):
    gateway.faults = Hooks()
    async with client_of(gateway) as client:
        answer = await client.post("/cluster/faults/links", json={"pairs": [["a", "nobody"]]})
    assert answer.status_code == 404
