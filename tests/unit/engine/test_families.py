"""Each architecture computes what transformers' own class of that name computes, in fp32.

transformers makes a tiny model with random weights and saves it in shards; pdserve loads that
folder. Logits of every position of one text are compared, computed in chunks, and the tokens that
both would choose; by the compiled kernels and by torch alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pdserve.core.ids import StepId
from pdserve.core.step import StepPlan
from pdserve.engine.native.library import KERNELS_VARIABLE
from pdserve.engine.torch.rope import inverse_frequencies
from pdserve.engine.torch.runner import TorchRunner
from pdserve.weights.config import ModelConfig
from pdserve.weights.families import FAMILIES
from pdserve.weights.folder import ModelFolder

LENGTH = 150
NUM_BLOCKS = 12
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + i for i in range(6)],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": ("Llama", {"num_key_value_heads": 4}),
    "Llama 3.1": ("Llama", {"rope_theta": 500.0, "rope_scaling": LLAMA3, "rms_norm_eps": 1e-5}),
    "Llama, linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "Llama, dynamic": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}}),
    "Llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("Mistral", {"sliding_window": None, "head_dim": 24}),
    "Mistral, window": ("Mistral", {"sliding_window": 160}),
    "Qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen2.5, yarn": ("Qwen2", {"rope_scaling": YARN}),
    "Qwen2, windows in late layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 160, "max_window_layers": 2},
    ),
    "Qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True, "rope_theta": 1e6}),
    "Qwen3, biases": ("Qwen3", {"head_dim": 24, "attention_bias": True}),
    "SmolLM3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "SmolLM3, layers by name": ("SmolLM3", {"no_rope_layers": [0, 1, 1, 0]}),
    "Phi-3": ("Phi3", {"hidden_size": 96, "num_key_value_heads": 4, "sliding_window": 200}),
    "Phi-4-mini": (
        "Phi3",
        {
            "hidden_size": 64,
            "partial_rotary_factor": 0.75,
            "rope_scaling": LONG,
            "original_max_position_embeddings": 180,
            "tie_word_embeddings": True,
        },
    ),
}


@dataclass(frozen=True)
class Saved:
    """A model folder, and what transformers makes of one text: ``logits [token, vocab]``."""

    path: Path
    token_ids: list[int]
    logits: torch.Tensor


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    kind, changes = MODELS[request.param]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    torch.manual_seed(5)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():  # norms and biases begin as ones and zeros: make them count
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "lm_head" in name or "embed" in name:
                parameter.mul_(10)
            else:
                parameter.mul_(4)
    path = tmp_path_factory.mktemp("family")
    model.save_pretrained(path, max_shard_size="100KB")
    (path / "tokenizer.json").write_text("{}")
    rng = random.Random(5)
    token_ids = [rng.randrange(320) for _ in range(LENGTH)]
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids])).logits[0]
    return Saved(path, token_ids, logits)


def load(path: Path, dtype: str = "fp32", **choices: Any) -> TorchRunner:
    folder = ModelFolder.open(path)
    settings = {
        "device": "cpu",
        "block_size": 16,
        "num_threads": 1,
        "weights_digest": "",
        **choices,
    }
    runner = TorchRunner(folder.config, folder.load_tensors(dtype=dtype), dtype=dtype, **settings)
    memory = bytearray(runner.info.layout.pool_bytes(NUM_BLOCKS))
    runner.attach_pool(memoryview(memory), NUM_BLOCKS)
    return runner


ENDS = (1, 3, 33, 97, *range(98, LENGTH + 1))
"""Of a few chunks, then token by token."""


def teacher_forced(
    runner: TorchRunner, token_ids: list[int], row: Callable[..., Any]
) -> torch.Tensor:
    """``[end, vocab]``: next-token logits at `ENDS`."""
    logits = []
    for step, (start, end) in enumerate(pairwise((0, *ENDS))):
        chunk = row(token_ids[start:end], start, range(NUM_BLOCKS))
        plan = StepPlan(step_id=StepId(step + 1), rows=(chunk,), copies=())
        logits.append(runner.logits(plan)[0])
    return torch.stack(logits)


def at_ends(logits: torch.Tensor) -> torch.Tensor:
    return logits[[end - 1 for end in ENDS]]


@pytest.mark.parametrize(
    ("kernels", "numerics"), [("", "exact"), ("torch", "exact"), ("torch", "fast")]
)
def test_logits_are_those_of_transformers(
    saved: Saved,
    kernels: str,
    numerics: str,
    monkeypatch: pytest.MonkeyPatch,
    row: Callable[..., Any],
) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, kernels)
    assert len(list(saved.path.glob("model-*.safetensors"))) > 1, "the checkpoint is in shards"
    actual = teacher_forced(load(saved.path, numerics=numerics), saved.token_ids, row)
    expected = at_ends(saved.logits)
    assert expected.std() > 1, "logits differ by more than the tolerance"
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)
    assert actual.argmax(-1).tolist() == expected.argmax(-1).tolist()


def test_inverse_frequencies_are_those_of_transformers_to_the_bit(saved: Saved) -> None:
    config = ModelConfig.from_folder(saved.path)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved.path)
    theirs = model.model.rotary_emb
    ours, factor = inverse_frequencies(config)
    assert torch.equal(ours, theirs.inv_freq)
    assert factor == theirs.attention_scaling


def test_bf16_and_int8_stay_near(saved: Saved, row: Callable[..., Any]) -> None:
    """The chosen token is nearly the best one; int8 weights round each of 448 weights a row."""
    for weight_dtype, allowed in (("auto", 0.5), ("int8", 1.5)):
        runner = load(saved.path, "bf16", weight_dtype=weight_dtype)
        chosen = teacher_forced(runner, saved.token_ids, row).argmax(-1)
        logits = at_ends(saved.logits)
        lost = logits.max(-1).values - logits.gather(1, chosen[:, None])[:, 0]
        assert lost.max() < allowed


def test_every_family_is_tried() -> None:
    assert {f"{kind}ForCausalLM" for kind, _ in MODELS.values()} == set(FAMILIES)
