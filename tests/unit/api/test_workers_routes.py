"""Roles and drains over HTTP."""

from __future__ import annotations

import pytest

from pdserve.core.commands import ChangeRole, DrainOne, UndrainOne
from pdserve.core.ids import WorkerId
from pdserve.core.request import Role

pytestmark = pytest.mark.anyio
WORKER = WorkerId("fake-0")
PLACE = f"/cluster/workers/{WORKER}"


async def test_each_route_is_a_command(client_of, gateway):
    async with client_of(gateway) as client:
        role = await client.post(f"{PLACE}/role", json={"role": "prefill", "epoch": 0})
        drain = await client.post(f"{PLACE}/drain", json={"restart": True})
        undrain = await client.post(f"{PLACE}/undrain", json={})
    assert role.json() == {"worker": WORKER, "role": "prefill", "detail": "done"}
    assert drain.json() == undrain.json() == {"worker": WORKER, "detail": "done"}
    assert gateway.commands == [
        ChangeRole(command=0, worker=WORKER, role=Role.PREFILL, expected_epoch=0),
        DrainOne(command=0, worker=WORKER, restart=True),
        UndrainOne(command=0, worker=WORKER),
    ]


async def test_an_unknown_worker_is_404_and_a_stale_epoch_409(client_of, gateway):
    async with client_of(gateway) as client:
        unknown = await client.post("/cluster/workers/nobody/drain", json={})
        stale = await client.post(f"{PLACE}/role", json={"role": "mixed", "epoch": 3})
    assert (unknown.status_code, stale.status_code) == (404, 409)
    assert unknown.json()["error"]["param"] == "worker"
    assert "role epoch" in stale.json()["error"]["message"]


@pytest.mark.parametrize("body", [{"role": "writer"}, {}, {"role": "mixed", "when": "now"}])
async def test_a_wrong_body_is_400_and_changes_nothing(client_of, gateway, body):
    async with client_of(gateway) as client:
        response = await client.post(f"{PLACE}/role", json=body)
    assert response.status_code == 400
    assert gateway.commands == []
