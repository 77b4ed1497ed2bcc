"""Conversion of a tiny GGUF file whose contents are known, and of files that must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer

from pdserve.core.errors import ModelError
from pdserve.weights import gguf_model
from pdserve.weights.folder import ModelFolder
from pdserve.weights.gguf_model import convert
from pdserve.weights.random_model import CHAT_TEMPLATE, write_random_model
from pdserve.weights.rope import LinearScaling, Llama3Scaling, LongScaling, YarnScaling

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


@pytest.mark.parametrize(
    "quantisation", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32"]
)
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
        assert torch.equal(loaded[name], torch.tensor(values).to(loaded[name].dtype)), name
    assert result.stored_dtype == {"F32": "fp32", "F16": "fp16"}.get(quantisation, "bf16")


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
        ({"architecture": "gemma2"}, "'gemma2'; pdserve reads llama, qwen2, qwen3"),
        ({"pre": "gpt-5"}, "'gpt-5'.*knows gpt-2"),
        ({"extra": {"llama.rope.scaling.type": "linear"}}, "rope.scaling"),
        ({"extra": {"llama.rope.scaling.type": "ntk"}}, "'ntk'"),
        ({"extra": {"llama.expert_count": 8}}, "expert_count"),
        ({"extra": {"split.count": 3}}, "one of 3 parts.*llama-gguf-split --merge"),
        ({"extra": {"llama.attention.head_count": 0}}, "head_count is 0"),
        ({"extra": {"tokenizer.ggml.add_eos_token": True}}, "add_eos_token"),
        ({"extra": {"tokenizer.ggml.model": "t5"}}, "'t5' tokenizer"),
        ({"tensors": {"rope_freqs.weight": np.full(8, 2, np.float32)}}, "rope_freqs"),
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


SHAPES: dict[str, dict[str, Any]] = {
    "Llama with biases": {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "Mistral": {"architecture": "MistralForCausalLM", "head_dim": 24},
    "Qwen2": {"architecture": "Qwen2ForCausalLM", "tie_word_embeddings": True},
    "Qwen3": {"architecture": "Qwen3ForCausalLM", "head_dim": 24},
    "SmolLM3": {
        "architecture": "SmolLM3ForCausalLM",
        "num_layers": 5,
        "unrotated_layers": (3,),
        "tie_word_embeddings": True,
    },
    "Phi-3": {"architecture": "Phi3ForCausalLM", "rotary_dim": 12},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_architecture_comes_back_whole(
    tmp_path: Path, write_gguf: Callable[..., None], shape: str
) -> None:
    original = write_random_model(tmp_path / "m", **SHAPES[shape], bos_token_id=1)
    write_gguf(tmp_path / "m.gguf", tmp_path / "m", quantisation=GGMLQuantizationType.F32)
    result = converted(tmp_path / "m.gguf", tmp_path)
    if shape == "Mistral":  # whose GGUF files say llama
        original = replace(original, architecture="LlamaForCausalLM")
    assert result.config == original
    loaded = result.load_tensors()
    for name, tensor in ModelFolder.open(tmp_path / "m").load_tensors().items():
        assert torch.equal(loaded[name], tensor), name


def test_a_large_model_comes_in_several_files(
    tmp_path: Path,
    tiny_model_path: Path,
    write_gguf: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gguf_model, "SHARD_BYTES", 60_000)
    write_gguf(tmp_path / "m.gguf", tiny_model_path, quantisation=GGMLQuantizationType.F32)
    result = converted(tmp_path / "m.gguf", tmp_path)
    assert len({entry.file for entry in result.tensors.values()}) > 3
    original = ModelFolder.open(tiny_model_path).load_tensors()
    assert all(torch.equal(tensor, original[n]) for n, tensor in result.load_tensors().items())


def llama3_divisors(factor: float) -> np.ndarray:
    """As llama.cpp's converter computes them, for a head_dim of 16 and a base of 10 000."""
    divisors = []
    for frequency in 10_000.0 ** -(np.arange(0, 16, 2) / 16):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_scaled_rotary_embeddings_are_understood(
    tmp_path: Path, tiny_model_path: Path, write_gguf: Callable[..., None]
) -> None:
    def scaling(number: int, **changes: Any) -> Any:
        path = tmp_path / str(number)
        path.mkdir()
        write_gguf(path / "m.gguf", changes.pop("model", tiny_model_path), **changes)
        return converted(path / "m.gguf", path).config.rope_scaling

    divisors = {"rope_freqs.weight": llama3_divisors(32.0)}
    assert scaling(1, tensors=divisors) == Llama3Scaling(32.0, 1.0, 4.0, 8192)
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    assert scaling(2, extra=keys) == LinearScaling(2.5)
    keys = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 1024,
    }
    assert scaling(3, extra=keys) == YarnScaling(4.0, 1024, 0.1 * np.log(4.0) + 1)
    write_random_model(tmp_path / "phi3", **SHAPES["Phi-3"])
    short, long = np.arange(1, 7, dtype=np.float32), np.arange(2, 8, dtype=np.float32)
    found = scaling(
        4,
        model=tmp_path / "phi3",
        extra={
            "phi3.rope.scaling.original_context_length": 512,
            "phi3.rope.scaling.attn_factor": 1.25,
        },
        tensors={"rope_factors_long.weight": long, "rope_factors_short.weight": short},
    )
    assert found == LongScaling((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), 1.25, 512)


def test_an_answer_in_a_chat_ends_too(
    tmp_path: Path, tiny_model_path: Path, write_gguf: Callable[..., None]
) -> None:
    """End token of the file, then what ends a turn: by its key, or a control token by its name."""
    keys = {"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 1}
    write_gguf(tmp_path / "m.gguf", tiny_model_path, extra=keys)
    assert converted(tmp_path / "m.gguf", tmp_path).config.eos_token_ids == (0, 1, 2)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ModelError, match="no readable GGUF"):
        converted(tmp_path / "m.gguf", tmp_path)


def test_a_file_that_is_cut_off_is_refused(
    tmp_path: Path, tiny_model_path: Path, write_gguf: Callable[..., None]
) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_model_path)
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=r"cut off.*copy it again"):
        converted(tmp_path / "m.gguf", tmp_path)
