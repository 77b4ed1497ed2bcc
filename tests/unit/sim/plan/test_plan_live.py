"""Plans for a running server, out of what it says of itself."""

from __future__ import annotations

import argparse
import json

import pytest

from pdserve.core.errors import ConfigError, UnavailableError
from pdserve.core.request import Role
from pdserve.sim.plan.arguments import PlanOptions, add_arguments
from pdserve.sim.plan.command import run
from pdserve.sim.plan.live import Recorded, live_problem
from pdserve.sim.plan.windows import ALWAYS

STEPS = {
    "prompt_base_s": 0.005,
    "per_prompt_token_s": 1e-4,
    "per_pair_s": 0.0,
    "decode_base_s": 0.01,
    "per_sequence_s": 5e-4,
    "per_context_token_s": 0.0,
}


def a_worker(name, role, **changes):
    row = {
        "id": name,
        "role": role,
        "device": "cpu x2",
        "engine": "torch",
        "num_layers": 4,
        "block_size": 16,
        "token_kv_bytes": 1024,
        "num_blocks": 4000,
        "steps": STEPS,
        "error": 0.08,
        "num_steps": 900,
    }
    return row | changes


def recorded(num=120, workers=None, **changes):
    """Two requests a second; a third of them found 64 tokens in a cache; one in ten failed."""
    requests = [
        {
            "at_s": 1000 + number / 2,
            "prompt_tokens": 300 + number % 7 * 40,
            "cached_tokens": 64 if number % 3 == 0 else 0,
            "output_tokens": 20,
            "failure": "overloaded" if number % 10 == 9 else None,
        }
        for number in range(num)
    ]
    split = [a_worker("prefill-0", "prefill"), a_worker("decode-0", "decode")]
    traffic = {
        "model": "tiny",
        "max_model_tokens": 2048,
        "policy": "splitwise",
        "workers": split if workers is None else workers,
        "link": {"fixed_s": 0.001, "per_byte_s": 1e-9, "error": 0.2},
        "requests": requests,
    }
    return Recorded({}, traffic | changes)


def typed(*flags):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    always = ["--live", "http://there", "--slo", "ttft:400", "tpot:60", "--policies", "splitwise"]
    return parser.parse_args([*always, "--windows", "2", "--window-s", "2", *flags])


def options(*flags):
    return PlanOptions.of(typed(*flags))


def test_the_problem_is_the_servers_own():
    problem = live_problem(options(), recorded())
    assert problem.goal.budget == 2.0
    assert problem.unit == "workers"
    assert str(problem.present) == "1xcpu-x2-torch:prefill,1xcpu-x2-torch:decode (splitwise)"
    machine = problem.machines[("cpu-x2-torch", Role.DECODE)]
    assert machine.steps.step_s.__self__.decode_base_s == 0.01
    assert (machine.link.bytes_per_s, machine.link.fixed_s) == (pytest.approx(1e9), 0.001)
    assert problem.errors == {"cpu-x2-torch": 0.08}
    lengths = {len(request.segments) for request in problem.windows.requests[0]}
    assert lengths == {1, 2}
    cached = [r for r in problem.windows.requests[0] if len(r.segments) == 2]
    assert {(r.segments[0].name, r.segments[0].num_tokens) for r in cached} == {(ALWAYS, 64)}


def test_a_plan_for_a_server_compares_with_its_layout(capsys):
    quick = ("--no-changes", "--no-progress", "--precision", "0.2", "--json", "-")
    assert run(typed(*quick), lambda url, key: recorded()) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["winner"]["cost"] == 2.0
    assert whole["present"]["rate_rps"] > 0
    assert whole["winner"]["rate_rps"] >= whole["present"]["rate_rps"] * 0.8
    assert any("The present layout" in line for line in whole["answer"])


def test_mixed_workers_of_two_kinds_are_no_layout_of_a_plan():
    workers = [a_worker("mixed-0", "mixed"), a_worker("mixed-1", "mixed", device="cuda x1")]
    problem = live_problem(
        options("--price", "cpu-x2-torch=1,cuda-x1-torch=4"), recorded(workers=workers)
    )
    assert problem.present is None
    assert problem.goal.budget == 5.0
    assert any("present layout" in note for note in problem.notes)
    assert len(problem.designs) == 4 + 2


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"workers": []}, ConfigError, "no worker"),
        ({"num": 12}, ConfigError, "remembers 11 requests"),
        ({"requests": [{"at_s": 1}]}, UnavailableError, "no known way"),
        ({"workers": [a_worker("w", "mixed", block_size=0)]}, ConfigError, "batches for itself"),
    ],
)
def test_what_says_too_little_is_refused(changes, error, said):
    with pytest.raises(error, match=said):
        live_problem(options(), recorded(**changes))


def test_guessed_times_are_named():
    workers = [a_worker("mixed-0", "mixed", num_steps=3, error=None)]
    problem = live_problem(options(), recorded(workers=workers))
    assert any("mostly guessed" in note for note in problem.notes)
    assert problem.errors == {"cpu-x2-torch": 0.15}
