"""The key-value part of a GGUF file as a ``config.json``.

Metadata that would change the result and is not understood is refused. Key names: the GGUF
specification (ggml, docs/gguf.md) and the ``gguf`` library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pdserve.core.errors import ModelError
from pdserve.weights.families import FAMILIES
from pdserve.weights.json_values import size

if TYPE_CHECKING:
    from gguf import GGUFReader


@dataclass(frozen=True, slots=True)
class Form:
    """How llama.cpp stores an architecture."""

    architecture: str
    """A name in `FAMILIES`."""
    interleaved: bool = False
    """Query and key rows that are rotated together stand side by side."""


FORMS = {
    "llama": Form("LlamaForCausalLM", interleaved=True),  # Mistral too
    "qwen2": Form("Qwen2ForCausalLM"),
    "qwen3": Form("Qwen3ForCausalLM"),
    "smollm3": Form("SmolLM3ForCausalLM", interleaved=True),
    "phi3": Form("Phi3ForCausalLM"),
}
"""By ``general.architecture``."""

# Every key behind "ARCHITECTURE." that is understood; another one (experts, say) is refused.
_KEYS = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "rope.freq_base",
        "rope.dimension_count",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.attn_factor",
        "rope.scaling.finetuned",
        "vocab_size",
    }
)

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Constants that are stored as tensors: divisors of the frequencies."""

# Llama 3.1 to 3.3: a GGUF file has the divisors only; (factor, original length).
_LLAMA3_KNOWN = ((8.0, 8192), (32.0, 8192))

_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>")
"""Control tokens that end an answer in a chat, whatever the file names as its end token."""

CONTROL_TOKEN = 3


class Metadata:
    """Reads the keys of one file. Raises `ModelError` for an architecture that is not ours."""

    def __init__(self, reader: GGUFReader) -> None:
        self._reader = reader
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture: str = self.required("general.architecture")
        if self.architecture not in FORMS:
            raise ModelError(
                f"the GGUF file is of architecture {self.architecture!r}; pdserve reads "
                f"{', '.join(FORMS)}"
            )
        num_parts = self.get("split.count", 0)
        if num_parts > 1:
            raise ModelError(
                f"the GGUF file is one of {num_parts} parts of a model; put them together with "
                "llama-gguf-split --merge"
            )
        self.form = FORMS[self.architecture]
        prefix = f"{self.architecture}."
        for key in reader.fields:
            if key.startswith(prefix) and key.removeprefix(prefix) not in _KEYS:
                raise ModelError(f"the GGUF file has {key}, which this converter does not know")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, wherever it stands."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def required(self, key: str) -> Any:
        """The same; a missing one is an error."""
        value = self.get(key)
        if value is None:
            raise ModelError(f"the GGUF file lacks {key}")
        return value

    def own(self, key: str, default: Any = None) -> Any:
        """The value of a key of the architecture."""
        return self.get(f"{self.architecture}.{key}", default)

    def own_required(self, key: str) -> Any:
        """The same; a missing one is an error."""
        return self.required(f"{self.architecture}.{key}")

    def numbers(self, name: str) -> list[float]:
        """The values of a small fp32 tensor."""
        return [_decimal(value) for value in np.asarray(self.tensors[name].data).ravel().tolist()]


