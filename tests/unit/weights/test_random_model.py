"""The random model is a real one: transformers loads it and agrees about everything."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from pdserve.core.errors import ModelError
from pdserve.weights.folder import ModelFolder
from pdserve.weights.random_model import write_random_model


def file_hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    write_random_model(tmp_path / "a", seed=3)
    write_random_model(tmp_path / "b", seed=3)
    write_random_model(tmp_path / "c", seed=4)
    assert file_hashes(tmp_path / "a") == file_hashes(tmp_path / "b")
    assert file_hashes(tmp_path / "a") != file_hashes(tmp_path / "c")


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_layers": 3, "head_dim": 24, "num_kv_heads": 4, "vocab_size": 700},
        {"architecture": "MistralForCausalLM"},
    ],
)
def test_is_what_it_says(tmp_path: Path, overrides: dict[str, object]) -> None:
    written = write_random_model(tmp_path / "m", **overrides)
    opened = ModelFolder.open(tmp_path / "m")
    assert opened.config == written
    assert all(getattr(written, name) == value for name, value in overrides.items())


def test_transformers_computes_with_it(tiny_model_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_path).eval()
    weights = ModelFolder.open(tiny_model_path).load_tensors()
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    with torch.no_grad():
        logits = model(torch.arange(3, 67)[None]).logits[0]
    assert 1.5 < logits.std() < 6.0
    assert len(set(logits.argmax(-1).tolist())) > 20, "the answer depends on the prompt"


def test_a_vocabulary_without_all_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="at least 259"):
        write_random_model(tmp_path / "m", vocab_size=200)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="fp32, bf16"):
        write_random_model(tmp_path / "m", dtype="fp8")
