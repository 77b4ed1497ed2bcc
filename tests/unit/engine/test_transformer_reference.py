"""The model computes what transformers' Llama computes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pdserve.core.errors import ModelError
from pdserve.engine.torch.linear_registry import LinearKind
from pdserve.engine.torch.transformer_weights import pack_weights
from pdserve.weights.folder import ModelFolder

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True, "num_heads": 2},
    "biases": {
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "num_kv_heads": 1,
    },
    "odd": {
        "num_heads": 6,
        "num_kv_heads": 3,
        "head_dim": 12,
        "hidden_size": 54,
        "intermediate_size": 100,
        "num_layers": 3,
        "vocab_size": 301,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-3,
    },
}
PROMPT_LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 150)


def reference_logits(folder: ModelFolder, token_ids: list[int]) -> torch.Tensor:
    """``[token, vocab]`` in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_match_transformers_in_fp32(
    shape: str,
    numerics: str,
    make_bench: Callable[..., Any],
    make_folder: Callable[..., ModelFolder],
    row: Callable[..., Any],
    rng: random.Random,
) -> None:
    bench = make_bench("fp32", numerics, **SHAPES[shape])
    vocab_size = bench.runner.info.vocab_size
    token_ids = [rng.randrange(vocab_size) for _ in range(max(PROMPT_LENGTHS))]
    expected = reference_logits(make_folder(**SHAPES[shape]), token_ids)
    for length in PROMPT_LENGTHS:
        actual = bench.logits_of(token_ids[:length])
        torch.testing.assert_close(actual, expected[length - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_stays_near_fp32(
    shape: str,
    make_bench: Callable[..., Any],
    make_folder: Callable[..., ModelFolder],
    rng: random.Random,
) -> None:
    """The chosen token is within a few rounding errors of the best one in fp32."""
    bench = make_bench("bf16", "exact", **SHAPES[shape])
    token_ids = [rng.randrange(bench.runner.info.vocab_size) for _ in range(100)]
    expected = reference_logits(make_folder(**SHAPES[shape]), token_ids)
    for length in (1, 40, 100):
        best = int(bench.logits_of(token_ids[:length]).argmax())
        assert expected[length - 1].max() - expected[length - 1, best] < 0.35


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_greedy_decoding_matches_transformers(
    numerics: str,
    make_bench: Callable[..., Any],
    make_folder: Callable[..., ModelFolder],
    row: Callable[..., Any],
    rng: random.Random,
) -> None:
    """Prefill in two chunks, then decode two sequences side by side in scattered blocks."""
    bench = make_bench("fp32", numerics)
    prompts = [[rng.randrange(384) for _ in range(n)] for n in (70, 21)]
    tables = [[9, 3, 40, 41, 5, 60], [1, 0, 33]]
    bench.fresh_pool()
    bench.logits([row(prompts[0][:48], 0, tables[0], False)])
    rows = [row(prompts[0][48:], 48, tables[0]), row(prompts[1], 0, tables[1])]
    answers: list[list[int]] = [[], []]
    for _ in range(12):
        for answer, token in zip(answers, bench.logits(rows).argmax(-1).tolist(), strict=True):
            answer.append(token)
        rows = [
            row(answer[-1:], len(prompt) + len(answer) - 1, table)
            for prompt, answer, table in zip(prompts, answers, tables, strict=True)
        ]
    folder = make_folder()
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = reference_logits(folder, prompt + answer)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_a_checkpoint_that_does_not_fit_is_refused(
    make_folder: Callable[..., ModelFolder],
) -> None:
    folder = make_folder()
    tensors = dict(folder.load_tensors(dtype="fp32"))
    cpu = torch.device("cpu")
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=rf"{name}.*\[3, 64\].*\[128, 64\]"):
        pack_weights(
            folder.config,
            {**tensors, name: torch.zeros(3, 64)},
            cpu,
            torch.float32,
            LinearKind("torch"),
        )
    del tensors[name]
    with pytest.raises(ModelError, match=f"no tensor '{name}'"):
        pack_weights(folder.config, tensors, cpu, torch.float32, LinearKind("torch"))
