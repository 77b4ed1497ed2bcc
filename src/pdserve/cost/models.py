"""Models by name: their shapes, the longest text each was made for, and where the numbers are from.

All are dense decoders of bf16 or fp16 weights. The numbers are those of each model's public
``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdserve.core.errors import ConfigError
from pdserve.cost.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """``max_model_tokens``: prompt and answer together. ``source``: where it is from."""

    shape: ModelShape
    max_model_tokens: int
    source: str


def _model(
    sizes: tuple[int, int, int, int, int, int, int],
    max_model_tokens: int,
    source: str,
    *,
    gated: bool = True,
    tied: bool = False,
) -> KnownModel:
    layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary = sizes
    shape = ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        mlp_matrices=3 if gated else 2,
        tied=tied,
    )
    return KnownModel(
        shape=shape, max_model_tokens=max_model_tokens, source=f"config.json of {source}"
    )


# Layers, hidden and intermediate size, heads, KV heads, head size, vocabulary.
MODELS: Mapping[str, KnownModel] = {
    "smollm2-135m": _model(
        (30, 576, 1536, 9, 3, 64, 49152), 8192, "HuggingFaceTB/SmolLM2-135M-Instruct", tied=True
    ),
    "llama-2-70b": _model((80, 8192, 28672, 64, 8, 128, 32000), 4096, "meta-llama/Llama-2-70b-hf"),
    "llama-3-8b": _model((32, 4096, 14336, 32, 8, 128, 128256), 8192, "meta-llama/Meta-Llama-3-8B"),
    "llama-3-70b": _model(
        (80, 8192, 28672, 64, 8, 128, 128256), 8192, "meta-llama/Meta-Llama-3-70B"
    ),
    "llama-3.1-8b": _model(
        (32, 4096, 14336, 32, 8, 128, 128256), 131072, "meta-llama/Llama-3.1-8B"
    ),
    "llama-3.1-70b": _model(
        (80, 8192, 28672, 64, 8, 128, 128256), 131072, "meta-llama/Llama-3.1-70B"
    ),
    "mistral-7b": _model(
        (32, 4096, 14336, 32, 8, 128, 32768), 32768, "mistralai/Mistral-7B-Instruct-v0.3"
    ),
    "qwen2.5-7b": _model((28, 3584, 18944, 28, 4, 128, 152064), 32768, "Qwen/Qwen2.5-7B-Instruct"),
    "qwen2.5-32b": _model(
        (64, 5120, 27648, 40, 8, 128, 152064), 32768, "Qwen/Qwen2.5-32B-Instruct"
    ),
    "qwen2.5-72b": _model(
        (80, 8192, 29568, 64, 8, 128, 152064), 32768, "Qwen/Qwen2.5-72B-Instruct"
    ),
    "qwen3-8b": _model((36, 4096, 12288, 32, 8, 128, 151936), 40960, "Qwen/Qwen3-8B"),
    "qwen3-32b": _model((64, 5120, 25600, 64, 8, 128, 151936), 40960, "Qwen/Qwen3-32B"),
    "bloom-176b": _model(
        (70, 14336, 57344, 112, 112, 128, 250880),
        16384,
        "bigscience/bloom; trained on 2048 tokens, but its positions (ALiBi) have no end, and "
        "Splitwise ran prompts and answers of 8192 each",
        gated=False,
        tied=True,
    ),
    "opt-13b": _model(
        (40, 5120, 20480, 40, 40, 128, 50272), 2048, "facebook/opt-13b", gated=False, tied=True
    ),
    "opt-66b": _model(
        (64, 9216, 36864, 72, 72, 128, 50272), 2048, "facebook/opt-66b", gated=False, tied=True
    ),
}

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3")
"""``model_type`` of those that the keys of a ``config.json`` say everything of."""


def model_of_config(config: Mapping[str, Any], source: str) -> KnownModel:
    """The model of a parsed ``config.json``. ``source`` names it to people. Raises `ConfigError`
    if it is not one of `LLAMA_LIKE`, or lacks a number."""
    kind = config.get("model_type")
    if kind not in LLAMA_LIKE:
        raise ConfigError(
            f"the model type of {source} is {kind!r}, and only {', '.join(LLAMA_LIKE)} are read "
            "from a config.json; write its numbers as a [model.NAME] into a catalogue"
        )

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key, default)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{source} has no usable {key}: it is {value!r}")
        return value

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    shape = ModelShape(
        num_layers=number("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=number("intermediate_size"),
        num_heads=heads,
        num_kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", max(1, hidden // heads)),
        vocab_size=number("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", kind == "smollm3")),
    )
    return KnownModel(
        shape=shape, max_model_tokens=number("max_position_embeddings"), source=source
    )
