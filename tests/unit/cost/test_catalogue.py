"""What is known by name, where it is from, and what a user's file adds."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from pdserve.core.errors import ConfigError
from pdserve.core.layout import KvLayout
from pdserve.cost.catalogue import CATALOGUE, parse_catalogue
from pdserve.cost.hardware import HARDWARE, Hardware
from pdserve.cost.links import LINKS
from pdserve.cost.models import MODELS, model_of_config
from pdserve.cost.roofline import machine_of
from pdserve.cost.roofline_timer import RUNTIMES

BILLIONS = {  # weights, as the models' own pages have them
    "smollm2-135m": 0.135,
    "llama-2-70b": 69.0,
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.6,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.6,
    "mistral-7b": 7.25,
    "qwen2.5-7b": 7.62,
    "qwen2.5-32b": 32.8,
    "qwen2.5-72b": 72.7,
    "qwen3-8b": 8.19,
    "qwen3-32b": 32.8,
    "bloom-176b": 176.2,
    "opt-13b": 12.85,
    "opt-66b": 65.7,
}


def test_every_model_has_the_weights_that_it_is_known_for() -> None:
    assert set(MODELS) == set(BILLIONS)
    for name, model in MODELS.items():
        assert model.shape.memory_bytes / 2e9 == pytest.approx(BILLIONS[name], rel=0.01), name
        assert model.shape.num_heads % model.shape.num_kv_heads == 0
        assert model.source


def test_kv_of_a_token_is_what_others_count() -> None:
    """Splitwise's simulator counts 4,014,080 bytes for BLOOM; Llama 2 70B has 320 KiB."""
    assert MODELS["bloom-176b"].shape.token_kv_bytes == 4_014_080
    assert MODELS["llama-2-70b"].shape.token_kv_bytes == 320 * 1024
    assert machine_of("a100", "bloom-176b").token_kv_bytes == 4_014_080


def test_blocks_are_those_of_the_live_layout() -> None:
    shape = MODELS["llama-3-8b"].shape
    layout = KvLayout(
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_size=16,
        dtype="bf16",
        numerics="",
        weights_digest="",
    )
    machine = machine_of("h100", "llama-3-8b")
    assert machine.token_kv_bytes * 16 == layout.pool_bytes(1)


@pytest.mark.parametrize("name", HARDWARE)
def test_every_figure_of_every_device_has_a_source(name: str) -> None:
    device = HARDWARE[name]
    stated = {each.name for each in fields(Hardware)} - {"sources", "runtime"}
    if not device.peer_bytes_per_s:
        stated -= {"peer_bytes_per_s", "peer_share"}
    for field in stated:
        if getattr(device, field) is not None:
            assert len(device.sources.get(field, "")) > 3, field
    assert set(device.sources) <= stated
    assert device.network in LINKS
    assert device.runtime in RUNTIMES
    assert device.idle_w < device.limit_w <= device.tdp_w
    assert 0 < device.compute_share <= 1
    assert 0 < device.memory_share <= 1


@pytest.mark.parametrize("name", LINKS)
def test_every_link_has_a_source_and_a_rate_below_its_line(name: str) -> None:
    link = LINKS[name]
    assert len(link.source) > 10
    one, four = link.of_worker(1), link.of_worker(4)
    assert 0 < one.bytes_per_s <= link.bytes_per_s
    assert four.bytes_per_s == one.bytes_per_s * (4 if link.per_device else 1)
    assert one.fixed_s == link.fixed_s


def test_a_worker_has_the_adapters_of_its_devices_or_the_link_it_is_given() -> None:
    assert machine_of("a100-tp8", "bloom-176b").link.bytes_per_s == pytest.approx(8 * 25e9 * 0.87)
    slow = machine_of("a100-tp8", "bloom-176b", link="eth-25")
    assert slow.link.bytes_per_s == pytest.approx(2.5e9)
    with pytest.raises(ConfigError, match=r"no link 'string'\. There are eth-100"):
        machine_of("a100", "llama-3-8b", link="string")


# --- a user's file ------------------------------------------------------------------------------

OURS = """
[hardware.h100-ours]
like = "h100"
price_per_hour = 2.1
cap_w = 500
network = "rack"
pool_share = 0.8
source = "our contract"

[hardware.new]
flops = 2e15
bytes_per_s = 4e12
memory_bytes = 96_000_000_000
compute_share = 0.5
memory_share = 0.8
network = "eth-100"
tdp_w = 600
idle_w = 0
host_w = 100
price_per_hour = 0

[model.ours]
num_layers = 40
hidden_size = 5120
intermediate_size = 13824
num_heads = 40
num_kv_heads = 40
head_dim = 128
vocab_size = 32000
max_model_tokens = 8192

[model.llama-long]
like = "llama-3-8b"
max_model_tokens = 100000
source = "our fine-tuning"

[link.rack]
like = "eth-100"
share = 0.9
per_device = true
"""


