"""The real model, pulled from the real package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pdserve.weights.config import ModelConfig
from pdserve.weights.folder import ModelFolder
from pdserve.weights.made_folder import MARKER
from pdserve.weights.pull import resolve

pytestmark = pytest.mark.model


def test_a_pulled_model_is_found_again(smollm_path: Path) -> None:
    assert resolve("smollm2-135m", progress=False) == smollm_path
    assert json.loads((smollm_path / MARKER).read_text())["model"] == "smollm2-135m"


def test_is_the_model_that_it_should_be(smollm_path: Path) -> None:
    folder = ModelFolder.open(smollm_path)
    assert folder.config == ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_model_tokens=8192,
        rope_theta=100_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rotary_dim=64,
        eos_token_ids=(2,),
        bos_token_id=1,
    )
    assert folder.stored_dtype == "bf16"


def test_the_weights_are_those_that_transformers_reads_from_the_gguf(smollm_path: Path) -> None:
    """All 272 tensors were compared bit by bit with transformers 5.23's loading of the same file
    (with ``GgufConfig(dequantize=True)``, in bf16); this is the digest of that state."""
    digest = ModelFolder.open(smollm_path).weights_digest()
    assert digest == "f6283ee68b1c8f7ede9dfe0881a160ee"


def test_it_speaks(smollm_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm_path)
    model = AutoModelForCausalLM.from_pretrained(smollm_path, dtype=torch.bfloat16)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = model.generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
