"""Tables of step times: what is read, how it is read, and what is refused."""

from __future__ import annotations

import pytest

from pdserve.core.errors import ConfigError
from pdserve.core.step import StepShape
from pdserve.cost.table import (
    PerfTable,
    SplitwiseSimTimer,
    TableTimer,
    linear_model,
    mean_error,
    medians,
    range_of,
)
from pdserve.cost.table_machine import machine_of_table

HEADER = "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel"
BLOOM = ("bloom-176b", "a100-80gb", 8)


def row(prompt, batch, prompt_ms, token_ms, output=128, model="bloom-176b", hardware="a100-80gb"):
    return f"{model},{hardware},{prompt},{batch},{output},{prompt_ms},{token_ms},8"


def prompt_ms(tokens, pairs):
    return 30 + 0.2 * tokens + 1e-6 * pairs


def token_ms(batch, context):
    return 40 + 0.5 * batch + 1e-4 * batch * context


def made_up(**where):
    """Times that are exactly linear in tokens, attention, batch and context."""
    rows = []
    for prompt in (128, 256, 512, 1024, 2048, 4096):
        for output in (128, 1024):
            times = prompt_ms(prompt, prompt**2), token_ms(1, prompt + output / 2)
            rows.append(row(prompt, 1, *times, output=output, **where))
    for batch in (2, 4, 8, 16):
        times = prompt_ms(512 * batch, 512 * 512 * batch), token_ms(batch, 576)
        rows.append(row(512, batch, *times, **where))
    return rows


def table(*rows):
    return PerfTable.read("\n".join((HEADER, *rows)), "times.csv")


def test_medians_of_repeats_count():
    rows = [row(512, 1, ms, 10 * ms) for ms in (3, 1, 500)]
    [run] = medians(table(*rows).rows(*BLOOM))
    assert (run.prompt_s, run.token_s) == (0.003, 0.03)


def test_splitwisesim_reads_lines_between_token_counts():
    known = table(
        row(128, 1, 100, 40), row(512, 1, 200, 42), row(1024, 1, 400, 44), row(512, 2, 500, 48)
    )
    timer = SplitwiseSimTimer(known.rows(*BLOOM))

    def seconds(prompt, decodes=0, context=0):
        return timer.step_s(StepShape(prompt, 0, decodes, context))

    assert seconds(512) == pytest.approx(0.2)
    assert seconds(320) == pytest.approx(0.15)
    assert seconds(1024) == pytest.approx(0.45)  # however it was batched
    assert seconds(1536) == pytest.approx(0.45 + 0.25)  # the last line goes on
    assert seconds(64) == pytest.approx(0.1 - 0.1 * 64 / 384)
    # A step of decodes is read where the table has as many tokens of context.
    assert seconds(0, 128, context=10**6) == pytest.approx(0.04)
    assert seconds(0, 320) == pytest.approx(0.041)
    assert seconds(300, 20) == pytest.approx(0.15 * 1.1)
    assert seconds(0) == 0.0


def test_what_was_measured_is_found_again():
    timer = TableTimer(table(*made_up()).rows(*BLOOM))
    for prompt in (128, 2048, 4096):
        shape = StepShape(prompt, prompt**2)
        assert timer.step_s(shape) == pytest.approx(prompt_ms(prompt, prompt**2) / 1e3)
    together = StepShape(4096, 8 * 512**2)
    assert timer.step_s(together) == pytest.approx(prompt_ms(4096, 8 * 512**2) / 1e3)
    for batch, context in ((1, 576), (16, 576), (1, 2112)):
        shape = StepShape(num_decoding=batch, context_tokens=batch * context)
        assert timer.step_s(shape) == pytest.approx(token_ms(batch, context) / 1e3, rel=1e-3)


def test_batch_and_context_cost_beyond_what_was_measured():
    timer = TableTimer(table(*made_up()).rows(*BLOOM))
    shape = StepShape(num_decoding=32, context_tokens=32 * 3000)
    assert timer.step_s(shape) == pytest.approx(token_ms(32, 3000) / 1e3, rel=0.02)
    # A later chunk of a long prompt attends to what came before.
    first, later = StepShape(512, 512**2), StepShape(512, 4096**2 - 3584**2)
    more = prompt_ms(512, 4096**2 - 3584**2) - prompt_ms(512, 512**2)
    assert timer.step_s(later) - timer.step_s(first) == pytest.approx(more / 1e3, rel=0.02)


def test_a_step_of_both_kinds_reads_the_weights_once():
    timer = TableTimer(table(*made_up()).rows(*BLOOM))
    decodes = StepShape(num_decoding=8, context_tokens=8 * 576)
    both = StepShape(1024, 1024**2, 8, 8 * 576)
    extra = timer.step_s(decodes) - 0.040
    expected = timer.step_s(StepShape(1024, 1024**2)) + extra
    assert timer.step_s(both) == pytest.approx(expected, rel=0.01)
    assert timer.step_s(both) < timer.step_s(StepShape(1024, 1024**2)) + timer.step_s(decodes)


