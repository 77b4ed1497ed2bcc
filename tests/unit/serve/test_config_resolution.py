"""Options: where each value comes from, and which sets of them are refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdserve.config import OPTIONS, ServeConfig, resolve
from pdserve.core.errors import ConfigError
from pdserve.options import flag_of, parse_size


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "pdserve.toml"
    file.write_text(text)
    return file


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(tmp_path: Path) -> None:
    file = write(tmp_path, '[serve]\nport = 1\nblock_size = 32\ndtype = "fp32"\n')
    environment = {"PDSERVE_PORT": "2", "PDSERVE_BLOCK_SIZE": "64"}
    resolved = resolve({"port": "3", "dtype": None}, environment, file)
    assert (resolved.config.port, resolved.sources["port"]) == (3, "flag")
    assert (resolved.config.block_size, resolved.sources["block_size"]) == (64, "environment")
    assert (resolved.config.dtype, resolved.sources["dtype"]) == ("fp32", "file")
    assert (resolved.config.host, resolved.sources["host"]) == ("127.0.0.1", "default")


def test_names_of_dtypes_are_those_of_torch_too() -> None:
    assert resolve({"dtype": "float32"}, {}).config.dtype == "fp32"
    assert resolve({"dtype": "bfloat16"}, {}).config.dtype == "bf16"


def test_the_default_is_one_prefill_and_one_decode_worker() -> None:
    assert [str(worker) for worker, _ in resolve({}, {}).config.worker_slots] == [
        "prefill-0",
        "decode-0",
    ]


@pytest.mark.parametrize(
    ("flags", "workers"),
    [
        ({"mixed": "1"}, ["mixed-0"]),
        ({"prefill": "1"}, ["prefill-0"]),
        ({"decode": "2"}, ["decode-0", "decode-1"]),
        ({"prefill": "1", "mixed": "1"}, ["prefill-0", "mixed-0"]),
    ],
)
def test_giving_one_count_leaves_the_others_at_none(
    flags: dict[str, str], workers: list[str]
) -> None:
    assert [str(worker) for worker, _ in resolve(flags, {}).config.worker_slots] == workers


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"prefill": "0"}, "no worker would be started"),
        ({"prefill": "-1", "decode": "3"}, "--prefill must not be negative"),
        ({"mixed": "65"}, "more than the 64"),
        ({"block_size": "24"}, "must divide 64"),
        ({"mixed_chunk_tokens": "8"}, "--mixed-chunk-tokens must be at least one block"),
        ({"block_size": "0"}, "must divide 64"),
        ({"kv_blocks": "10", "kv_memory": "1GB"}, "say the same thing"),
        ({"kv_blocks": "0"}, "--kv-blocks must be at least 1"),
        ({"max_model_len": "0"}, "--max-model-len must be at least 1"),
        ({"max_step_tokens": "8"}, "less than one block"),
        ({"dtype": "int8"}, "one of bf16, fp32"),
        ({"weight_dtype": "int4"}, "--weight-dtype is 'int4'; it is one of auto, int8"),
        ({"decode_weight_dtype": "int4"}, "--decode-weight-dtype is 'int4'"),
        ({"weight_dtype": "int8", "dtype": "fp32"}, "go with --dtype bf16, and it is fp32"),
        ({"kv_dtype": "fp8"}, "--kv-dtype is 'fp8'; it is one of auto, int8"),
        ({"kv_dtype": "int8", "block_size": "8"}, "with --kv-dtype int8 it is 16, 32 or 64"),
        ({"numerics": "loose"}, "one of exact, fast"),
        ({"log_format": "xml"}, "one of text, json"),
        ({"transport": "inproc"}, "use shm"),
        ({"transport": "my:Own", "listen_workers": "10.0.0.1:7000"}, "shm or tcp"),
        ({"device": "cuda:0,,cuda:1"}, "between the commas"),
        ({"port": "70000"}, "0 to 65535"),
        ({"threads": "0"}, "at least 1"),
        ({"drain_timeout": "-1"}, "0 or more"),
        ({"one_shot_tokens": "-1"}, "--one-shot-tokens must not be negative"),
        ({"queue_timeout": "nan"}, "0 or more"),
        ({"drain_timeout": "soon"}, "a number of seconds"),
        ({"decode": "two"}, "a whole number"),
        ({"kv_memory": "much"}, "a size such as 512MiB"),
        ({"model": ""}, "not empty"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(flags: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve(flags, {})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[serve]\nprefil = 1\n", "unknown option 'prefil'; did you mean prefill"),
        ("port = 1\n", "one table, .serve., with the options in it; it also has port"),
        ("serve = 3\n", "one table"),
        ("[serve\n", "is not TOML"),
        ("[serve]\nport = true\n", "port in .* is True; it must be a whole number"),
        ("[serve]\nmodel = 3\n", "must be a text"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve({}, {}, write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere"):
        resolve({}, {}, tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1024", 1024), ("2k", 2000), ("1.5GiB", 3 * 2**29), ("512 MiB", 2**29), ("2GB", 2 * 10**9)],
)
def test_sizes_are_read_with_their_units(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


def test_devices_are_dealt_out_in_turn() -> None:
    assert ServeConfig(device="cuda:0, cuda:1").devices == ("cuda:0", "cuda:1")


def test_rows_show_every_option_and_no_secret() -> None:
    rows = resolve({"api_key": "hush", "listen_workers": "10.0.0.1:7000"}, {}).rows()
    assert [name for name, _, _ in rows] == list(OPTIONS)
    assert ("api_key", "***", "flag") in rows
    assert ("listen_workers", "10.0.0.1:7000", "flag") in rows
    assert ("cors_origin", "-", "default") in rows
    assert "hush" not in str(rows)


def test_every_option_has_a_flag_and_a_help_text() -> None:
    assert flag_of("max_model_len") == "--max-model-len"
    assert all(option.metadata["help"] for option in OPTIONS.values())
