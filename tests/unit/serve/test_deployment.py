"""What a config means on this machine, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdserve.config import ServeConfig
from pdserve.core.errors import ConfigError, ModelError
from pdserve.core.ids import Epoch, WorkerId
from pdserve.edge_config import EdgeConfig
from pdserve.serve import deployment as deployment_module
from pdserve.serve.deployment import deploy, free_memory_bytes, num_cores
from pdserve.serve.start import WorkerStart


def config(path: Path, **options: Any) -> ServeConfig:
    return ServeConfig(model=str(path), **({"dtype": "fp32", "kv_blocks": 64} | options))


def test_the_longest_request_fits_the_model_and_the_pool(tiny_model_path: Path) -> None:
    assert deploy(config(tiny_model_path)).card.max_model_tokens == 64 * 16
    assert deploy(config(tiny_model_path, kv_blocks=9999)).card.max_model_tokens == 4096
    limited = deploy(config(tiny_model_path, max_model_len=100))
    assert limited.card.max_model_tokens == 100


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_model_len": 5000, "kv_blocks": 9999}, "up to 4096 tokens: it was made"),
        ({"max_model_len": 2000}, "holds 1024 tokens: give more with --kv-memory"),
        ({"kv_blocks": None, "kv_memory": 100}, "does not hold a single block"),
        ({"transport": "pigeons"}, "one of shm"),
        ({"transport": "hosts"}, "one of shm"),
        ({"transport": "no_such_module:Pigeons"}, "No module.*PYTHONPATH"),
        ({"transport": "collections:OrderedDict"}, "no class of a Transport"),
        ({"edge": EdgeConfig(tool_call_parser="smoke")}, "one of hermes, llama3_json"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_remedy(
    tiny_model_path: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        deploy(config(tiny_model_path, **options))


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        deploy(config(tmp_path))


def test_pools_are_sized_in_blocks_of_all_layers(tiny_model_path: Path) -> None:
    # 2 layers, keys and values, 2 heads of 16 in fp32, 16 tokens.
    block_bytes = 2 * 2 * 2 * 16 * 4 * 16
    sized = deploy(config(tiny_model_path, kv_blocks=None, kv_memory=10 * block_bytes + 1))
    assert (sized.num_blocks, sized.block_bytes) == (10, block_bytes)
    half = deploy(config(tiny_model_path, kv_blocks=None, kv_memory=block_bytes, dtype="bf16"))
    assert half.num_blocks == 2


def test_a_pool_of_int8_holds_nearly_four_times_that_of_fp32(tiny_model_path: Path) -> None:
    """Each 16 numbers of a head are 16 bytes and one fp32 scale."""
    options = {"kv_blocks": None, "kv_memory": 1 << 20, "kv_dtype": "int8"}
    for dtype in ("fp32", "bf16"):
        deployed = deploy(config(tiny_model_path, dtype=dtype, **options))
        assert deployed.block_bytes == 2 * 2 * 2 * 16 * (16 + 4)
        assert deployed.num_blocks == (1 << 20) // deployed.block_bytes
        start = deployed.worker_start(
            WorkerId("decode-0"), Epoch(1), secret=b"s", gateway_address="g", address="a"
        )
        assert (start.dtype, start.kv_dtype) == (dtype, "int8")


def test_by_default_all_pools_together_leave_memory_to_others(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment_module, "free_memory_bytes", lambda: 1 << 30)
    small = deploy(config(tiny_model_path, kv_blocks=None, prefill=2, decode=2))
    assert small.num_blocks * small.block_bytes <= (1 << 30) * 0.4 / 4
    monkeypatch.setattr(deployment_module, "free_memory_bytes", lambda: 1 << 40)
    large = deploy(config(tiny_model_path, kv_blocks=None))
    assert large.num_blocks * large.block_bytes == 1 << 30


def test_cores_are_shared_out_unless_the_user_says_otherwise(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment_module, "num_cores", lambda: 8)
    assert deploy(config(tiny_model_path, prefill=1, decode=2)).threads == 2
    assert deploy(config(tiny_model_path, prefill=9, decode=0)).threads == 1
    assert deploy(config(tiny_model_path, threads=5)).threads == 5


def test_each_worker_is_told_who_it_is(tiny_model_path: Path) -> None:
    options = {"device": "cuda:0,cuda:1", "one_shot_tokens": 0}
    deployed = deploy(config(tiny_model_path, prefill=1, decode=2, **options))
    start = deployed.worker_start(
        WorkerId("decode-1"), Epoch(3), secret=b"hush", gateway_address="g", address="a"
    )
    assert (start.worker, start.epoch, start.role.value) == ("decode-1", 3, "decode")
    assert start.device == "cuda:0"  # the third worker of two devices
    assert (start.num_blocks, start.one_shot_tokens) == (64, 0)
    assert "hush" not in repr(start)
    assert WorkerStart.decode(start.encode()) == start


@pytest.mark.parametrize("document", [b"", b"{}", b'{"worker": 3}', b"\xff"])
def test_a_worker_that_is_told_nonsense_says_so(document: bytes) -> None:
    with pytest.raises(ConfigError, match="started by pdserve serve"):
        WorkerStart.decode(document)


def test_the_machine_has_cores_and_memory() -> None:
    assert num_cores() >= 1
    assert free_memory_bytes() > 0


@pytest.mark.parametrize(
    ("engine", "constrains"), [("torch", True), ("modelled", True), ("fake-foreign", False)]
)
def test_engines_that_batch_for_themselves_follow_no_forms(
    tiny_model_path: Path, engine: str, constrains: bool
) -> None:
    assert deploy(config(tiny_model_path, engine=engine)).card.constrains is constrains


def test_the_model_is_served_under_its_folders_name_or_the_given_one(
    tiny_model_path: Path,
) -> None:
    assert deploy(config(tiny_model_path)).card.name == tiny_model_path.name
    named = deploy(config(tiny_model_path, served_model_name="mine"))
    assert named.card.name == "mine"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["auto", "auto", "auto"]),
        ({"weight_dtype": "int8"}, ["int8", "int8", "int8"]),
        ({"decode_weight_dtype": "int8"}, ["auto", "int8", "auto"]),
        ({"weight_dtype": "int8", "decode_weight_dtype": "auto"}, ["int8", "auto", "int8"]),
    ],
)
def test_decode_workers_can_have_weights_of_their_own(
    tiny_model_path: Path, options: dict[str, str], expected: list[str]
) -> None:
    deployed = deploy(
        config(tiny_model_path, dtype="bf16", prefill=1, decode=1, mixed=1, **options)
    )
    starts = {
        worker: deployed.worker_start(
            worker, Epoch(1), secret=b"s", gateway_address="g", address="a"
        )
        for worker in deployed.roles
    }
    dtypes = {worker: start.weight_dtype for worker, start in starts.items()}
    assert dtypes == dict(zip(("prefill-0", "decode-0", "mixed-0"), expected, strict=True))


def test_workers_of_a_modelled_engine_have_times_and_speeds(tiny_model_path: Path) -> None:
    modelled = deploy(
        config(tiny_model_path, engine="modelled", prefill=1, decode=1, speeds={"prefill": 2.0})
    )
    told = {
        worker: modelled.worker_start(
            worker, Epoch(1), secret=b"", gateway_address="", address=""
        ).step_times
        for worker in modelled.roles
    }
    fast, slow = told[WorkerId("prefill-0")], told[WorkerId("decode-0")]
    assert fast is not None
    assert slow is not None
    assert (fast.speed, slow.speed) == (2.0, 1.0)
    assert str(fast) == str(slow)
    assert (
        WorkerStart.decode(
            modelled.worker_start(
                WorkerId("prefill-0"), Epoch(1), secret=b"", gateway_address="", address=""
            ).encode()
        ).step_times
        == fast
    )