def test_a_linear_table_has_its_own_linear_model():
    rows = table(*made_up()).rows(*BLOOM)
    model = linear_model(rows)
    assert model.prompt_base_s == pytest.approx(0.030, rel=1e-6)
    assert model.per_prompt_token_s == pytest.approx(2e-4, rel=1e-6)
    assert model.per_pair_s == pytest.approx(1e-9, rel=1e-6)
    assert model.decode_base_s == pytest.approx(0.040, rel=1e-6)
    assert model.per_sequence_s == pytest.approx(5e-4, rel=1e-6)
    assert model.per_context_token_s == pytest.approx(1e-7, rel=1e-6)
    assert mean_error(rows) < 0.01
    held = range_of(rows)
    assert (held.prompt_tokens, held.num_decoding, held.context_tokens) == (8192, 16, 10240)


def test_machines_are_those_of_the_evaluation():
    known = table(*made_up(), *made_up(hardware="h100-80gb"))
    a100, h100, capped = (
        machine_of_table(known, name, "bloom-176b", block_size=1)
        for name in ("a100", "h100", "h100cap")
    )
    assert a100.token_kv_bytes == 4_014_080
    assert a100.num_blocks == (8 * 80 * 2**30 - 329_000_000_000) // 4_014_080
    assert a100.link.bytes_per_s == 200 * 2**30
    assert not a100.link.shared
    assert h100.price_per_hour / a100.price_per_hour == pytest.approx(4.76 / 2.21)
    assert capped.power.decode_w / h100.power.decode_w == pytest.approx(0.7)
    # The table has no rows with a cap: prompts are 1.3 times as long there, decodes are not.
    prompt, decode = StepShape(2048, 2048**2), StepShape(num_decoding=4, context_tokens=2304)
    assert capped.steps.step_s(prompt) == pytest.approx(1.3 * h100.steps.step_s(prompt))
    assert capped.steps.step_s(decode) == pytest.approx(h100.steps.step_s(decode))


def test_grouped_heads_have_less_kv():
    known = table(*made_up(model="llama2-70b"))
    whole = machine_of_table(known, "a100", "llama-2-70b", gqa=False)
    grouped = machine_of_table(known, "a100", "llama-2-70b")
    assert whole.token_kv_bytes == 2 * 8192 * 80 * 2
    assert grouped.token_kv_bytes * 8 == whole.token_kv_bytes
    assert grouped.num_blocks == pytest.approx(8 * whole.num_blocks, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", r"times.csv:1: no column 'model'"),
        ("model,hardware\n", r"times.csv:1: no column 'prompt_size'"),
        (HEADER, "has no rows"),
        (f"{HEADER}\n{row(512, 1, 3, 4)},9", r"times.csv:2: 9 cells under 8 columns"),
        (f"{HEADER}\n\n{row(512, 1, 'x', 4)}", r"times.csv:3: prompt_time is 'x'"),
        (f"{HEADER}\n{row(512, 1, 3, -4)}", r"times.csv:2: token_time is '-4'.* above 0"),
        (f"{HEADER}\n{row(512, 1.5, 3, 4)}", r"times.csv:2: batch_size is '1.5'.* whole number"),
        (f"{HEADER}\n{row(512, 1, 3, 4, model='')}", r"times.csv:2: model is empty"),
        (f"{HEADER}\n{row(512, 1, 'inf', 4)}", r"times.csv:2: prompt_time is 'inf'"),
    ],
)
def test_what_cannot_be_read_is_named_by_its_line(text, why):
    with pytest.raises(ConfigError, match=why):
        PerfTable.read(text, "times.csv")


def test_what_is_not_there_is_refused_with_what_is():
    known = table(*made_up())
    with pytest.raises(ConfigError, match=r"nothing of llama2-70b on 8 x a100-80gb.*bloom-176b on"):
        machine_of_table(known, "a100", "llama-2-70b")
    with pytest.raises(ConfigError, match=r"measured hardware 'b200'.*a100, h100, h100cap"):
        machine_of_table(known, "b200", "bloom-176b")
    with pytest.raises(ConfigError, match=r"model 'gpt'.*bloom-176b, llama-2-70b"):
        machine_of_table(known, "a100", "gpt")
    with pytest.raises(ConfigError, match="no series of batches"):
        TableTimer(table(row(512, 1, 3, 4)).rows(*BLOOM))


def test_splitwises_own_table_has_what_the_paper_shows(user_data):
    """Medians in ms of BLOOM-176B, and a batch of 64 that costs about twice one of 1."""
    if user_data is not None:
        known = PerfTable.read((user_data / "splitwise_perf_model.csv").read_text())
        a100, h100 = (known.rows("bloom-176b", f"{name}-80gb", 8) for name in ("a100", "h100"))
        timer = SplitwiseSimTimer(a100)
        assert timer.step_s(StepShape(2048)) == pytest.approx(0.5361, abs=1e-4)
        assert timer.step_s(StepShape(num_decoding=128)) == pytest.approx(0.0476, abs=1e-4)
        measured = TableTimer(h100)
        one, many = (
            measured.step_s(StepShape(num_decoding=n, context_tokens=576 * n)) for n in (1, 64)
        )
        assert one == pytest.approx(0.0361, abs=1e-4)
        assert many == pytest.approx(0.0638, abs=1e-4)
        assert mean_error(a100) < 0.1
