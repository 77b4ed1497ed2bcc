"""config.json in all its spellings, and everything that must be refused rather than guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pdserve.core.errors import ModelError
from pdserve.weights.config import ModelConfig, parse_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "eos_token_id": 2,
}
LONG = {"type": "su", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
PHI3 = {**LLAMA, "architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.75}
del PHI3["rms_norm_eps"]
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"]}
WINDOWS = {"use_sliding_window": True, "sliding_window": 300}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": None}


def with_values(base: dict[str, Any], **values: Any) -> dict[str, Any]:
    merged = {**base, **values}
    return {key: value for key, value in merged.items() if value is not ...}


def test_reads_a_llama_config() -> None:
    assert parse_config(LLAMA, {}) == ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=320,
        max_model_tokens=1024,
        rope_theta=500_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rotary_dim=16,
        eos_token_ids=(2,),
        bos_token_id=None,
    )


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 7e4},
        {"rope_theta": 7e4, "rope_scaling": None},
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}},
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 7e4}},
        {"rope_theta": 7e4, "rope_scaling": {"type": "default"}},
        {"rope_theta": 7e4, "rope_parameters": {"partial_rotary_factor": 1.0}},
    ],
)
def test_rope_theta_in_every_spelling(spelling: dict[str, Any]) -> None:
    assert parse_config(with_values(LLAMA, **spelling), {}).rope_theta == 7e4


def test_missing_keys_have_the_defaults_of_transformers() -> None:
    config = with_values(LLAMA, rope_theta=..., rms_norm_eps=..., num_key_value_heads=...)
    parsed = parse_config(config, {})
    assert (parsed.rope_theta, parsed.rms_norm_eps, parsed.num_kv_heads) == (10_000.0, 1e-6, 4)
    mistral = with_values(MISTRAL, num_key_value_heads=..., num_attention_heads=16, hidden_size=256)
    assert parse_config(mistral, {}).num_kv_heads == 8


def test_a_head_dim_of_its_own_is_kept() -> None:
    assert parse_config(with_values(LLAMA, head_dim=32), {}).head_dim == 32


@pytest.mark.parametrize(
    ("config_eos", "generation", "expected"),
    [
        (2, {}, (2,)),
        ([2, 5, 2], {}, (2, 5)),
        (2, {"eos_token_id": [7, 9]}, (7, 9)),
        (2, {"eos_token_id": None}, (2,)),
        (None, {}, ()),
        (..., {"eos_token_id": 3}, (3,)),
    ],
)
def test_end_tokens(config_eos: Any, generation: dict[str, Any], expected: tuple[int, ...]) -> None:
    parsed = parse_config(with_values(LLAMA, eos_token_id=config_eos), generation)
    assert parsed.eos_token_ids == expected


@pytest.mark.parametrize(
    ("base", "change", "longest", "why"),
    [
        (MISTRAL, {}, 1024, ""),
        (MISTRAL, {"sliding_window": 400}, 400, "windows of 400"),
        (MISTRAL, {"sliding_window": ..., "max_position_embeddings": 8192}, 4096, "windows"),
        (MISTRAL, {"sliding_window": 4096}, 1024, ""),
        (LLAMA, {"layer_types": ["full_attention", "full_attention"]}, 1024, ""),
        (QWEN2, {"sliding_window": 300, "max_window_layers": 1}, 1024, ""),
        (QWEN2, {**WINDOWS, "max_window_layers": 2}, 1024, ""),
        (QWEN2, {**WINDOWS, "max_window_layers": 1}, 300, "windows of 300"),
        (QWEN2, {**WINDOWS, "max_window_layers": 0}, 300, "windows of 300"),
        (QWEN2, {**WINDOWS, "layer_types": ["full_attention"] * 2}, 1024, ""),
        (PHI3, {"rope_scaling": LONG, "original_max_position_embeddings": 256}, 256, "longrope"),
        (PHI3, {"rope_scaling": LONG}, 1024, ""),
        (LLAMA, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 1024, ""),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, 1024, ""),
        (QWEN2, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, 4096, ""),
    ],
)
def test_how_long_a_text_is_computed_right(
    base: dict[str, Any], change: dict[str, Any], longest: int, why: str
) -> None:
    parsed = parse_config(with_values(base, **change), {})
    assert parsed.max_model_tokens == longest
    assert why in parsed.length_limit
    assert bool(why) == bool(parsed.length_limit)


def test_what_the_architectures_have_of_their_own() -> None:
    qwen2, qwen3, phi3 = (parse_config(config, {}) for config in (QWEN2, QWEN3, PHI3))
    assert (qwen2.qkv_bias, qwen2.attention_out_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    assert (phi3.fused, phi3.rotary_dim, phi3.rms_norm_eps) == (True, 12, 1e-5)
    smollm3 = with_values(LLAMA, architectures=["SmolLM3ForCausalLM"], num_hidden_layers=9)
    assert parse_config(smollm3, {}).unrotated_layers == (3, 7)
    assert parse_config(smollm3, {}).tie_word_embeddings
    assert parse_config({**smollm3, "no_rope_layers": [1] * 8 + [0, 0]}, {}).unrotated_layers == (
        8,
    )


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        (LLAMA, {"architectures": ["Gemma3ForCausalLM"]}, "Gemma3ForCausalLM"),
        (LLAMA, {"architectures": ...}, "architectures"),
        (LLAMA, {"architectures": ["LlamaForCausalLM", "Other"]}, "one architecture"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "factor"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1}}, "mscale"),
        (LLAMA, {"rope_parameters": {"rope_type": "ntk-by-layer"}}, "ntk-by-layer"),
        (PHI3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        (PHI3, {"rope_scaling": {**LONG, "short_factor": [1.0]}}, "short_factor.* 6 numbers"),
        (PHI3, {"partial_rotary_factor": 0.2}, "rotates 3 of 16"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_parameters"),
        (LLAMA, {"sliding_window": 0}, "sliding_window"),
        (MISTRAL, {"layer_types": ["sliding_attention"]}, "sliding_attention"),
        (MISTRAL, {"layer_types": ["linear_attention"]}, "linear_attention"),
        (MISTRAL, {"attention_bias": True}, "attention_bias"),
        ({**LLAMA, "architectures": ["SmolLM3ForCausalLM"]}, {"no_rope_layers": [1]}, "no_rope"),
        (LLAMA, {"hidden_act": "gelu"}, "gelu"),
        (LLAMA, {"hidden_size": ...}, "hidden_size"),
        (LLAMA, {"hidden_size": "64"}, "hidden_size"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers"),
        (LLAMA, {"vocab_size": 0}, "vocab_size"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads"),
        (LLAMA, {"head_dim": 15}, "head_dim"),
        (LLAMA, {"rms_norm_eps": -1.0}, "rms_norm_eps"),
        (LLAMA, {"rope_theta": "big"}, "rope_theta"),
        (LLAMA, {"rope_theta": float("nan")}, "rope_theta"),
        (LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings"),
        (LLAMA, {"eos_token_id": ...}, "eos_token_id"),
        (LLAMA, {"eos_token_id": 320}, "eos_token_id"),
        (LLAMA, {"eos_token_id": ["2"]}, "eos_token_id"),
        (LLAMA, {"bos_token_id": -1}, "bos_token_id"),
    ],
)
def test_refuses_by_name(base: dict[str, Any], change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        parse_config(with_values(base, **change), {})


def test_an_unsupported_model_is_told_what_works() -> None:
    with pytest.raises(ModelError, match=r"GemmaForCausalLM.* serves LlamaForCausalLM, .*Phi3"):
        parse_config(with_values(LLAMA, architectures=["GemmaForCausalLM"]), {})


def test_reads_both_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (1, 2)


@pytest.mark.parametrize("content", [None, "{", "[]", b"\xff\xfe"])
def test_a_broken_config_file_is_named(tmp_path: Path, content: str | bytes | None) -> None:
    if isinstance(content, str):
        (tmp_path / "config.json").write_text(content)
    elif content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_agrees_with_transformers(tiny_model_path: Path) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.from_pretrained(tiny_model_path)
    ours = ModelConfig.from_folder(tiny_model_path)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.head_dim == theirs.head_dim
    assert ours.max_model_tokens == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert list(ours.eos_token_ids) == theirs.eos_token_id
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