def config_json(metadata: Metadata) -> dict[str, Any]:
    """``config.json`` in the spelling that transformers 4 and 5 both read."""
    form, family = metadata.form, FAMILIES[metadata.form.architecture]
    hidden_size = metadata.own_required("embedding_length")
    num_heads = size({"head_count": metadata.own_required("attention.head_count")}, "head_count")
    head_dim = metadata.own("attention.key_length", hidden_size // num_heads)
    if metadata.own("attention.value_length", head_dim) != head_dim:
        raise ModelError("the GGUF file has values of another size than keys")
    config: dict[str, Any] = {
        "architectures": [form.architecture],
        "model_type": family.model_type,
        "vocab_size": len(metadata.required("tokenizer.ggml.tokens")),
        "hidden_size": hidden_size,
        "intermediate_size": metadata.own_required("feed_forward_length"),
        "num_hidden_layers": metadata.own_required("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.own("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.own_required("context_length"),
        "rope_theta": _decimal(metadata.own("rope.freq_base", 10_000.0)),
        "rms_norm_eps": _decimal(metadata.own_required("attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in metadata.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(metadata),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "sliding_window": metadata.own("attention.sliding_window") or None,
    }
    if family.reads_attention_bias:
        config["attention_bias"] = "blk.0.attn_output.bias" in metadata.tensors
    if family.reads_mlp_bias:
        config["mlp_bias"] = "blk.0.ffn_down.bias" in metadata.tensors
    if family.window_is_opted_for and config["sliding_window"]:
        config["use_sliding_window"], config["max_window_layers"] = True, 0
    rotary_dim = metadata.own("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        if not family.rotates_parts:
            raise ModelError("the GGUF file rotates only a part of each head")
        config["partial_rotary_factor"] = rotary_dim / head_dim
    return {**config, **_rope_scaling(metadata, config["rope_theta"], rotary_dim)}


def _end_tokens(metadata: Metadata) -> int | list[int]:
    """One, or the end of a text and those of an answer in a chat."""
    end: int = metadata.required("tokenizer.ggml.eos_token_id")
    ends = [end]
    for key in ("eot_token_id", "eom_token_id"):
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        if token_id is not None:
            ends.append(token_id)
    tokens = metadata.required("tokenizer.ggml.tokens")
    kinds = metadata.required("tokenizer.ggml.token_type")
    for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == CONTROL_TOKEN and token in _TURN_ENDS:
            ends.append(token_id)
    ends = list(dict.fromkeys(ends))
    return ends[0] if len(ends) == 1 else ends


def _rope_scaling(metadata: Metadata, theta: float, rotary_dim: int) -> dict[str, Any]:
    """The keys of ``config.json`` that say how rotary embeddings are scaled, if they are."""
    kind = metadata.own("rope.scaling.type", "none")
    factor = metadata.own("rope.scaling.factor")
    original = metadata.own("rope.scaling.original_context_length")
    present = [name for name in ROPE_TENSORS if name in metadata.tensors]
    if present == [ROPE_TENSORS[0]] and kind == "none":
        divisors = metadata.numbers(ROPE_TENSORS[0])
        return {"rope_scaling": _llama3_scaling(divisors, theta, rotary_dim)}
    if present == list(ROPE_TENSORS[1:]) and original and kind in ("none", "longrope"):
        long: dict[str, Any] = {"rope_type": "longrope"}
        long["short_factor"], long["long_factor"] = map(metadata.numbers, ROPE_TENSORS[1:])
        if (attention := metadata.own("rope.scaling.attn_factor")) is not None:
            long["attention_factor"] = _decimal(attention)
        return {"rope_scaling": long, "original_max_position_embeddings": original}
    if present or metadata.own("rope.scaling.attn_factor", 1.0) != 1.0:
        named = ", ".join(present) or "rope.scaling.attn_factor"
        raise ModelError(f"the GGUF file has {named} with rope scaling of type {kind!r}")
    if kind == "none":
        return {}
    if kind == "linear" and factor:
        return {"rope_scaling": {"rope_type": "linear", "factor": _decimal(factor)}}
    if kind == "yarn" and factor and original:
        yarn = {"rope_type": "yarn", "factor": _decimal(factor)}
        return {"rope_scaling": {**yarn, "original_max_position_embeddings": original}}
    raise ModelError(f"the GGUF file has rope.scaling.type {kind!r}, or too little beside it")


def _llama3_scaling(divisors: list[float], theta: float, rotary_dim: int) -> dict[str, Any]:
    """The constants of Llama 3 whose divisors these are."""
    for factor, original in _LLAMA3_KNOWN:
        expected = [
            _llama3_divisor(theta ** (2 * i / rotary_dim), factor, original)
            for i in range(rotary_dim // 2)
        ]
        if np.shape(divisors) == np.shape(expected) and np.allclose(divisors, expected, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise ModelError(
        f"the GGUF file has {ROPE_TENSORS[0]} that are not those of Llama 3.1, 3.2 or 3.3"
    )


def _llama3_divisor(wavelength: float, factor: float, original: int) -> float:
    """``wavelength`` in positions over 2 pi; slow below one turn in the original length, fast from
    four on (arXiv:2407.21783)."""
    turns = original / (2 * math.pi * wavelength)
    if turns > 4:
        return 1.0
    if turns < 1:
        return factor
    share = (turns - 1) / (4 - 1)
    return 1 / ((1 - share) / factor + share)


def _decimal(value: float) -> float:
    """The shortest decimal that is the same fp32 number: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
