"""The roofline: its arithmetic by hand, what must hold for any step, and others' measurements."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.errors import ConfigError
from pdserve.core.step import StepShape
from pdserve.cost.hardware import HARDWARE, Hardware
from pdserve.cost.machine import StepTimer, decode_times
from pdserve.cost.models import MODELS
from pdserve.cost.roofline import Room, check_slo, machine_of, slo_floor
from pdserve.cost.roofline_timer import RUNTIMES, UNHIDDEN, UNMET, RooflineTimer, Runtime
from pdserve.cost.shape import ModelShape
from pdserve.cost.step import StepModel

SMALL = ModelShape(
    num_layers=1,
    hidden_size=10,
    intermediate_size=20,
    num_heads=2,
    num_kv_heads=1,
    head_dim=5,
    vocab_size=100,
)
LAYER_WEIGHTS = 10 * 5 * (2 * 2 + 2 * 1) + 3 * 10 * 20
BARE = Runtime(
    prompt_launch_s=0.0,
    decode_launch_s=0.0,
    sequence_s=0.0,
    step_s=0.0,
    reduce_s=0.0,
    attention_share=1.0,
    kv_share=1.0,
    source="",
)
DEVICE = Hardware(
    flops=1e6,
    bytes_per_s=1e6,
    memory_bytes=1e9,
    compute_share=0.5,
    memory_share=0.25,
    peer_bytes_per_s=1e6,
    peer_share=0.5,
    network="eth-25",
    tdp_w=1.0,
    idle_w=0.0,
    host_w=0.0,
    price_per_hour=0.0,
)
NAMES = ("a100", "h100", "h100cap", "h200", "b200", "l40s", "mi300x", "cpu-server")


def test_a_prompt_is_its_arithmetic() -> None:
    timer = RooflineTimer(SMALL, DEVICE, 1, BARE)
    products_s = (2 * LAYER_WEIGHTS * 50 + 2 * 1000) / 5e5
    weights_s = (LAYER_WEIGHTS + 1000) * 2 / 2.5e5
    attention_s = 4 * 2 * 5 * (50 * 50 / 2) / 5e5
    expected = products_s + UNHIDDEN * weights_s + attention_s
    assert timer.step_s(StepShape(50, 2500)) == pytest.approx(expected)


def test_decoding_is_its_reading() -> None:
    timer = RooflineTimer(SMALL, DEVICE, 1, BARE)
    products_s = 2 * (LAYER_WEIGHTS + 1000) / 5e5
    weights_s = (LAYER_WEIGHTS + 1000) * 2 / 2.5e5
    reads_s = 30 * (2 * 5 * 2) / 2.5e5
    expected = weights_s + UNHIDDEN * products_s + reads_s
    assert timer.step_s(StepShape(0, 0, 1, 30)) == pytest.approx(expected)


def test_devices_share_the_work_and_add_up_their_parts() -> None:
    one, two = (RooflineTimer(SMALL, DEVICE, num, BARE) for num in (1, 2))
    shape = StepShape(50, 2500)
    all_reduce_s = 2 * 50 * 10 * 2 / 5e5
    assert two.step_s(shape) == pytest.approx(one.step_s(shape) / 2 + all_reduce_s)
    decode = StepShape(0, 0, 1, 30)
    reads_s = 30 * (2 * 5 * 2) / 2.5e5
    reduced_s = 2 * 10 * 2 / 5e5
    without_s = one.step_s(decode) - reads_s
    # There is one KV head: both devices read all of its KV.
    assert two.step_s(decode) == pytest.approx(without_s / 2 + reads_s + reduced_s)


def test_a_host_that_launches_for_longer_is_what_a_step_takes() -> None:
    slow = Runtime(
        prompt_launch_s=2.0,
        decode_launch_s=1.0,
        sequence_s=0.5,
        step_s=0.25,
        reduce_s=0.0,
        attention_share=1.0,
        kv_share=1.0,
        source="",
    )
    bare, timer = (RooflineTimer(SMALL, DEVICE, 1, runtime) for runtime in (BARE, slow))
    decode = StepShape(0, 0, 4, 8)
    assert timer.step_s(decode) == pytest.approx(0.25 + 3.0 + UNMET * bare.step_s(decode))
    assert timer.step_s(StepShape(1, 1)) == pytest.approx(
        0.25 + 2.0 + UNMET * bare.step_s(StepShape(1, 1))
    )


steps = st.tuples(
    st.integers(0, 20_000), st.integers(0, 10**8), st.integers(0, 512), st.integers(0, 10**6)
)
timers = st.builds(
    lambda hardware, model, tp, runtime: RooflineTimer(
        MODELS[model].shape, HARDWARE[hardware], tp, RUNTIMES[runtime]
    ),
    st.sampled_from(NAMES[:-1]),
    st.sampled_from(sorted(MODELS)),
    st.sampled_from((1, 2, 4, 8)),
    st.sampled_from(sorted(RUNTIMES)),
)


@given(timers, steps, steps)
def test_no_step_gets_faster_by_more_work(
    timer: RooflineTimer, less: tuple[int, ...], more: tuple[int, ...]
) -> None:
    added = tuple(a + b for a, b in zip(less, more, strict=True))
    for other in (added, (added[0], *less[1:])):
        smaller, larger = StepShape(*less), StepShape(*other)
        if smaller.prompt_tokens == 0 < larger.prompt_tokens and not smaller.num_decoding:
            continue  # an empty step
        assert timer.step_s(larger) >= timer.step_s(smaller) * (1 - 1e-12)


@given(timers, st.integers(1, 200), st.integers(0, 200_000), st.integers(1, 60))
def test_decode_steps_take_the_same_all_at_once(
    timer: RooflineTimer, number: int, length: int, count: int
) -> None:
    lengths = range(length, length + count * number, number)
    alone = [timer.step_s(StepShape(num_decoding=number, context_tokens=each)) for each in lengths]
    assert timer.decodes_s(number, lengths) == decode_times(timer)(number, lengths) == alone
    linear = StepModel(
        prompt_base_s=0.0, per_prompt_token_s=0.0, per_pair_s=0.0,
        decode_base_s=0.01, per_sequence_s=1e-4, per_context_token_s=1e-7,
    )  # fmt: skip
    found = decode_times(linear)(number, lengths)
    assert found == [linear.decode_s(number, each) for each in lengths], "of those without"


@given(timers, steps)
def test_a_step_takes_time_and_an_empty_one_none(
    timer: RooflineTimer, sizes: tuple[int, ...]
) -> None:
    shape = StepShape(*sizes)
    seconds = timer.step_s(shape)
    assert (seconds > 0) == (shape.prompt_tokens + shape.num_decoding > 0)
    assert timer.step_s(StepShape()) == 0.0


@given(st.sampled_from(NAMES[:-1]), st.sampled_from(sorted(MODELS)), steps)
def test_more_devices_are_slower_by_no_more_than_they_say_to_each_other(
    hardware: str, model: str, sizes: tuple[int, ...]
) -> None:
    device, known, runtime = HARDWARE[hardware], MODELS[model].shape, RUNTIMES["graphs"]
    shape = StepShape(*sizes)
    tokens = shape.prompt_tokens + shape.num_decoding
    for less, more in ((1, 2), (2, 4), (4, 8)):
        fewer_s = RooflineTimer(known, device, less, runtime).step_s(shape)
        more_s = RooflineTimer(known, device, more, runtime).step_s(shape)
        moved = 2.0 * known.num_layers * tokens * known.hidden_size * 2 * 2
        rate = device.peer_bytes_per_s * device.peer_share
        said_s = 2.0 * known.num_layers * runtime.reduce_s + moved / rate
        assert more_s <= fewer_s + said_s + 1e-12


def test_the_linear_model_is_near_the_timer() -> None:
    """Within a third at the shapes that matter, and a tenth in the middle of them."""
    for hardware, model in (("h100", "llama-3-70b"), ("a100", "llama-3-8b")):
        machine = machine_of(hardware, model)
        off = []
        for shape in (
            *(StepShape(tokens, tokens * tokens) for tokens in (256, 512, 1024, 2048, 4096, 8192)),
            *(StepShape(0, 0, n, n * 1024) for n in (1, 4, 16, 64, 128)),
        ):
            off.append(abs(machine.linear.step_s(shape) / machine.steps.step_s(shape) - 1.0))
        assert max(off) < 0.33
        assert statistics.median(off) < 0.1
        assert min(machine.linear.prompt_base_s, machine.linear.decode_base_s) >= 0.0


# DistServe's curves of an A100-80GB, in ms (its repository, evaluation): prompts a + b * tokens +
# c * tokens^2; decoding a + b * context + c * batch, up to 95 sequences.
DISTSERVE = {
    ("opt-13b", 1): ((18.10, 0.10191, 7.12e-6), (19.93, 6.27e-4, 0.0385)),
    ("opt-13b", 2): ((14.74, 0.06858, 2.45e-6), (13.29, 3.41e-4, 0.0630)),
    ("opt-13b", 4): ((12.06, 0.03808, 5.23e-7), (10.26, 1.88e-4, 0.0327)),
    ("opt-66b", 2): ((43.06, 0.27423, 2.25e-5), (48.29, 9.42e-4, 0.1276)),
    ("opt-66b", 4): ((29.44, 0.15135, 8.32e-6), (30.76, 4.52e-4, 0.0633)),
}


@pytest.mark.parametrize(("model", "tp"), DISTSERVE)
def test_the_roofline_is_near_what_distserve_measured(model: str, tp: int) -> None:
    prompt, decode = DISTSERVE[model, tp]
    timer = machine_of("a100", model, tp=tp, runtime="native").steps
    for tokens in (128, 512, 2048):
        seconds = (prompt[0] + prompt[1] * tokens + prompt[2] * tokens**2) / 1e3
        assert timer.step_s(StepShape(tokens, tokens**2)) == pytest.approx(seconds, rel=0.15)
    for batch in (1, 8, 64):
        seconds = (decode[0] + decode[1] * batch * 128 + decode[2] * batch) / 1e3
        assert timer.step_s(StepShape(0, 0, batch, batch * 128)) == pytest.approx(seconds, rel=0.15)


# Splitwise, table IV: P50 without batching of Llama-2-70B on 8 devices.
def test_the_roofline_is_near_what_splitwise_states() -> None:
    a100 = slo_floor(machine_of("a100-tp8", "llama-2-70b", runtime="eager"), 1500, 1500)
    h100 = slo_floor(machine_of("h100-tp8", "llama-2-70b", runtime="eager"), 1500, 1500)
    assert a100[0] == pytest.approx(0.185, rel=0.2)
    assert h100[0] == pytest.approx(0.095, rel=0.2)
    assert a100[1] == pytest.approx(0.045, rel=0.2)
    assert h100[1] == pytest.approx(0.031, rel=0.2)


# --- machines ---------------------------------------------------------------------------------


def test_a_worker_has_as_few_devices_as_leave_room() -> None:
    assert machine_of("a100", "llama-3-8b").num_devices == 1
    assert machine_of("a100", "llama-2-70b").num_devices == 4
    assert machine_of("h200", "llama-2-70b").num_devices == 2
    assert machine_of("h100", "bloom-176b").num_devices == 8
    written = machine_of("h100-tp2", "llama-3-8b")
    assert (written.num_devices, written.name) == (2, "h100-tp2")
    assert machine_of("cpu-server", "llama-2-70b").name == "cpu-server"


def test_what_a_worker_costs_and_draws_is_that_of_its_devices() -> None:
    machine, device = machine_of("h100-tp8", "bloom-176b"), HARDWARE["h100"]
    assert machine.price_per_hour == pytest.approx(8 * 4.76)
    assert machine.power.idle_w == pytest.approx(8 * (device.idle_w + device.host_w / 2))
    assert machine.power.prompt_w == pytest.approx(8 * (700 + device.host_w))
    assert machine.power.idle_w < machine.power.decode_w < machine.power.prompt_w
    capped = machine_of("h100cap-tp8", "bloom-176b")
    assert capped.power.prompt_w == pytest.approx(8 * (350 + device.host_w))
    prompt, decode = StepShape(2048, 2048**2), StepShape(0, 0, 8, 8192)
    assert 1.1 < capped.steps.step_s(prompt) / machine.steps.step_s(prompt) < 1.35
    assert capped.steps.step_s(decode) == pytest.approx(machine.steps.step_s(decode), rel=0.02)


@given(st.sampled_from(NAMES), st.sampled_from(sorted(MODELS)), st.sampled_from((8, 16, 512)))
def test_weights_kv_and_steps_fit_the_memory_and_no_block_more_would(
    hardware: str, model: str, block_size: int
) -> None:
    device, shape = HARDWARE[hardware], MODELS[model].shape
    try:
        machine = machine_of(hardware, model, block_size=block_size)
    except ConfigError:
        return
    there = device.memory_bytes * machine.num_devices * device.pool.share
    copies = max(1, machine.num_devices // shape.num_kv_heads)
    block = machine.token_kv_bytes * block_size * copies
    step = 2048 * 2 * (2 * shape.hidden_size + shape.mlp_matrices * shape.intermediate_size)
    used = shape.memory_bytes + machine.num_blocks * block + step
    assert used <= there < used + block + 1
    assert machine.max_model_tokens <= machine.num_blocks * block_size


def test_int8_halves_what_is_stored() -> None:
    plain = machine_of("h100", "llama-3-8b")
    small = machine_of("h100", "llama-3-8b", weight_dtype="int8", kv_dtype="int8")
    assert small.token_kv_bytes / plain.token_kv_bytes == pytest.approx((128 + 4) / 256)
    assert small.num_blocks > 1.9 * plain.num_blocks
    alone = StepShape(0, 0, 1, 1)
    assert 0.4 < small.steps.step_s(alone) / plain.steps.step_s(alone) < 0.7


@pytest.mark.parametrize(
    ("hardware", "model", "words"),
    [
        ("l40s-tp4", "bloom-176b", r"352\.5 GB.*use more devices"),
        ("a100-tp1", "llama-2-70b", r"138 GB.*79\.03 GB"),
        ("cpu", "llama-3-8b", r"it would fit on a machine of .*h100"),
        ("h100-tp16", "llama-3-8b", "1 to 8 devices"),
        ("h100", "gpt-9", "there is no model 'gpt-9'[.] There are bloom-176b"),
        ("tpu", "llama-3-8b", "there is no hardware 'tpu'; did you mean cpu[?] There are a100"),
    ],
)
def test_an_impossible_worker_is_refused_with_the_bound(
    hardware: str, model: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        machine_of(hardware, model)


def test_a_pool_without_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"does not hold a single block.*more devices"):
        machine_of("h100", "llama-3-8b", room=Room(memory_bytes=17_400_000_000))
    with pytest.raises(ConfigError, match="no runtime 'magic'"):
        machine_of("h100", "llama-3-8b", runtime="magic")
    with pytest.raises(ConfigError, match="kv_dtype is 'fp4'"):
        machine_of("h100", "llama-3-8b", kv_dtype="fp4")


def test_an_objective_below_the_floor_is_refused_with_the_floor() -> None:
    machines = [machine_of("a100", "llama-3-8b"), machine_of("h100", "llama-3-8b")]
    ttft_s, tpot_s = slo_floor(machines[1], 1000, 1000)

    def check(ttft_s: float | None, tpot_s: float | None) -> None:
        check_slo(machines, prompt_tokens=1000, context_tokens=1000, ttft_s=ttft_s, tpot_s=tpot_s)

    check(ttft_s * 1.01, tpot_s * 1.01)
    check(None, None)
    with pytest.raises(ConfigError, match=rf"the fastest, h100-tp1, takes {ttft_s * 1e3:.4g} ms"):
        check(ttft_s * 0.99, None)
    with pytest.raises(ConfigError, match=rf"{tpot_s * 1e3:.4g} ms for a token of one sequence"):
        check(None, tpot_s * 0.99)


def test_a_timer_is_a_step_timer() -> None:
    timer: StepTimer = machine_of("h100", "llama-3-8b").steps
    assert timer.step_s(StepShape(1, 1)) > 0
