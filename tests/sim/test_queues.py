"""One worker that takes one prompt at a time is a queue, of which the books know all.

The requests of a run wait exactly as long as Lindley's recursion says for their arrivals and
service times. That recursion, a million requests long, then takes the noise out of the run's mean:
what a short run of the simulator has above the long average, its own arrivals have too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

SERVICE_S = 0.05
NUM_SIMULATED = 800
NUM_LONG = 5_000_000
TOKENS = 2000
"""Prompt tokens of the mean request: as fine as times can be cut."""


def lindley(gaps_s: np.ndarray, services_s: np.ndarray) -> np.ndarray:
    """How long each request waits: W[n+1] = max(0, W[n] + S[n] - gap[n+1])."""
    steps = np.concatenate(([0.0], services_s[:-1] - gaps_s[1:]))
    walk = np.cumsum(steps)
    return walk - np.minimum.accumulate(walk)


def services(kind: str, rng: np.random.Generator, number: int) -> np.ndarray:
    """Prompt lengths of the requests: all alike, or of an exponential distribution."""
    if kind == "M/D/1":
        return np.full(number, TOKENS)
    return np.maximum(1, np.rint(rng.exponential(TOKENS, number))).astype(int)


def mean_wait_s(kind: str, load: float) -> float:
    """Pollaczek and Khinchine (1930, 1932): load * E[S^2] / (2 E[S] (1 - load))."""
    second_moment = {"M/D/1": 1.0, "M/M/1": 2.0}[kind]
    return load * second_moment * SERVICE_S / (2 * (1 - load))


@pytest.mark.parametrize("kind", ["M/D/1", "M/M/1"])
@pytest.mark.parametrize("load", [0.3, 0.5, 0.7])
def test_a_worker_with_a_batch_of_one_is_the_queue(
    lab: Any, token_timer: Any, kind: str, load: float
) -> None:
    rng = np.random.default_rng(20)
    unit_s = SERVICE_S / TOKENS
    gaps_s = rng.exponential(SERVICE_S / load, NUM_LONG)
    tokens = services(kind, rng, NUM_LONG)
    gaps_s *= tokens.mean() * unit_s / load / gaps_s.mean()  # the load is what it is said to be
    waits_s = lindley(gaps_s, tokens * unit_s)
    arrivals_s = np.cumsum(gaps_s)[:NUM_SIMULATED]
    machine = lab.machine(steps=token_timer(unit_s), num_blocks=1 << 20, max_model_tokens=1 << 20)
    settings = lab.settings("1xm:mixed", machine, max_running=1, max_step_tokens=1 << 20)
    rows = [(float(at_s), int(length), 1) for at_s, length in zip(arrivals_s, tokens, strict=False)]
    run = lab.run(settings, lab.requests(*rows))
    waited_s = np.array(
        [request.ttft_s - request.prompt_tokens * unit_s for request in run.in_order]
    )
    assert len(waited_s) == NUM_SIMULATED
    assert waited_s == pytest.approx(waits_s[:NUM_SIMULATED], abs=1e-9)
    estimate_s = waited_s.mean() - waits_s[:NUM_SIMULATED].mean() + waits_s.mean()
    assert estimate_s == pytest.approx(mean_wait_s(kind, load), rel=0.01)
    assert len(run.all_steps) == NUM_SIMULATED  # one each: nobody shared a step


def test_two_workers_and_one_queue_wait_less_than_two_queues(lab: Any, token_timer: Any) -> None:
    """The router keeps to the shortest queue: between M/D/2 and two M/D/1 of half the load."""
    rng = np.random.default_rng(21)
    unit_s, load, number = SERVICE_S / TOKENS, 0.7, 1200
    arrivals_s = np.cumsum(rng.exponential(SERVICE_S / load / 2, number))
    machine = lab.machine(steps=token_timer(unit_s), num_blocks=1 << 20, max_model_tokens=1 << 20)
    settings = lab.settings("2xm:mixed", machine, max_running=1, max_step_tokens=1 << 20)
    run = lab.run(settings, lab.requests(*[(float(at_s), TOKENS, 1) for at_s in arrivals_s]))
    waited_s = np.array([request.ttft_s - SERVICE_S for request in run.in_order])
    free_s = [0.0, 0.0]
    together = []
    for at_s in arrivals_s:  # one line before two counters
        first = min(range(2), key=free_s.__getitem__)
        begun_s = max(at_s, free_s[first])
        free_s[first] = begun_s + SERVICE_S
        together.append(begun_s - at_s)
    assert waited_s.mean() >= np.mean(together) - 1e-9
    assert waited_s.mean() < mean_wait_s("M/D/1", load)