def test_a_file_adds_to_what_is_known() -> None:
    ours = parse_catalogue(OURS, "ours.toml")
    assert set(ours.hardware) == {*HARDWARE, "h100-ours", "new"}
    assert set(CATALOGUE.hardware) == set(HARDWARE)
    device = ours.hardware["h100-ours"]
    assert (device.flops, device.price_per_hour, device.limit_w) == (9.89e14, 2.1, 500.0)
    assert device.sources["price_per_hour"] == "our contract"
    assert device.sources["flops"] == HARDWARE["h100"].sources["flops"]
    machine = machine_of("h100-ours-tp2", "ours", catalogue=ours)
    assert machine.link.bytes_per_s == pytest.approx(2 * 12.5e9 * 0.9)
    assert machine.price_per_hour == pytest.approx(4.2)
    usual = machine_of("h100-tp2", "ours", catalogue=ours)
    assert machine.num_blocks < usual.num_blocks
    assert machine_of("new", "llama-long", catalogue=ours).max_model_tokens == 100_000
    assert ours.models["ours"].source == "ours.toml, [model.ours]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[hardware", "ours.toml is no TOML"),
        ("[devices.x]\n", "has 'devices'; a catalogue has [hardware.NAME]"),
        ("hardware = 3", "has 'hardware'; a catalogue has"),
        ("[hardware]\nx = 3", "[hardware.x] is no table"),
        ("[hardware.x]\nlike = 'h900'", "[hardware.x] is like 'h900'; there are a100"),
        ("[hardware.x]\nflops = 1e15", "[hardware.x] lacks bytes_per_s, memory_bytes"),
        ("[hardware.x]\nlike = 'h100'\nspeed = 3", "[hardware.x] has 'speed'; its keys are flops"),
        ("[hardware.x]\nlike = 'h100'\nflops = 0", "has flops = 0; it is above 0"),
        ("[hardware.x]\nlike = 'h100'\nflops = -1", "has flops = -1; it is a number, not below 0"),
        ("[hardware.x]\nlike = 'h100'\nflops = nan", "has flops = nan; it is a number"),
        ("[hardware.x]\nlike = 'h100'\nflops = 'fast'", "has flops = 'fast'; it is a number"),
        ("[hardware.x]\nlike = 'h100'\nmemory_share = 1.5", "it is a share, from 0 to 1"),
        ("[hardware.x]\nlike = 'h100'\nmax_devices = 0", "it is a whole number from 1"),
        ("[hardware.x]\nlike = 'h100'\nnetwork = 'wet'", "has network = 'wet'; there are eth-100"),
        ("[hardware.x]\nlike = 'h100'\nruntime = 'slow'", "has runtime = 'slow'; there are eager"),
        ("[hardware.x-tp4]\nlike = 'h100'", "no -tpN at the end"),
        ("[hardware.'a b']\nlike = 'h100'", "has a name that a cluster's specification cannot"),
        ("[hardware.x]\nlike = 7", "has like = 7; it is a text"),
        ("[hardware.x]\nlike = 'h100'\nidle_w = 900", "draws 900 W idle and at most 700 W"),
        ("[model.x]\nlike = 'llama-3-8b'\nnum_kv_heads = 5", "no multiple of its num_kv_heads"),
        ("[model.x]\nlike = 'llama-3-8b'\ntied = 1", "has tied = 1; it is true or false"),
        ("[model.x]\nlike = 'llama-3-8b'\nnum_layers = 2.5", "it is a whole number from 1"),
        ("[model.x]\nnum_layers = 3", "[model.x] lacks hidden_size, intermediate_size"),
        ("[link.x]\nbytes_per_s = 1e9", "[link.x] lacks share, fixed_s (or say what it is like)"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_catalogue(text, "ours.toml")


CONFIG = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}


def test_a_models_own_config_says_its_shape() -> None:
    read = model_of_config(CONFIG, "config.json")
    assert read.shape == MODELS["qwen2.5-7b"].shape
    assert read.max_model_tokens == 32768
    whole = {key: value for key, value in CONFIG.items() if key != "num_key_value_heads"}
    assert model_of_config(whole, "config.json").shape.num_kv_heads == 28


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mixtral"}, "is 'mixtral', and only llama"),
        ({"hidden_size": None}, "has no usable hidden_size: it is None"),
        ({"vocab_size": "many"}, "has no usable vocab_size: it is 'many'"),
    ],
)
def test_a_config_that_says_too_little_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        model_of_config({**CONFIG, **change}, "x/config.json")


def test_the_page_has_every_device_and_link_as_the_catalogue_has_it() -> None:
    page = Path(__file__).parents[3] / "docs" / "hardware.md"
    rows = {
        cells[0].strip(" `"): cells
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
        for cells in [line.strip("|").split("|")]
    }
    assert set(rows) == {*HARDWARE, *LINKS}
    for name, device in HARDWARE.items():
        assert float(rows[name][-1]) == pytest.approx(device.price_per_hour)
        assert float(rows[name][3]) == pytest.approx(device.memory_bytes / 1e9, rel=0.01)
        watts = [float(each) for each in rows[name][6].split(",")]
        assert watts == [device.idle_w, device.limit_w, device.host_w]
    for name, link in LINKS.items():
        rate, share = (float(each) for each in rows[name][1].split("x"))
        assert rate * share == pytest.approx(link.of_worker(1).bytes_per_s / 1e9)
