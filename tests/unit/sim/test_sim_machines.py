"""Which machine a group of a cluster gets: of data sheets, of a table, of a calibration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.core.errors import ConfigError
from pdserve.core.request import Role
from pdserve.core.step import StepShape
from pdserve.cost.links import LINKS
from pdserve.cost.machine import ClusterTimes, LinkSpec, StepRange
from pdserve.cost.measured import Bends, Kind
from pdserve.cost.measured_fit import FitError
from pdserve.cost.profile import Host, LinkFit, Machine, Profile, to_text
from pdserve.cost.step import StepModel
from pdserve.sim.machines import MachineOptions, Machines
from pdserve.sim.spec import parse_cluster

LINEAR = StepModel(
    prompt_base_s=2e-3,
    per_prompt_token_s=1e-4,
    per_pair_s=0.0,
    decode_base_s=5e-3,
    per_sequence_s=2e-4,
    per_context_token_s=0.0,
)
CALIBRATED = Profile(
    name="here",
    made="2026-11-23",
    model="smollm2-135m",
    host=Host(cpu="some CPU", num_cores=2, pinning="cores 0,1"),
    flags=(),
    workers={"prefill": 1, "decode": 1},
    machines=(
        Machine(
            roles=(Role.PREFILL, Role.DECODE),
            device="cpu",
            engine="torch",
            numerics="class a",
            threads=1,
            num_layers=30,
            token_kv_bytes=23040,
            block_size=16,
            num_blocks=500,
            max_model_tokens=8192,
            prompt=Kind(base_s=2e-3, size=Bends((), (1e-4,))),
            decode=Kind(base_s=5e-3, size=Bends((), (2e-4,))),
            mixed=None,
            linear=LINEAR,
            measured=StepRange(prompt_tokens=2048, num_decoding=32, context_tokens=9000),
            errors={"decode": FitError(num_steps=300, median=0.02, p90=0.06)},
            spreads={},
            lost={},
        ),
    ),
    link=LinkFit(spec=LinkSpec(bytes_per_s=2e8), num_transfers=40, error_s=1e-4),
    times=ClusterTimes(message_s=8e-4),
)
COLUMNS = "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel"


@pytest.fixture
def profile(tmp_path: Path) -> str:
    file = tmp_path / "here.json"
    file.write_text(to_text(CALIBRATED))
    return str(file)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Prompts of 512, 1 to 4 together, and two longer ones; times in ms."""
    runs = [(512, 1, 90, 28), (512, 2, 160, 29), (512, 4, 310, 30), (1024, 1, 170, 28)]
    rows = [f"bloom-176b,h100-80gb,{p},{b},128,{first},{rest},8" for p, b, first, rest in runs]
    file = tmp_path / "table.csv"
    file.write_text("\n".join([COLUMNS, *rows, ""]))
    return file


def test_workers_as_they_were_measured(profile):
    machines = Machines(MachineOptions(profile=profile))
    assert machines.model == "smollm2-135m"
    assert machines.block_size == 16
    assert machines.times.message_s == 8e-4
    cluster = parse_cluster("1xhere:prefill,2xhere:decode@shm")
    prefill, decode = machines.of(cluster, 16)
    assert prefill.num_blocks == 500
    assert prefill.steps.step_s(StepShape(100, 100 * 100)) == pytest.approx(0.012)
    assert prefill.link.bytes_per_s == 2e8
    assert decode.link == LINKS["shm"].of_worker(1)


def test_a_table_by_its_two_readings(table):
    cluster = parse_cluster("1xh100:mixed,1xh100:mixed@ib-200")
    options = MachineOptions(model="bloom-176b", profile="table", perf_table=table)
    measured = Machines(options)
    own, other = measured.of(cluster, 16)
    assert measured.imitated is None
    assert own.measured is not None
    assert other.link == LINKS["ib-200"].of_worker(8)
    theirs = Machines(replace(options, profile="splitwisesim"))
    assert theirs.imitated is not None
    long = StepShape(num_decoding=1, context_tokens=100_000)
    short = StepShape(num_decoding=1, context_tokens=1)
    [imitated, _] = theirs.of(cluster, 16)
    assert imitated.steps.step_s(long) == imitated.steps.step_s(short), "context costs nothing"


def test_data_sheets_where_nothing_else_is_said():
    machines = Machines(MachineOptions(model="llama-3-8b", link="eth-25"))
    assert (machines.block_size, machines.imitated) == (None, None)
    [one, two] = machines.of(parse_cluster("1xh100-tp2:prefill,1xh100:decode@ib-400"), 32)
    assert one.measured is None
    assert one.block_size == 32
    assert one.link == LINKS["eth-25"].of_worker(2)
    assert two.link == LINKS["ib-400"].of_worker(1)


@pytest.mark.parametrize(
    ("model", "cluster", "block_size", "said"),
    [
        ("llama-3-8b", "1xhere:mixed", 16, "leave out --model, or calibrate with that model"),
        ("", "1xh100:mixed", 16, "the cluster has none of it: write it as 1xhere:prefill"),
        ("", "1xhere:mixed", 32, "was measured with 16: leave it out"),
        ("", "1xhere:mixed@string", 16, "there is no link 'string'"),
    ],
)
def test_what_a_profile_is_not_of_is_refused(model, cluster, block_size, said, profile):
    with pytest.raises(ConfigError, match=said):
        Machines(MachineOptions(model=model, profile=profile)).of(
            parse_cluster(cluster), block_size
        )
