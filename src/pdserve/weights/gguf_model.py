"""From one GGUF file to a model folder in Hugging Face layout.

A GGUF file carries weights, tokenizer, chat template and constants of a model in one, quantised,
with llama.cpp's names. `convert` turns a Llama-architecture file with a byte-level BPE tokenizer
into bf16 safetensors, ``config.json``, ``tokenizer.json`` and the rest. It runs once, at pull time.
Metadata that would change the result and is not understood is refused.

Layout and key names: the GGUF specification (ggml, docs/gguf.md) and the ``gguf`` library, whose
`dequantize` restores the values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pdserve.core.errors import ModelError
from pdserve.weights.progress import Report, silent

if TYPE_CHECKING:
    import tokenizers
    from gguf import GGUFReader

# llama.cpp names -> Hugging Face names, without ".weight".
_TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")

# Every "llama.*" key that is understood; another one (rope scaling, experts) is refused.
_LLAMA_KEYS = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.dimension_count",
        "vocab_size",
    }
)

# llama.cpp's name of a pre-tokenizer -> whether each digit stands alone before GPT-2's split.
# (llama.cpp, llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_*)
_DIGITS_STAND_ALONE = {"smollm": True, "gpt-2": False}

_CONTROL_TOKEN = 3
_NAMED_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def convert(gguf_path: Path, folder: Path, report: Report = silent) -> None:
    """Write the model in ``gguf_path`` to the existing empty ``folder``.

    Weights become bf16 (rounded to nearest even). Peak memory is the bf16 model plus one tensor in
    fp32. Raises `ModelError` if the file is not of the supported kind, `OSError` if writing fails.
    """
    from gguf import GGUFReader

    report("reading GGUF", 0, 0)
    try:
        reader = GGUFReader(gguf_path)
    except (ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{gguf_path.name} is no readable GGUF file: {error}") from error
    metadata = _Metadata(reader)
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = metadata.model_config(tied)
    tokens: list[str] = metadata.required("tokenizer.ggml.tokens")
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(config))
    tokenizer_json = metadata.tokenizer(tokens).to_str(pretty=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", metadata.tokenizer_config(tokens))
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_weights(reader, config, folder / "model.safetensors", report)


class _Metadata:
    """The key-value part of a GGUF file, as the JSON files of the other layout."""

    def __init__(self, reader: GGUFReader) -> None:
        self._reader = reader

    def get(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def required(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ModelError(f"the GGUF file lacks {key}")
        return value

    def model_config(self, tied: bool) -> dict[str, Any]:
        """``config.json`` in the spelling that transformers 4 and 5 both read."""
        architecture = self.required("general.architecture")
        if architecture != "llama":
            raise ModelError(f"the GGUF file is of architecture {architecture!r}, not 'llama'")
        for key in self._reader.fields:
            if key.startswith("llama.") and key.removeprefix("llama.") not in _LLAMA_KEYS:
                raise ModelError(f"the GGUF file has {key}, which this converter does not know")
        hidden_size = self.required("llama.embedding_length")
        num_heads = self.required("llama.attention.head_count")
        head_dim = hidden_size // num_heads
        if self.get("llama.rope.dimension_count", head_dim) != head_dim:
            raise ModelError("the GGUF file rotates only a part of each head")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(self.required("tokenizer.ggml.tokens")),
            "hidden_size": hidden_size,
            "intermediate_size": self.required("llama.feed_forward_length"),
            "num_hidden_layers": self.required("llama.block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self.get("llama.attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "max_position_embeddings": self.required("llama.context_length"),
            "rope_theta": _decimal(self.get("llama.rope.freq_base", 10_000.0)),
            "rms_norm_eps": _decimal(self.required("llama.attention.layer_norm_rms_epsilon")),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": tied,
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.required("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id"),
            "torch_dtype": "bfloat16",
        }

    def tokenizer(self, tokens: list[str]) -> tokenizers.Tokenizer:
        """The byte-level BPE tokenizer: vocabulary, merges, control tokens, pre-tokenizer."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        kind = self.required("tokenizer.ggml.model")
        pre = self.get("tokenizer.ggml.pre", "default")
        if kind != "gpt2" or pre not in _DIGITS_STAND_ALONE:
            raise ModelError(f"the GGUF file has a {kind!r} tokenizer with {pre!r} pre-tokenizer")
        for key in ("add_bos_token", "add_eos_token", "add_space_prefix"):
            if self.get(f"tokenizer.ggml.{key}", False):
                raise ModelError(f"the GGUF file sets {key}, which this converter does not know")
        merges: list[tuple[str, str]] = []
        for merge in self.required("tokenizer.ggml.merges"):
            left, _, right = merge.partition(" ")
            merges.append((left, right))
        vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.pre_tokenizer = (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
            if _DIGITS_STAND_ALONE[pre]
            else byte_level
        )
        tokenizer.decoder = decoders.ByteLevel()
        kinds = self.required("tokenizer.ggml.token_type")
        control = [
            token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN
        ]
        tokenizer.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in control]
        )
        return tokenizer

    def tokenizer_config(self, tokens: list[str]) -> dict[str, Any]:
        """``tokenizer_config.json``; its class is the one that takes tokenizer.json as it is."""
        named = {
            name: tokens[token_id]
            for name, key in _NAMED_TOKENS.items()
            if (token_id := self.get(f"tokenizer.ggml.{key}")) is not None
        }
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.required("llama.context_length"),
            "clean_up_tokenization_spaces": False,
            **named,
        }


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config[name] is not None}


def _write_weights(reader: GGUFReader, config: dict[str, Any], path: Path, report: Report) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    total_bytes = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    done_bytes = 0
    weights: dict[str, torch.Tensor] = {}
    for name, values, num_bytes in _dequantised(reader, config):
        weights[name] = torch.from_numpy(values).to(torch.bfloat16).contiguous()
        done_bytes += num_bytes
        report("converting weights", done_bytes, total_bytes)
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {path.name}: {error}") from error
    path.chmod(0o644)  # The library makes it private; the other files of the folder are not.


def _dequantised(
    reader: GGUFReader, config: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray[Any, Any], int]]:
    """(Hugging Face name, fp32 values, bytes in the GGUF file) of each tensor."""
    from gguf.quants import dequantize

    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    for tensor in reader.tensors:
        match = _LAYER_TENSOR.fullmatch(tensor.name)
        part = match.group(2) if match else tensor.name.removesuffix(".weight")
        known = _LAYER_TENSOR_NAMES if match else _TENSOR_NAMES
        if part not in known or not tensor.name.endswith(".weight"):
            raise ModelError(f"the GGUF file has a tensor {tensor.name}, which no Llama model has")
        # A copy: fp32 tensors come as views of the read-only file.
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if match and part in heads:
            values = _interleaved_to_halves(values, config[heads[part]])
        prefix = f"model.layers.{match.group(1)}." if match else ""
        yield f"{prefix}{known[part]}.weight", values, int(tensor.n_bytes)


def _interleaved_to_halves(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Undo the row order that llama.cpp gives query and key projections.

    Its rotary embedding turns rows 2i and 2i + 1 of a head together, Hugging Face's turns rows i
    and i + head_dim / 2. ``values``: ``[num_heads * head_dim, hidden_size]``.
    """
    rows, columns = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(rows, columns)


def _decimal(value: float) -> float:
    """The shortest decimal that is the same fp32 number: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
