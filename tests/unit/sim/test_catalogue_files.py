"""The user's own catalogue and models, and pools that are the live server's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdserve.config import ServeConfig
from pdserve.core.errors import ConfigError
from pdserve.cost.models import MODELS
from pdserve.cost.roofline import Room, machine_of
from pdserve.serve import deployment
from pdserve.sim.catalogue import read_catalogue


@pytest.mark.parametrize("free_bytes", [3 << 20, 1 << 30, 1 << 40])
@pytest.mark.parametrize("workers", [(1, 1), (2, 3)])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_simulated_worker_has_the_pool_of_the_live_one(
    tiny_model_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free_bytes: int,
    workers: tuple[int, int],
    kv_dtype: str,
) -> None:
    monkeypatch.setattr(deployment, "free_memory_bytes", lambda: free_bytes)
    prefill, decode = workers
    live = deployment.deploy(
        ServeConfig(
            model=str(tiny_model_path),
            dtype="bf16",
            kv_dtype=kv_dtype,
            prefill=prefill,
            decode=decode,
            block_size=32,
        )
    )
    name = str(tiny_model_path)
    simulated = machine_of(
        "cpu",
        name,
        block_size=32,
        kv_dtype=kv_dtype,
        room=Room(memory_bytes=free_bytes, num_workers=prefill + decode),
        catalogue=read_catalogue(None, name),
    )
    assert simulated.num_blocks == live.num_blocks
    assert simulated.token_kv_bytes * 32 == live.block_bytes
    assert simulated.max_model_tokens == live.card.max_model_tokens


def test_a_pool_without_a_block_is_refused_alike(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "free_memory_bytes", lambda: 1000)
    with pytest.raises(ConfigError, match="does not hold a single block"):
        deployment.deploy(ServeConfig(model=str(tiny_model_path)))
    name = str(tiny_model_path)
    with pytest.raises(ConfigError, match="does not hold a single block"):
        machine_of("cpu", name, room=Room(memory_bytes=1000), catalogue=read_catalogue(None, name))


def test_a_catalogue_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ours.toml"
    file.write_text('[hardware.ours]\nlike = "h100"\nprice_per_hour = 1.5\n', encoding="utf-8")
    ours = read_catalogue(file, "llama-3-8b")
    assert machine_of("ours", "llama-3-8b", catalogue=ours).price_per_hour == 1.5
    assert dict(ours.models) == dict(MODELS)
    with pytest.raises(ConfigError, match="--catalogue: cannot read"):
        read_catalogue(tmp_path / "none.toml")
    file.write_text("[hardware.ours]\nlike = 'abacus'\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"ours\.toml, \[hardware\.ours\] is like 'abacus'"):
        read_catalogue(file)


def test_a_models_folder_must_say_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, words in (
        ("{", "cannot read"),
        ("[]", "holds no JSON object"),
        (json.dumps({"model_type": "bert"}), "is 'bert', and only"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=words):
            read_catalogue(None, str(tmp_path))
    assert read_catalogue(None, "llama-3-8b").models is MODELS
    assert read_catalogue(None, str(tmp_path / "nowhere")).models is MODELS
