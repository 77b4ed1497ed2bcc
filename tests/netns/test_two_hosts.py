"""Two hosts and a network that is slow, lossy, cut and healed; hosts that vanish and come back."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

pytestmark = pytest.mark.netns


def at_rest(cluster: Any) -> None:
    """No block is held or in quarantine anywhere."""
    for name in ("prefill-0", "far"):
        blocks = cluster.worker(name)["blocks"]
        if blocks is not None:
            assert (blocks["quarantined"], blocks["free"]) == (0, blocks["total"])


def test_the_same_tokens_over_a_network_with_delay_and_loss(cluster: Any) -> None:
    expected = [cluster.ask(seed=seed)["choices"][0]["text"] for seed in range(3)]
    cluster.network.delay_s, cluster.network.loss = 0.01, 0.02
    lost_before = cluster.network.num_lost
    for seed in range(3):
        answer = cluster.ask(seed=seed)
        assert answer["choices"][0]["text"] == expected[seed]
    fresh = cluster.ask(words=400, seed=9)
    assert cluster.attempts(fresh)[-1]["decode_worker"] == "far"
    assert cluster.network.num_lost > lost_before


def test_a_network_that_is_cut_in_mid_transfer_costs_a_pause_and_no_token(cluster: Any) -> None:
    expected = cluster.ask(words=900, max_tokens=60, seed=3)["choices"][0]["text"]
    cluster.network.delay_s = 0.02
    answers: list[Any] = []
    asking = threading.Thread(
        target=lambda: answers.append(cluster.ask(words=900, max_tokens=60, seed=3))
    )
    before = cluster.network.num_packets
    asking.start()
    while cluster.network.num_packets < before + 40:
        asking.join(0.002)
    cluster.network.is_cut = True
    asking.join(60)
    assert answers[0]["choices"][0]["text"] == expected
    cluster.until(lambda worker: worker["state"] == "down")
    cluster.network.is_cut = False
    cluster.until(lambda worker: worker["state"] == "ready" and worker["epoch"] > 1)
    again = cluster.ask(words=900, max_tokens=60, seed=4)
    assert cluster.attempts(again)[-1]["decode_worker"] == "far"
    cluster.until(lambda worker: worker["blocks"]["quarantined"] == 0)
    at_rest(cluster)


def test_a_short_cut_is_bridged(cluster: Any) -> None:
    """Shorter than anything that counts it as broken: TCP sends again, and nobody notices."""
    expected = cluster.ask(seed=5)["choices"][0]["text"]
    cluster.network.is_cut = True
    healing = threading.Timer(0.4, lambda: setattr(cluster.network, "is_cut", False))
    healing.start()
    answer = cluster.ask(seed=5)
    healing.join()
    assert answer["choices"][0]["text"] == expected
    assert cluster.worker()["epoch"] == 1


def test_a_host_that_vanishes_and_is_rebooted_comes_back_with_a_newer_epoch(cluster: Any) -> None:
    """Its processes die without a word on the network, as with a power cut: no FIN gets out."""
    expected = cluster.ask(seed=6)["choices"][0]["text"]
    pid = cluster.worker()["pid"]
    cluster.network.is_cut = True
    os.kill(pid, signal.SIGKILL)
    cluster.host.kill()
    cluster.host.wait()
    answer = cluster.ask(seed=6)
    assert answer["choices"][0]["text"] == expected
    cluster.network.is_cut = False
    cluster.join()
    cluster.until(lambda worker: worker["state"] == "ready" and worker["epoch"] == 2)
    again = cluster.ask(words=300, seed=8)
    assert cluster.attempts(again)[-1]["decode_worker"] == "far"
    at_rest(cluster)


def test_a_host_behind_a_long_cut_is_fenced_and_joins_anew(cluster: Any) -> None:
    """It lives all the while, and what it does meanwhile counts for nothing."""
    pid = cluster.worker()["pid"]
    cluster.network.is_cut = True
    cluster.until(lambda worker: worker["state"] == "down")
    cluster.network.is_cut = False
    cluster.until(lambda worker: worker["state"] == "ready" and worker["epoch"] > 1)
    assert cluster.worker()["pid"] != pid
    answer = cluster.ask(words=300, seed=11)
    assert cluster.attempts(answer)[-1]["decode_worker"] == "far"
