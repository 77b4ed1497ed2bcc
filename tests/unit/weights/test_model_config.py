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
        attention_bias=False,
        mlp_bias=False,
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


def test_mistral_without_a_window_is_llama() -> None:
    assert parse_config(MISTRAL, {}).architecture == "MistralForCausalLM"


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        (LLAMA, {"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        (LLAMA, {"architectures": ...}, "architectures"),
        (LLAMA, {"architectures": ["LlamaForCausalLM", "Other"]}, "one architecture"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_parameters"),
        (LLAMA, {"sliding_window": 4096}, "sliding_window"),
        (MISTRAL, {"sliding_window": 4096}, "sliding_window"),
        (MISTRAL, {"sliding_window": ...}, "sliding_window"),
        (MISTRAL, {"layer_types": ["sliding_attention"]}, "sliding_attention"),
        (MISTRAL, {"attention_bias": True}, "attention_bias"),
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
    with pytest.raises(ModelError, match=r"pdserve serves LlamaForCausalLM, and Mistral"):
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
