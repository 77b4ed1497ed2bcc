"""Runs so small that their times can be written down."""

from __future__ import annotations

from typing import Any

import pytest

from pdserve.core.errors import ConfigError
from pdserve.core.step import StepShape
from pdserve.cost.machine import ClusterTimes, LinkSpec
from pdserve.sim.spec import parse_cluster

PROMPT, OUTPUT = 1000, 50


def decode_s(lab: Any, tokens: int, sequences: int = 1) -> float:
    """A decode step of sequences that have so many tokens each before it."""
    return lab.linear.step_s(StepShape(num_decoding=sequences, context_tokens=sequences * tokens))


def prompt_s(lab: Any, tokens: int) -> float:
    return lab.linear.prefill_s(tokens)


# --- one worker -------------------------------------------------------------------------------


def test_one_request_takes_its_prefill_and_its_decodes(lab: Any) -> None:
    settings = lab.settings("1xm:mixed", lab.machine())
    run = lab.run(settings, lab.requests((3.0, PROMPT, OUTPUT)))
    (request,) = run.in_order
    decodes = [decode_s(lab, PROMPT + number) for number in range(1, OUTPUT)]
    assert request.arrived_s == 3.0
    assert request.ttft_s == pytest.approx(prompt_s(lab, PROMPT), rel=1e-9)
    assert request.second_gap_s == pytest.approx(decodes[0], rel=1e-9)
    assert request.e2e_s == pytest.approx(prompt_s(lab, PROMPT) + sum(decodes), rel=1e-9)
    assert request.tpot_s == pytest.approx(sum(decodes) / (OUTPUT - 1), rel=1e-9)
    assert sum(step.count for step in run.all_steps) == OUTPUT


def test_what_passes_beside_steps_adds_up(lab: Any) -> None:
    times = ClusterTimes(message_s=0.001, edge_in_s=0.02, edge_out_s=0.03, step_gap_s=0.0005)
    settings = lab.settings("1xm:mixed", lab.machine(), times=times)
    run = lab.run(settings, lab.requests((0.0, PROMPT, OUTPUT)))
    (request,) = run.in_order
    around_s = 0.02 + 0.001 + 0.001 + 0.03
    decodes = [0.0005 + decode_s(lab, PROMPT + number) for number in range(1, OUTPUT)]
    first_s = around_s + 0.0005 + prompt_s(lab, PROMPT)
    assert request.ttft_s == pytest.approx(first_s, rel=1e-9)
    assert request.e2e_s == pytest.approx(first_s + sum(decodes), rel=1e-9)


def test_long_prompts_come_in_chunks(lab: Any) -> None:
    settings = lab.settings("1xm:mixed", lab.machine(), max_step_tokens=512)
    run = lab.run(settings, lab.requests((0.0, 1200, 1)))
    (request,) = run.in_order
    steps = [step for step in run.all_steps if step.shape.prompt_tokens]
    assert [step.shape.prompt_tokens for step in steps] == [512, 512, 176]
    linear = lab.linear
    pairs = 1200 * 1200  # the chunks' own share of the square adds up to all of it
    expected_s = 3 * linear.prompt_base_s + 1200 * linear.per_prompt_token_s
    assert request.ttft_s == pytest.approx(expected_s + pairs * linear.per_pair_s, rel=1e-9)


def test_requests_that_decode_together_share_each_step(lab: Any) -> None:
    """Eight that come while another prompt is computed: one step of all prompts, then of eight."""
    number = 8
    settings = lab.settings("1xm:mixed", lab.machine())
    rows = [(0.0, 4000, 1), *[(0.01, PROMPT, OUTPUT)] * number]
    run = lab.run(settings, lab.requests(*rows))
    before, *together = run.in_order
    prompts_s = lab.linear.prompt_s(number * PROMPT, number * PROMPT * PROMPT)
    decodes_s = sum(decode_s(lab, PROMPT + k, number) for k in range(1, OUTPUT))
    for request in together:
        assert request.first_s == pytest.approx(before.last_s + prompts_s, rel=1e-9)
        assert request.last_s - request.first_s == pytest.approx(decodes_s, rel=1e-9)
    assert sum(step.count for step in run.all_steps) == 2 + OUTPUT - 1


# --- one link ---------------------------------------------------------------------------------


