"""Conversion of a tiny GGUF file whose contents are known, and of files that must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer

from pdserve.core.errors import ModelError
from pdserve.weights.folder import ModelFolder
from pdserve.weights.gguf_model import convert
from pdserve.weights.random_model import CHAT_TEMPLATE, write_random_model

TEXTS = [
    "",
    "Hello the world",
    "<|im_start|>user\nhi<|im_end|>\n",
    "日本語 🙂 é中 Привет",
    "def f(x):\n    return self == None\n",
    "tabs\tand\x00control\x07",
]


def converted(gguf_path: Path, tmp_path: Path) -> ModelFolder:
    (tmp_path / "out").mkdir()
    convert(gguf_path, tmp_path / "out")
    return ModelFolder.open(tmp_path / "out")


@pytest.mark.parametrize("quantisation", ["Q4_1", "Q8_0", "F32"])
def test_weights_keep_their_values_and_rows(
    tmp_path: Path,
    tiny_model_path: Path,
    write_gguf: Callable[..., None],
    quantisation: str,
) -> None:
    kind = GGMLQuantizationType[quantisation]
    write_gguf(tmp_path / "m.gguf", tiny_model_path, quantisation=kind)
    result = converted(tmp_path / "m.gguf", tmp_path)
    loaded = result.load_tensors()
    for name, tensor in ModelFolder.open(tiny_model_path).load_tensors().items():
        values = tensor.numpy()
        if values.ndim == 2:
            values = dequantize(quantize(values, kind), kind)
        assert torch.equal(loaded[name], torch.tensor(values).bfloat16()), name
    assert result.stored_dtype == "bf16"


def test_the_config_survives(
    tmp_path: Path, tiny_model_path: Path, write_gguf: Callable[..., None]
) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_model_path)
    config = converted(tmp_path / "m.gguf", tmp_path).config
    original = ModelFolder.open(tiny_model_path).config
    assert config.bos_token_id == 1
    names = set(original.__dataclass_fields__) - {"bos_token_id"}
    assert all(getattr(config, name) == getattr(original, name) for name in names)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_tied_embeddings_stay_tied(tmp_path: Path, write_gguf: Callable[..., None]) -> None:
    write_random_model(tmp_path / "tied", tie_word_embeddings=True)
    write_gguf(tmp_path / "m.gguf", tmp_path / "tied")
    assert converted(tmp_path / "m.gguf", tmp_path).config.tie_word_embeddings


def test_the_tokenizer_survives(
    tmp_path: Path, tiny_model_path: Path, write_gguf: Callable[..., None]
) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_model_path, pre="gpt-2")
    converted(tmp_path / "m.gguf", tmp_path)
    original = Tokenizer.from_file(str(tiny_model_path / "tokenizer.json"))
    result = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in [*TEXTS, "1234  5"]:
        ids = original.encode(text).ids
        assert result.encode(text).ids == ids
        assert result.decode(ids, skip_special_tokens=False) == text
        assert result.decode(ids) == original.decode(ids)
    names = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert names["eos_token"] == "<|im_end|>"
    assert names["bos_token"] == "<|im_start|>"


def test_smollm_takes_digits_out_before_it_splits(
    tmp_path: Path, tiny_model_path: Path, write_gguf: Callable[..., None]
) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_model_path, pre="smollm")
    converted(tmp_path / "m.gguf", tmp_path)
    result = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    pieces = [piece for piece, _ in result.pre_tokenizer.pre_tokenize_str("a\n\n12 in ½")]
    assert pieces == ["a", "ĊĊ", "1", "2", "Ġin", "Ġ", "Â½"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architecture": "qwen2"}, "qwen2"),
        ({"pre": "llama-bpe"}, "llama-bpe"),
        ({"extra": {"llama.rope.scaling.type": "linear"}}, "rope.scaling"),
        ({"extra": {"tokenizer.ggml.add_bos_token": True}}, "add_bos_token"),
        ({"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}}, "rope_freqs"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "attn_q.bias"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path,
    tiny_model_path: Path,
    write_gguf: Callable[..., None],
    changes: dict[str, Any],
    named: str,
) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_model_path, **changes)
    with pytest.raises(ModelError, match=named):
        converted(tmp_path / "m.gguf", tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ModelError, match="no readable GGUF"):
        converted(tmp_path / "m.gguf", tmp_path)
