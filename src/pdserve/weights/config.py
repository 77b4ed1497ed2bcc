"""What a model is: the numbers of a ``config.json``, checked.

A folder's ``config.json`` and ``generation_config.json`` become one frozen `ModelConfig`, once, at
start-up. Everything that would change the result and that we do not compute is refused here by
name: another architecture, a scaling of rotary embeddings that is not known, quantised weights.
What is computed only up to some length bounds the length: attention over a sliding window is that
over everything as long as a text fits one window. A key that is missing has the default of the
architecture's configuration class in transformers (`families`); where that default would be a guess
(sizes, the end token), the key is required.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.core.errors import ModelError
from pdserve.weights.families import FAMILIES, SUPPORTED, Family
from pdserve.weights.json_values import flag, positive, read_json_object, size
from pdserve.weights.rope import Rope, RopeScaling, parse_rope

NOPE_INTERVAL = 4
"""Of ``no_rope_layer_interval``, where neither it nor ``no_rope_layers`` is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and constants of a model. Sizes are counts of elements.

    Query projection is ``[num_heads * head_dim, hidden_size]``, key and value projections are
    ``[num_kv_heads * head_dim, hidden_size]``. ``max_model_tokens`` bounds prompt and answer
    together, and ``length_limit`` says why, where it is less than the model was made for. Any of
    ``eos_token_ids`` ends an answer.
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
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rotary_dim: int
    """Of each head, so many dimensions from the first on are rotated."""
    rope_scaling: RopeScaling | None = None
    unrotated_layers: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    length_limit: str = ""

    @property
    def fused(self) -> bool:
        """Whether projections of one input are one tensor of the checkpoint."""
        return FAMILIES[self.architecture].fused

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


def parse_config(config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """Check a parsed ``config.json`` (transformers 4 or 5 spelling). Raises `ModelError`."""
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    _refuse_what_is_not_computed(config, family)
    num_layers = size(config, "num_hidden_layers")
    num_heads, num_kv_heads, head_dim = _heads(config, family)
    vocab_size = size(config, "vocab_size")
    eos_token_ids, bos_token_id = _token_ids(config, generation, vocab_size)
    rope = parse_rope(config, family, head_dim, size(config, "max_position_embeddings"))
    max_model_tokens, length_limit = _longest(config, family, num_layers, rope)
    attention_bias = family.reads_attention_bias and flag(config, "attention_bias")
    return ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=size(config, "hidden_size"),
        intermediate_size=size(config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_model_tokens=max_model_tokens,
        rope_theta=rope.theta,
        rms_norm_eps=positive(config.get("rms_norm_eps", family.rms_norm_eps), "rms_norm_eps"),
        tie_word_embeddings=flag(config, "tie_word_embeddings", family.tied),
        qkv_bias=family.qkv_bias or attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=family.reads_mlp_bias and flag(config, "mlp_bias"),
        qk_norm=family.qk_norm,
        rotary_dim=rope.rotary_dim,
        rope_scaling=rope.scaling,
        unrotated_layers=_unrotated_layers(config, num_layers) if family.skips_rotation else (),
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_token_id,
        length_limit=length_limit,
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(
            f"config.json must name one architecture in 'architectures', not {names!r}. {SUPPORTED}"
        )
    if names[0] not in FAMILIES:
        raise ModelError(f"architecture {names[0]} is not supported. {SUPPORTED}")
    return names[0]


def _refuse_what_is_not_computed(config: Mapping[str, Any], family: Family) -> None:
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            raise ModelError(
                f"the weights are quantised ({key}): use the unquantised model. {SUPPORTED}"
            )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"hidden_act is {activation!r}; only 'silu' is supported")
    reads = {"attention_bias": family.reads_attention_bias, "mlp_bias": family.reads_mlp_bias}
    for key, is_read in reads.items():
        if config.get(key) and not is_read:
            raise ModelError(f"{key} is set, which a {family.model_type} model does not have")


def _heads(config: Mapping[str, Any], family: Family) -> tuple[int, int, int]:
    """Query heads, key and value heads, and the size of each."""
    num_heads = size(config, "num_attention_heads")
    as_many = family.kv_heads is None or "num_key_value_heads" in config
    num_kv_heads = size(config, "num_key_value_heads", num_heads if as_many else family.kv_heads)
    head_dim = size(config, "head_dim", family.head_dim or size(config, "hidden_size") // num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"num_attention_heads ({num_heads}) is not a multiple of num_key_value_heads "
            f"({num_kv_heads}); correct config.json"
        )
    if head_dim % 2:
        raise ModelError(f"head_dim is {head_dim}; rotary embeddings need an even number")
    return num_heads, num_kv_heads, head_dim


def _longest(
    config: Mapping[str, Any], family: Family, num_layers: int, rope: Rope
) -> tuple[int, str]:
    """The longest text that is computed right, and why it is not longer."""
    longest, why = rope.max_tokens, ""
    if rope.max_tokens < size(config, "max_position_embeddings"):
        why = (
            f"beyond {rope.max_tokens} tokens its rotary embeddings (longrope) change for all of "
            "the text, so KV that is there would be wrong"
        )
    window = _window(config, family, num_layers)
    if window is not None and window < longest:
        longest = window
        why = f"attention slides over windows of {window} tokens, and one window is served"
    return longest, why


def _window(config: Mapping[str, Any], family: Family, num_layers: int) -> int | None:
    """Tokens that the narrowest layer sees, if there is one that does not see all."""
    window = config.get("sliding_window", family.window)
    if family.window_is_opted_for and not flag(config, "use_sliding_window"):
        window = None
    layer_types = config.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list):
            raise ModelError(f"layer_types must be a list, not {layer_types!r}")
        others = {str(kind) for kind in layer_types} - {"full_attention", "sliding_attention"}
        if others:
            raise ModelError(f"layer_types has {', '.join(sorted(others))}. {SUPPORTED}")
        if "sliding_attention" not in layer_types:
            return None
        if window is None:
            raise ModelError("layer_types has sliding_attention, but there is no sliding_window")
    elif family.late_windows and (config.get("max_window_layers", 28) or 0) >= num_layers:
        return None
    return None if window is None else size({"sliding_window": window}, "sliding_window")


def _unrotated_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Layers whose queries and keys stay as they are (SmolLM3's "NoPE")."""
    rotated = config.get("no_rope_layers")
    if rotated is None:
        interval = size(config, "no_rope_layer_interval", NOPE_INTERVAL)
        return tuple(range(interval - 1, num_layers, interval))
    if not isinstance(rotated, list) or len(rotated) < num_layers:
        raise ModelError(f"no_rope_layers must be a list with one number for {num_layers} layers")
    return tuple(layer for layer in range(num_layers) if not rotated[layer])


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
