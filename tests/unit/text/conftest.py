"""Tokenizers of both families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from pdserve.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_model_path)


@pytest.fixture(scope="session")
def smollm_tokenizer(smollm_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(smollm_path)


@pytest.fixture(scope="session")
def sentencepiece_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer built like Llama 2's: U+2581 for a space, bytes as ``<0x..>``."""
    words = [
        "\u2581",
        "\u2581he",
        "\u2581the",
        "h",
        "e",
        "t",
        "l",
        "o",
        "he",
        "the",
        "ll",
        "\u00e9",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("h", "e"), ("t", "he"), ("\u2581", "he"), ("\u2581", "the"), ("l", "l")]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in ("<unk>", "<s>", "</s>")]
    )
    folder = tmp_path_factory.mktemp("sentencepiece")
    backend.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
