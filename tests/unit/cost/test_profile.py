"""Profiles as text: the same again, or refused as a whole with the place that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pdserve.core.errors import ConfigError
from pdserve.core.request import Role
from pdserve.core.step import StepShape
from pdserve.cost.machine import ClusterTimes, LinkSpec, StepRange
from pdserve.cost.measured import Bends, Kind
from pdserve.cost.measured_fit import FitError
from pdserve.cost.pace import LEVELS, Gap, Lost, Spread
from pdserve.cost.profile import (
    Host,
    LinkFit,
    Machine,
    Profile,
    from_text,
    machine_from_profile,
    to_text,
)
from pdserve.cost.step import StepModel

EVEN = Spread(quantiles=tuple(0.9 + 0.2 * level for level in LEVELS), memory=0.25)
LINEAR = StepModel(
    prompt_base_s=2e-3,
    per_prompt_token_s=1e-4,
    per_pair_s=1e-8,
    decode_base_s=5e-3,
    per_sequence_s=2e-4,
    per_context_token_s=5e-7,
)


def a_machine(*roles: Role, base_s: float = 5e-3) -> Machine:
    return Machine(
        roles=roles,
        device="cpu",
        engine="torch",
        numerics="class a",
        threads=1,
        num_layers=30,
        token_kv_bytes=23040,
        block_size=16,
        num_blocks=2912,
        max_model_tokens=8192,
        prompt=Kind(base_s=2e-3, size=Bends((64.0,), (1e-4, 2e-4)), per_second_s=1e-8),
        decode=Kind(base_s=base_s, size=Bends((), (2e-4,)), per_second_s=5e-7),
        mixed=Kind(base_s=1e-3, size=Bends((), (0.9,)), per_sequence_s=1e-4),
        linear=LINEAR,
        measured=StepRange(prompt_tokens=2048, num_decoding=32, context_tokens=9000),
        errors={"decode": FitError(num_steps=300, median=0.02, p90=0.06)},
        spreads={"prompt": EVEN, "decode": EVEN},
        lost={"decode": Lost(beside_prompt=0.2, per_message_s=7e-4)},
        gaps={"prompt": Gap(alone_s=1e-3, beside_s=2e-3)},
    )


def a_profile(*machines: Machine, link: LinkFit | None = None) -> Profile:
    return Profile(
        name="here",
        made="2026-11-23",
        model="smollm2-135m",
        host=Host(cpu="some CPU", num_cores=2, pinning="cores 0,1"),
        flags=("--prefill", "1"),
        workers={"prefill": 1, "decode": 1},
        machines=machines or (a_machine(Role.PREFILL, Role.DECODE),),
        link=link,
        times=ClusterTimes(message_s=8e-4, step_gap_s=1e-3),
    )


LINK = LinkFit(spec=LinkSpec(bytes_per_s=2e8, fixed_s=1e-3), num_transfers=40, error_s=1e-4)


def test_what_is_written_is_read_again() -> None:
    for profile in (a_profile(), a_profile(link=LINK)):
        assert from_text(to_text(profile)) == profile


def test_a_field_that_has_a_default_may_be_missing() -> None:
    document = json.loads(to_text(a_profile()))
    del document["times"]["verify_s"], document["warnings"]
    assert from_text(json.dumps(document)) == a_profile()


def test_a_profile_of_before_gaps_and_messages_were_told_apart_can_be_used() -> None:
    document = json.loads(to_text(a_profile()))
    (machine,) = document["machines"]
    del machine["gaps"], machine["lost"]["decode"]["per_message_s"]
    profile = from_text(json.dumps(document))
    pace = machine_from_profile(profile).pace
    assert pace is not None
    assert not pace.gaps
    assert pace.lost["decode"] == Lost(beside_prompt=0.2)


Change = Callable[[dict[str, Any]], object]
BROKEN: dict[str, Change] = {
    "is not a profile": lambda d: d.update(kind="fit"),
    "format": lambda d: d.update(format=99),
    "name is missing": lambda d: d.pop("name"),
    "host.color is unknown": lambda d: d["host"].update(color="red"),
    r"machines\[0\].threads is 1.5": lambda d: d["machines"][0].update(threads=1.5),
    r"machines\[0\].prompt.base_s is -1": lambda d: d["machines"][0]["prompt"].update(base_s=-1),
    r"machines\[0\].decode.base_s is 'x'": lambda d: d["machines"][0]["decode"].update(base_s="x"),
    "rising knots": lambda d: d["machines"][0]["prompt"]["size"].update(knots=[64.0, 3.0]),
    "quantiles": lambda d: d["machines"][0]["spreads"]["decode"].update(quantiles=[1.0]),
    "memory": lambda d: d["machines"][0]["spreads"]["decode"].update(memory=1.0),
    "kinds of steps": lambda d: d["machines"][0]["lost"].update(other={}),
    "holds no machine": lambda d: d.update(machines=[]),
    "no role": lambda d: d["workers"].update(router=1),
    r"machines is not a list": lambda d: d.update(machines={}),
    "num_blocks is not above 0": lambda d: d["machines"][0].update(num_blocks=0),
    r"roles\[0\] is 'boss'": lambda d: d["machines"][0].update(roles=["boss"]),
    "bytes_per_s": lambda d: d["link"]["spec"].update(bytes_per_s=0.0),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_what_is_broken_is_refused_with_its_place(reason: str) -> None:
    document = json.loads(to_text(a_profile(link=LINK)))
    BROKEN[reason](document)
    with pytest.raises(ConfigError, match=f"p.json cannot be used: .*{reason}.*calibrate"):
        from_text(json.dumps(document), "p.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"kind": "profile"}', '{"a": NaN}'])
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        from_text(text)


def test_numbers_that_are_none_are_refused() -> None:
    text = to_text(a_profile()).replace('"message_s": 0.0008', '"message_s": Infinity')
    with pytest.raises(ConfigError, match=r"times.message_s is inf"):
        from_text(text)


def test_a_machine_has_the_live_pool_the_fits_and_the_pace() -> None:
    machine = machine_from_profile(a_profile(link=LINK), Role.DECODE)
    assert (machine.num_blocks, machine.block_size, machine.token_kv_bytes) == (2912, 16, 23040)
    assert machine.steps.step_s(StepShape(0, 0, 10, 1000)) == pytest.approx(7.5e-3)
    assert machine.steps.step_s(StepShape(128, 128**2)) == pytest.approx(2e-3 + 19.2e-3 + 1.6384e-4)
    assert machine.error == pytest.approx(0.02)
    assert machine.link == LINK.spec
    assert machine.pace is not None
    assert machine.pace.per_host == {Role.PREFILL: 1, Role.DECODE: 1}
    assert machine.pace.lost["decode"].beside("mixed") == 0.2
    assert machine.pace.lost["decode"].beside("decode") == 0.0


def test_each_role_has_the_machine_that_was_measured_of_it() -> None:
    slow = a_machine(Role.DECODE, base_s=1.0)
    profile = a_profile(a_machine(Role.PREFILL), slow, link=LINK)
    assert profile.machine(Role.DECODE) is slow
    assert profile.machine(Role.MIXED) is profile.machines[0]


def test_who_hands_over_needs_a_link() -> None:
    with pytest.raises(ConfigError, match="knows no link"):
        machine_from_profile(a_profile(), Role.PREFILL)
    assert machine_from_profile(a_profile(), Role.PREFILL, LINK.spec).link == LINK.spec
    machine_from_profile(a_profile(), Role.MIXED)