def split(lab: Any, cluster: str = "1xm:prefill,1xm:decode", **changes: Any) -> Any:
    link = changes.pop("link", LinkSpec(bytes_per_s=1e8, fixed_s=0.002))
    one_shot = {"one_shot_tokens": 1 << 20}
    return lab.settings(cluster, lab.machine(link=link), **{**one_shot, **changes})


def test_a_transfer_in_one_shot_takes_its_bytes_and_what_is_fixed(lab: Any) -> None:
    run = lab.run(split(lab), lab.requests((0.0, PROMPT, OUTPUT)))
    (request,) = run.in_order
    (sent,) = run.transfers
    assert sent.num_bytes == PROMPT * 1024
    assert (sent.sender, sent.receiver) == ("prefill-0", "decode-0")
    transfer_s = PROMPT * 1024 / 1e8 + 0.002
    assert sent.ended_s == pytest.approx(prompt_s(lab, PROMPT) + transfer_s, rel=1e-9)
    assert request.second_gap_s == pytest.approx(transfer_s + decode_s(lab, PROMPT + 1), rel=1e-9)


def test_a_transfer_by_layers_hides_behind_the_prefill(lab: Any) -> None:
    """Fast link: the last layer is left when the prefill ends. Slow link: all but what went before,
    from the end of the first layer on."""
    layers, num_bytes, prefill_s = 8, PROMPT * 1024, prompt_s(lab, PROMPT)
    for rate, exposed_s in (
        (1e9, num_bytes / layers / 1e9),
        (2e7, num_bytes / 2e7 - prefill_s * (layers - 1) / layers),
    ):
        link = LinkSpec(bytes_per_s=rate)
        settings = split(lab, link=link, one_shot_tokens=0)
        run = lab.run(settings, lab.requests((0.0, PROMPT, OUTPUT)))
        (request,) = run.in_order
        expected_s = exposed_s + decode_s(lab, PROMPT + 1)
        assert request.second_gap_s == pytest.approx(expected_s, rel=1e-6)


@pytest.mark.parametrize(("shared", "slower"), [(True, 2.0), (False, 1.0)])
def test_two_transfers_into_one_worker_share_its_link(
    lab: Any, shared: bool, slower: float
) -> None:
    link = LinkSpec(bytes_per_s=1e8, shared=shared)
    settings = split(lab, "2xm:prefill,1xm:decode", link=link)
    run = lab.run(settings, lab.requests((0.0, PROMPT, 2), (0.0, PROMPT, 2)))
    assert {sent.sender for sent in run.transfers} == {"prefill-0", "prefill-1"}
    for sent in run.transfers:
        begun_s = prompt_s(lab, PROMPT)
        assert sent.ended_s - begun_s == pytest.approx(slower * PROMPT * 1024 / 1e8, rel=1e-9)


def test_a_transfer_that_comes_later_takes_half_from_then_on(lab: Any) -> None:
    """The first has sent half of its bytes when the second begins."""
    whole_s = PROMPT * 1024 / 1e8
    link = LinkSpec(bytes_per_s=1e8)
    settings = split(lab, "2xm:prefill,1xm:decode", link=link)
    run = lab.run(settings, lab.requests((0.0, PROMPT, 2), (whole_s / 2, PROMPT, 2)))
    begun_s = prompt_s(lab, PROMPT)
    first, second = sorted(sent.ended_s - begun_s for sent in run.transfers)
    assert first == pytest.approx(whole_s * 1.5, rel=1e-9)
    assert second == pytest.approx(whole_s * 2.0, rel=1e-9)


# --- what cannot be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("4xm:prefill", "no worker that could decode"),
        ("4xm:decode", "no worker that could prefill"),
        ("0xm:mixed", "a cluster needs a worker"),
        ("m:mixed", "COUNTxHARDWARE:ROLE"),
        ("2xm:writer", "roles are prefill, decode and mixed"),
    ],
)
def test_a_cluster_that_cannot_serve_is_refused(spec: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_cluster(spec)


def test_a_request_that_no_worker_can_hold_is_refused_and_the_others_are_served(lab: Any) -> None:
    settings = lab.settings("1xm:mixed", lab.machine(num_blocks=64, max_model_tokens=1024))
    run = lab.run(settings, lab.requests((0.0, 4000, 10), (0.0, 500, 10)))
    refused, served = run.in_order
    assert refused.failure == "too_long"
    assert (served.failure, served.output_tokens) == (None, 10)
