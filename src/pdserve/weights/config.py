"""What a model is: the numbers of a ``config.json``, checked.

A folder's ``config.json`` and ``generation_config.json`` become one frozen `ModelConfig`, once, at
start-up. Everything that would change the result and that we do not compute is refused here by
name: another architecture, scaled rotary embeddings, sliding windows, quantised weights. A key that
is missing has the default of the architecture's configuration class in transformers (5.23), so that
both read the same file in the same way; where that default would be a guess (sizes, the end
token), the key is required.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.core.errors import ModelError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
"""Computed alike: Mistral is Llama with a sliding window, which must be switched off."""

SUPPORTED = (
    "pdserve serves LlamaForCausalLM, and MistralForCausalLM without sliding window, with plain "
    "rotary embeddings and unquantised fp32, bf16 or fp16 weights"
)

# Keys of rope_parameters (rope_scaling) that mean nothing beside rope_type "default".
_HARMLESS_ROPE_KEYS = frozenset(
    {
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
        "original_max_position_embeddings",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and constants of a Llama-family model. Sizes are counts of elements.

    Query projection is ``[num_heads * head_dim, hidden_size]``, key and value projections are
    ``[num_kv_heads * head_dim, hidden_size]``. ``max_model_tokens`` bounds prompt and answer
    together. Any of ``eos_token_ids`` ends an answer.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_tokens: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @classmethod
    def from_folder(cls, path: Path) -> ModelConfig:
        """Read ``config.json`` and, if there is one, ``generation_config.json``.

        Raises `ModelError` if a file cannot be read or the model cannot be served.
        """
        config = read_json_object(path / "config.json")
        generation_path = path / "generation_config.json"
        generation = read_json_object(generation_path) if generation_path.exists() else {}
        try:
            return parse_config(config, generation)
        except ModelError as error:
            raise ModelError(f"cannot serve the model in {path}: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the model folder, or `ModelError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent} has no {path.name}; a model folder in Hugging Face layout needs it"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}; copy or pull the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object; copy or pull the model again")
    return value


def parse_config(config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """Check a parsed ``config.json`` (transformers 4 or 5 spelling). Raises `ModelError`."""
    architecture = _architecture(config)
    _refuse_what_is_not_computed(config, architecture)
    num_heads = _size(config, "num_attention_heads")
    default_kv_heads = 8 if architecture == "MistralForCausalLM" else num_heads
    hidden_size = _size(config, "hidden_size")
    vocab_size = _size(config, "vocab_size")
    eos_token_ids, bos_token_id = _token_ids(config, generation, vocab_size)
    parsed = ModelConfig(
        architecture=architecture,
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=_size(config, "num_key_value_heads", default_kv_heads),
        head_dim=_size(config, "head_dim", hidden_size // num_heads),
        vocab_size=vocab_size,
        max_model_tokens=_size(config, "max_position_embeddings"),
        rope_theta=_rope_theta(config),
        rms_norm_eps=_positive(config.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        tie_word_embeddings=_flag(config, "tie_word_embeddings"),
        attention_bias=_flag(config, "attention_bias"),
        mlp_bias=_flag(config, "mlp_bias"),
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_token_id,
    )
    if parsed.num_heads % parsed.num_kv_heads:
        raise ModelError(
            f"num_attention_heads ({parsed.num_heads}) is not a multiple of num_key_value_heads "
            f"({parsed.num_kv_heads}); correct config.json"
        )
    if parsed.head_dim % 2:
        raise ModelError(f"head_dim is {parsed.head_dim}; rotary embeddings need an even number")
    return parsed


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(
            f"config.json must name one architecture in 'architectures', not {names!r}. {SUPPORTED}"
        )
    if names[0] not in ARCHITECTURES:
        raise ModelError(f"architecture {names[0]} is not supported. {SUPPORTED}")
    return names[0]


def _refuse_what_is_not_computed(config: Mapping[str, Any], architecture: str) -> None:
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            raise ModelError(
                f"the weights are quantised ({key}): use the unquantised model. {SUPPORTED}"
            )
    # An absent key means a window of 4096 to transformers' MistralConfig; Llama has no windows.
    default_window = 4096 if architecture == "MistralForCausalLM" else None
    window = config.get("sliding_window", default_window)
    if window is not None:
        raise ModelError(f"sliding_window is {window}; it must be null. {SUPPORTED}")
    other_layers = set(config.get("layer_types") or ()) - {"full_attention"}
    if other_layers:
        raise ModelError(f"layer_types has {', '.join(sorted(other_layers))}. {SUPPORTED}")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"hidden_act is {activation!r}; only 'silu' is supported")
    if architecture == "MistralForCausalLM":
        for key in ("attention_bias", "mlp_bias"):
            if config.get(key):
                raise ModelError(f"{key} is set, which MistralForCausalLM does not have")


def _rope_theta(config: Mapping[str, Any]) -> float:
    """Base of the rotary embeddings; refuses every way of scaling them.

    transformers 4 writes ``rope_theta`` and ``rope_scaling`` at top level, transformers 5 puts both
    into ``rope_parameters``. Inside wins over outside, and a ``rope_scaling`` over
    ``rope_parameters``, as in transformers 5.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ModelError(f"rope_parameters must be an object, not {parameters!r}")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    unknown = sorted(set(parameters) - _HARMLESS_ROPE_KEYS)
    if kind != "default":
        raise ModelError(f"rotary embeddings are scaled (rope_type {kind!r}). {SUPPORTED}")
    if unknown:
        raise ModelError(f"rope_parameters has {', '.join(map(repr, unknown))}. {SUPPORTED}")
    for place in (parameters, config):
        if place.get("partial_rotary_factor", 1.0) not in (1, None):
            raise ModelError(f"partial_rotary_factor is not 1. {SUPPORTED}")
    theta = parameters.get("rope_theta", config.get("rope_theta"))
    return 10_000.0 if theta is None else _positive(theta, "rope_theta")


def _token_ids(
    config: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int
) -> tuple[tuple[int, ...], int | None]:
    """End tokens and begin token. The generation config outranks the model's, as in `generate`."""
    sources = [source for source in (generation, config) if "eos_token_id" in source]
    if not sources:
        raise ModelError(
            "neither generation_config.json nor config.json has 'eos_token_id', so no answer would "
            "ever end; add it (null if the model really has none)"
        )
    # A null in the generation config does not hide the model's own end token.
    eos = next((s["eos_token_id"] for s in sources if s["eos_token_id"] is not None), None)
    bos = generation.get("bos_token_id")
    bos = config.get("bos_token_id") if bos is None else bos
    ids: list[Any] = [] if eos is None else eos if isinstance(eos, list) else [eos]
    for name, values in (("eos_token_id", ids), ("bos_token_id", [] if bos is None else [bos])):
        for value in values:
            if type(value) is not int or not 0 <= value < vocab_size:
                raise ModelError(
                    f"{name} is {value!r}; it must be a token id from 0 to {vocab_size - 1}"
                )
    return tuple(dict.fromkeys(ids)), bos


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"config.json lacks {key!r}")
    if type(value) is not int or value < 1:
        raise ModelError(f"{key} is {value!r}; it must be a positive integer")
    return value


def _positive(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"{key} is {value!r}; it must be a number")
    if not math.isfinite(value) or value <= 0:
        raise ModelError(f"{key} is {value!r}; it must be positive")
    return float(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise ModelError(f"{key} is {value!r}; it must be true or false")
    return value
