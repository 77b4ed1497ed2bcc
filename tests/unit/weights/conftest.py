"""A package with a tiny GGUF model, as pip finds it in a local folder."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from pdserve.weights.config import ModelConfig
from pdserve.weights.families import FAMILIES
from pdserve.weights.folder import ModelFolder
from pdserve.weights.pull import Source

_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_up_proj": "ffn_up",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}"
    return f"{_GGUF_NAMES[stem]}.weight"


def _rows_for_llama_cpp(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Row i of the first half of a head goes to 2i, row i of the second half to 2i + 1."""
    head_dim = values.shape[0] // num_heads
    moved = np.empty_like(values)
    for row in range(values.shape[0]):
        head, place = divmod(row, head_dim)
        second, i = divmod(place, head_dim // 2)
        moved[head * head_dim + 2 * i + second] = values[row]
    return moved


def _write_gguf(
    path: Path,
    folder: Path,
    *,
    quantisation: GGMLQuantizationType = GGMLQuantizationType.Q4_1,
    pre: str = "smollm",
    architecture: str = "",
    extra: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    pack: Callable[[np.ndarray], np.ndarray] | None = None,
) -> None:
    """The model in ``folder`` (Hugging Face layout) as llama.cpp's converter writes it."""
    model = ModelFolder.open(folder)
    config: ModelConfig = model.config
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(vocabulary["model"]["vocab"], key=vocabulary["model"]["vocab"].__getitem__)
    control = {token["content"] for token in vocabulary["added_tokens"]}
    own = FAMILIES[config.architecture].model_type
    writer = GGUFWriter(path, architecture or {"mistral": "llama"}.get(own, own))
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_model_tokens)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.rotary_dim)
    if config.head_dim * config.num_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    for key, value in (extra or {}).items():
        writer.add_key_value(key, value, *_gguf_type(value))
    for name, tensor in model.load_tensors(dtype="fp32").items():
        values = tensor.numpy()
        for part, num_heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
            if part in name and own in ("llama", "mistral", "smollm3"):
                values = _rows_for_llama_cpp(values, num_heads)
        if values.ndim == 1:
            writer.add_tensor(_gguf_name(name), values)
        else:
            packed = pack(values) if pack else quantize(values, quantisation)
            writer.add_tensor(_gguf_name(name), packed, raw_dtype=quantisation)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_type(value: Any) -> tuple[Any, ...]:
    from gguf import GGUFValueType

    kinds = {
        bool: GGUFValueType.BOOL,
        str: GGUFValueType.STRING,
        float: GGUFValueType.FLOAT32,
        int: GGUFValueType.UINT32,
    }
    return (kinds[type(value)],)


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., None]:
    return _write_gguf


@pytest.fixture(scope="session")
def tiny_source(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path
) -> tuple[Source, Path]:
    """A `Source` of a tiny model, and the folder in which pip finds its wheel."""
    wheels = tmp_path_factory.mktemp("wheels")
    gguf_path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    _write_gguf(gguf_path, tiny_model_path)
    wheel = wheels / "pdserve_tiny_model-1.0-py3-none-any.whl"
    info = "pdserve_tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf_path, "pdserve_tiny_model/tiny.gguf")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: pdserve-tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    source = Source(
        name="tiny",
        requirement="pdserve-tiny-model==1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="pdserve_tiny_model/tiny.gguf",
    )
    return source, wheels
