"""The same equality for other architectures, and for sizes that fill no vector register."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from bitwise import LENGTHS, Lab, Shape, ask_of, lab_of, prompt_of

from pdserve.weights.random_model import write_random_model

ODD = {
    "hidden_size": 60,
    "intermediate_size": 100,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 20,
    "vocab_size": 387,
}
MODELS = {
    "odd fp32": ("fp32", ODD),
    "odd bf16": ("bf16", ODD),
    "Qwen3": ("bf16", {"architecture": "Qwen3ForCausalLM", "head_dim": 24}),
    "Phi-3": ("bf16", {"architecture": "Phi3ForCausalLM", "rotary_dim": 12}),
}
SHAPE = Shape("split", prefill=1, decode=1, max_step_tokens=80, one_shot_tokens=33)


@pytest.fixture(scope="module", params=MODELS)
def odd_lab(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    model: Path = tmp_path_factory.mktemp("models") / "odd"
    dtype, sizes = MODELS[request.param]
    write_random_model(model, seed=1, **sizes)
    start = SHAPE.start(model, dtype)
    with lab_of(SHAPE, start) as lab:
        yield lab


def test_together(odd_lab: Lab) -> None:
    kinds = ("greedy", "three", "penalties")
    asks = [
        ask_of(kind, prompt_of(length), odd_lab.reference) for kind in kinds for length in LENGTHS
    ]
    random.Random(0).shuffle(asks)
    odd_lab.answer_all(asks, waves=3)
