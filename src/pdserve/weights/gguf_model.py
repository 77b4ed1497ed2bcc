"""From one GGUF file to a model folder in Hugging Face layout.

A GGUF file carries weights, tokenizer, chat template and constants of a model in one, often
quantised, with llama.cpp's names. `convert` turns one of our architectures into safetensors,
``config.json``, ``tokenizer.json`` and the rest. It runs once: at pull time, or when a file is
first served. Metadata that would change the result and is not understood is refused (`gguf_config`,
`gguf_tokenizer`), and so is a tensor that the architecture does not have.

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
from pdserve.weights.config import ModelConfig, parse_config
from pdserve.weights.folder import expected_shapes
from pdserve.weights.gguf_config import ROPE_TENSORS, Metadata, config_json
from pdserve.weights.gguf_tokenizer import read_tokenizer, tokenizer_config
from pdserve.weights.progress import Report, silent
from pdserve.weights.tensor_files import INDEX_NAME

if TYPE_CHECKING:
    import torch
    from gguf import ReaderTensor

SHARD_BYTES = 2 << 30
"""Weights are written in files of about this size: what is held in memory meanwhile."""

# llama.cpp names -> Hugging Face names, without ".weight" or ".bias".
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
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED_NAMES = {"ffn_up": "mlp.gate_up_proj"}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")

# Values are bf16 unless most of the file has more bits.
_STORED = {"F32": "float32", "F16": "float16"}


def convert(gguf_path: Path, folder: Path, report: Report = silent) -> None:
    """Write the model in ``gguf_path`` to the existing empty ``folder``.

    Quantised weights become bf16 (rounded to nearest even); those of a file in F16 or F32 keep
    their values. Memory is that of one file of `SHARD_BYTES`, and one tensor in fp32. Raises
    `ModelError` if the file is not of the supported kind, `OSError` if writing fails.
    """
    from gguf import GGUFReader

    report("reading GGUF", 0, 0)
    try:
        reader = GGUFReader(gguf_path)
    except (ValueError, IndexError, KeyError) as error:
        raise ModelError(
            f"{gguf_path.name} is no readable GGUF file, or cut off: {error}; copy it again"
        ) from error
    metadata = Metadata(reader)
    dtype = _stored_dtype(reader.tensors)
    config = {**config_json(metadata), "torch_dtype": dtype}
    names = _tensor_names(metadata, parse_config(config, {}))
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(config))
    tokenizer_json = read_tokenizer(metadata).to_str(pretty=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", tokenizer_config(metadata))
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_weights(_converted(metadata, config, names, dtype, report), folder)


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config[name] is not None}


def _stored_dtype(tensors: list[ReaderTensor]) -> str:
    """torch's name of the type for the weights: what most bytes of the matrices are, or bf16."""
    num_bytes: dict[str, int] = {}
    for tensor in tensors:
        if len(tensor.shape) > 1:
            kind = tensor.tensor_type.name
            num_bytes[kind] = num_bytes.get(kind, 0) + int(tensor.n_bytes)
    most = max(sorted(num_bytes), key=num_bytes.__getitem__, default="BF16")
    return _STORED.get(most, "bfloat16")


def _tensor_names(metadata: Metadata, config: ModelConfig) -> dict[str, str]:
    """llama.cpp's name -> Hugging Face's, of each tensor; they are what the model needs."""
    layer_names = {**_LAYER_TENSOR_NAMES, **(_FUSED_NAMES if config.fused else {})}
    expected = set(expected_shapes(config))
    names: dict[str, str] = {}
    for name in metadata.tensors:
        if name in ROPE_TENSORS:
            continue  # in the config
        if match := _LAYER_TENSOR.fullmatch(name):
            layer, part, kind = match.groups()
            known = layer_names.get(part)
            found = f"model.layers.{layer}.{known}.{kind}" if known else None
        else:
            stem = _TENSOR_NAMES.get(name.removesuffix(".weight"))
            found = f"{stem}.weight" if stem and name.endswith(".weight") else None
        if found not in expected:
            raise ModelError(
                f"the GGUF file has a tensor {name}, which no such {metadata.architecture} model "
                "has"
            )
        names[name] = found
    if missing := sorted(expected - set(names.values())):
        raise ModelError(f"the GGUF file has no tensor for {missing[0]}")
    return names


def _converted(
    metadata: Metadata, config: dict[str, Any], names: dict[str, str], dtype: str, report: Report
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, values) of each tensor."""
    import torch
    from gguf.quants import dequantize

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    total_bytes = sum(int(tensor.n_bytes) for tensor in metadata.tensors.values())
    done_bytes = 0
    for gguf_name, name in names.items():
        tensor = metadata.tensors[gguf_name]
        try:
            # A copy: fp32 tensors come as views of the read-only file.
            values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError:
            raise ModelError(
                f"tensor {gguf_name} is of type {tensor.tensor_type.name}, which the gguf library "
                "does not restore; use another quantisation of the model"
            ) from None
        part = name.split(".")[-2]
        if metadata.form.interleaved and part in heads:
            values = _interleaved_to_halves(values, heads[part])
        wide = values.ndim == 1 and dtype == "float16"
        stored = torch.float32 if wide else getattr(torch, dtype)
        yield name, torch.from_numpy(values).to(stored).contiguous()
        done_bytes += int(tensor.n_bytes)
        report("converting weights", done_bytes, total_bytes)


def _write_weights(weights: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """One file, or several and their index."""
    shards: list[Path] = []
    weight_map: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    held_bytes = total_bytes = 0

    def write() -> None:
        shards.append(folder / f"model-{len(shards) + 1:05}.safetensors")
        _save(held, shards[-1])
        weight_map.update(dict.fromkeys(held, shards[-1].name))
        held.clear()

    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        if held and held_bytes + num_bytes > SHARD_BYTES:
            write()
            held_bytes = 0
        held[name] = tensor
        held_bytes += num_bytes
        total_bytes += num_bytes
    write()
    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
        return
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(folder / INDEX_NAME, index)


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {path.name}: {error}") from error
    path.chmod(0o644)  # The library makes it private; the other files of the folder are not.


def _interleaved_to_halves(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Undo the row order that llama.cpp gives query and key projections.

    Its rotary embedding turns rows 2i and 2i + 1 of a head together, Hugging Face's turns rows i
    and i + head_dim / 2. ``values``: ``[num_heads * head_dim, hidden_size]``, or of a bias.
    """
    rows, *columns = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(rows, *columns)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
