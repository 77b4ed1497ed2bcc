"""A small model of any architecture, with random weights and a complete byte-level tokenizer.

For tests and for trying pdserve out: written in milliseconds, served in megabytes, and a real model
in every other respect, down to the chat template. Its text is noise, but noise that depends on
every token before it, so any mistake in a KV cache shows.

The tokenizer has all 256 bytes, so every text survives encoding and decoding, and merges that split
characters of several bytes between tokens, so a detokenizer has something to do.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pdserve.core.errors import ModelError
from pdserve.weights.config import ModelConfig
from pdserve.weights.families import FAMILIES
from pdserve.weights.folder import expected_shapes

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2. The last one ends an answer."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_HF_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_FIRST_MERGE_ID = len(SPECIAL_TOKENS) + 256

DEFAULT_CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=384,
    max_model_tokens=4096,
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rotary_dim=16,
    eos_token_ids=(2,),
    bos_token_id=None,
)

# Grown into merges from the left, so each word also gives its beginnings as tokens. Those of the
# second line begin with incomplete characters.
_MERGED_WORDS = (
    " the and ing tion er ou re st en to of in is on at it he ha wor ld lo th or an ti es ar as le",
    " \u00e9 \u00fc \u00f1 \u4e2d \u6587 \u3042 \u043f\u0440 \U0001f642 \U0001f600 \u200d",
    " def return self import from class print if for while with not None True == != -> () [] {}",
    " prefill decode cache block token worker request answer question because people through",
)


def random_config(**overrides: Any) -> ModelConfig:
    """`DEFAULT_CONFIG` with other values; heads are rotated whole unless ``rotary_dim`` is one."""
    head_dim = overrides.get("head_dim", DEFAULT_CONFIG.head_dim)
    family = FAMILIES[overrides.get("architecture", DEFAULT_CONFIG.architecture)]
    own = {"rotary_dim": head_dim, "qkv_bias": family.qkv_bias, "qk_norm": family.qk_norm}
    return replace(DEFAULT_CONFIG, **{**own, **overrides})


def write_random_model(
    path: Path | str, *, seed: int = 0, dtype: str = "fp32", **overrides: Any
) -> ModelConfig:
    """Write a model folder in Hugging Face layout, and say what is in it.

    ``overrides`` are fields of `ModelConfig` that differ from `random_config`. The same arguments
    give the same bytes. ``path`` is made if it does not exist. ``vocab_size`` beyond the built-in
    merges leaves ids without text, as padded vocabularies do. Raises `ModelError` for a vocabulary
    that cannot hold the 256 bytes, or another dtype than ``fp32`` and ``bf16``.
    """
    config = random_config(**overrides)
    if config.rope_scaling is not None:
        raise ModelError("a random model has plain rotary embeddings: leave rope_scaling out")
    if dtype not in _HF_DTYPES:
        raise ModelError(f"dtype is {dtype!r}; choose one of {', '.join(_HF_DTYPES)}")
    if config.vocab_size < _FIRST_MERGE_ID:
        raise ModelError(
            f"vocab_size is {config.vocab_size}; 256 bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens need at least {_FIRST_MERGE_ID}"
        )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _config_json(config, dtype))
    _write_json(
        folder / "generation_config.json",
        {"eos_token_id": list(config.eos_token_ids), "bos_token_id": config.bos_token_id},
    )
    _write_tokenizer(folder, config)
    _write_weights(folder / "model.safetensors", config, seed, dtype)
    return config


def _config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    family = FAMILIES[config.architecture]
    values: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": family.model_type,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_model_tokens,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "sliding_window": None,
        "eos_token_id": list(config.eos_token_ids),
        "bos_token_id": config.bos_token_id,
        "pad_token_id": 0,
        "torch_dtype": _HF_DTYPES[dtype],
    }
    if family.reads_attention_bias:
        values["attention_bias"] = config.attention_out_bias
    if family.reads_mlp_bias:
        values["mlp_bias"] = config.mlp_bias
    if family.rotates_parts:
        values["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    if family.skips_rotation:
        skipped = config.unrotated_layers
        values["no_rope_layers"] = [int(n not in skipped) for n in range(config.num_layers)]
    return values


def _write_tokenizer(folder: Path, config: ModelConfig) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokens = [*SPECIAL_TOKENS, *sorted(byte_level.alphabet())]
    merges: list[tuple[str, str]] = []
    known = set(tokens)
    for line in _MERGED_WORDS:
        for word in line.split(" ")[1:]:
            for text in (word, f" {word}"):
                symbols = byte_level.pre_tokenize_str(text)[0][0]
                left = symbols[0]
                for right in symbols[1:]:
                    if left + right not in known and len(tokens) < config.vocab_size:
                        known.add(left + right)
                        tokens.append(left + right)
                        merges.append((left, right))
                    left += right
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_model_tokens,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_weights(path: Path, config: ModelConfig, seed: int, dtype: str) -> None:
    """Matrices keep the scale of what goes through them; the output head spreads the logits.

    Random numbers come from numpy's PCG64, whose stream is the same on every machine.
    """
    import torch
    from safetensors.torch import save_file

    generator = np.random.Generator(np.random.PCG64(seed))
    weights: dict[str, torch.Tensor] = {}
    for name, shape in expected_shapes(config).items():
        values = generator.standard_normal(shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            values = 1.0 + 0.1 * values
        elif name.endswith(".bias"):
            values = 0.1 * values
        elif name.startswith("model.layers."):
            values = values / np.sqrt(np.float32(shape[1]))
        else:
            # Logits with a standard deviation of about 3: few near ties, and not one-sided.
            values = values * (3.0 / np.sqrt(np.float32(config.hidden_size)))
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        weights[name] = tensor.to(getattr(torch, _HF_DTYPES[dtype]))
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
