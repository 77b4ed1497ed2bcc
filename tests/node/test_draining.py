"""A worker, or the whole server, that is to take no new work."""

from __future__ import annotations

from virtual_cluster import ClusterSpec, VirtualCluster, make_ask

from pdserve.core.effects import Refusal
from pdserve.core.messages import DrainWorker
from pdserve.core.request import RoutePreference

PROMPT = tuple(range(2, 12))


def test_a_draining_worker_finishes_what_it_has_and_takes_nothing_new() -> None:
    cluster = VirtualCluster(ClusterSpec(workers=(0, 0, 2)))
    cluster.run()
    worker = cluster.current["mixed-0"]
    cluster.submit(make_ask("old", PROMPT, max_tokens=8))
    cluster.run(until=lambda: len(cluster.client.answers["old"].tokens[0]) == 2)
    worker.to_worker.append(DrainWorker())
    cluster.run(until=lambda: worker.node.draining)
    cluster.submit(make_ask("new", PROMPT, max_tokens=8))
    cluster.run_for(1)
    assert cluster.client.answers["old"].is_complete
    assert cluster.client.answers["new"].is_complete
    routes = {e.request_id: dict(e.detail)["prefill"] for e in cluster.life if e.name == "routed"}
    assert routes == {"old": "mixed-0", "new": "mixed-1"}


def test_a_worker_that_drains_says_so_before_it_refuses() -> None:
    """It has just reported, and its next report is not due yet: no job may go round meanwhile."""
    cluster = VirtualCluster(ClusterSpec(workers=(0, 0, 2)))
    cluster.run()
    worker = cluster.current["mixed-0"]
    worker.to_worker.append(DrainWorker())
    cluster.submit(make_ask("r", PROMPT))
    cluster.run(hold=lambda event: event.kind == "timer" and event.process is worker)
    assert cluster.client.answers["r"].is_complete
    assert [e.name for e in cluster.life].count("routed") == 2


def test_a_hand_off_to_a_draining_worker_finds_another_one() -> None:
    cluster = VirtualCluster(ClusterSpec(workers=(1, 2, 0)))
    cluster.run()
    prefill, decode = cluster.current["prefill-0"], cluster.current["decode-0"]
    cluster.submit(make_ask("r", PROMPT, route=RoutePreference.SPLIT))
    cluster.run(until=lambda: bool(prefill.links["decode-0", 1].queue(decode)))
    decode.to_worker.append(DrainWorker())
    cluster.run(hold=lambda event: event.kind == "deliver" and event.process is decode)
    cluster.run_for(1)
    assert cluster.client.answers["r"].is_complete
    decoders = [dict(e.detail)["decode"] for e in cluster.life if e.name == "routed"]
    assert decoders == ["decode-0", "decode-1"]


def test_a_draining_server_refuses_what_is_new_and_resumes_what_is_old() -> None:
    cluster = VirtualCluster(ClusterSpec())
    cluster.run()
    cluster.submit(make_ask("old", PROMPT, max_tokens=8))
    cluster.run(until=lambda: len(cluster.client.answers["old"].tokens[0]) == 2)
    cluster.drain()
    cluster.submit(make_ask("new", PROMPT))
    cluster.kill(cluster.current["decode-0"])
    cluster.run_for(3)
    failure = cluster.client.answers["new"].failure
    assert failure is not None
    assert failure.kind == Refusal.DRAINING
    assert cluster.client.answers["old"].is_complete
