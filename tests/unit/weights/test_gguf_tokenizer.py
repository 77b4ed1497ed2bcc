"""Tokenizers of GGUF files: byte-level ones by their split rule, SentencePiece's by its scores."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter
from tokenizers import pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from pdserve.text.detokenize import Detokenizer
from pdserve.text.tokenizer import Tokenizer
from pdserve.weights.gguf_config import Metadata
from pdserve.weights.gguf_tokenizer import SPLITS, read_tokenizer

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def tokenizer_of(
    path: Path,
    model: str,
    tokens: list[tuple[str, int]],
    *,
    architecture: str = "llama",
    scores: list[float] | None = None,
    merges: list[str] | None = None,
    pre: str | None = None,
    flags: dict[str, bool] | None = None,
) -> Tokenizer:
    """What pdserve serves with, from a GGUF file of a vocabulary alone. Token 1 begins a text."""
    writer = GGUFWriter(path, architecture)
    writer.add_tokenizer_model(model)
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_bos_token_id(1)
    if scores is not None:
        writer.add_token_scores(scores)
    if merges is not None:
        writer.add_token_merges(merges)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    for key, value in (flags or {}).items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Tokenizer(read_tokenizer(Metadata(GGUFReader(path))), {})


def test_splits_are_those_of_transformers() -> None:
    for name, split in SPLITS.items():
        if split.pattern:
            assert split.pattern == GGUF_PRE_TOKENIZER_SPLITS[name]


BYTES = [(character, NORMAL) for character in sorted(pre_tokenizers.ByteLevel.alphabet())]


def byte_level(path: Path, pre: str, **changes: Any) -> Tokenizer:
    special = [("<|end|>", CONTROL), ("<|begin|>", CONTROL), ("<think>", USER)]
    extra = [(text, NORMAL) for text in ("12", "he", "hello")]
    return tokenizer_of(
        path, "gpt2", [*special, *BYTES, *extra], merges=["1 2", "h e"], pre=pre, **changes
    )


def test_a_llama_3_text_begins_and_takes_known_words_whole(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path / "a", "llama-bpe")
    ids = tokenizer.encode("hello123<think>")
    assert [tokenizer.token_text(token) for token in ids[1:]] == ["hello", "12", "3", "<think>"]
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "hello123<think>", "the user's token is text, the begin is not"
    assert tokenizer.encode("hello", add_special_tokens=False) == ids[1:2]
    assert byte_level(tmp_path / "c", "llama-v3").encode("hello123<think>") == ids
    without = byte_level(tmp_path / "b", "llama-bpe", flags={"add_bos_token": False})
    assert without.encode("hello") == ids[1:2]


def test_a_qwen_text_is_composed_and_its_digits_stand_alone(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path / "a", "qwen2")
    ids = tokenizer.encode("he12e\u0301")
    assert [tokenizer.token_bytes(token) for token in ids] == [
        b"he", b"1", b"2", *(bytes([byte]) for byte in "\u00e9".encode())
    ]  # fmt: skip
    begun = byte_level(tmp_path / "b", "qwen2", flags={"add_bos_token": True})
    assert begun.encode("he")[0] == 1


def a_vocabulary(rng: random.Random) -> tuple[list[tuple[str, int]], list[float]]:
    """As SentencePiece stores one: bytes, then pieces from the best on, single characters last."""
    words = [
        "\u2581the",
        "\u2581then",
        "\u2581hat",
        "that",
        "and",
        "\u2581and",
        "\u00e9t\u00e9",
        "ing",
    ]
    pieces = {word[:end] for word in words for end in range(2, len(word) + 1)}
    pieces |= {word[start:] for word in words for start in range(len(word) - 1)} - set("e")
    joined = sorted(piece for piece in pieces if len(piece) > 1)
    rng.shuffle(joined)
    singles = sorted(set("".join(words)) | set("abcxyz"))
    tokens = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), ("<|user|>", USER)]
    tokens += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    num_special = len(tokens)
    tokens += [(piece, NORMAL) for piece in [*joined, *singles]]
    return tokens, [0.0] * num_special + [-float(n) for n in range(len(joined) + len(singles))]


def by_sentencepiece(text: str, tokens: list[tuple[str, int]], scores: list[float]) -> list[int]:
    """Join the neighbours that make the best piece, the first of several, until there are none."""
    pieces = {
        piece: (score, n)
        for n, ((piece, kind), score) in enumerate(zip(tokens, scores, strict=True))
        if kind == NORMAL
    }
    bytes_at = [piece for piece, _ in tokens].index("<0x00>")
    symbols = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [left + right for left, right in pairwise(symbols)]
        known = [(-pieces[pair][0], place) for place, pair in enumerate(pairs) if pair in pieces]
        if not known:
            break
        place = min(known)[1]
        symbols[place : place + 2] = [pairs[place]]
    ids = []
    for symbol in symbols:
        known_piece = symbol in pieces
        encoded = () if known_piece else symbol.encode()
        ids += [pieces[symbol][1]] if known_piece else [bytes_at + byte for byte in encoded]
    return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_join_as_sentencepiece_does(tmp_path: Path, prefix: bool) -> None:
    rng = random.Random(4)
    tokens, scores = a_vocabulary(rng)
    flags = {"add_space_prefix": prefix}
    tokenizer = tokenizer_of(tmp_path / "a", "llama", tokens, scores=scores, flags=flags)
    parts = [
        "the",
        "then",
        " ",
        "  ",
        "that",
        "hat",
        "and",
        "\u00e9t\u00e9",
        "ing",
        "\U0001f642",
        "x",
        "\n",
    ]
    for _ in range(300):
        text = "".join(rng.choice(parts) for _ in range(rng.randint(1, 12)))
        expected = by_sentencepiece(" " + text if prefix else text, tokens, scores)
        ids = tokenizer.encode(text)
        assert ids == [1, *expected]
        assert tokenizer.decode(ids) == text
        detokenizer = Detokenizer(tokenizer)
        assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == text


def test_phi_3_swallows_the_space_behind_its_tokens(tmp_path: Path) -> None:
    tokens, scores = a_vocabulary(random.Random(4))
    turn = tokens.index(("<|user|>", USER))
    for architecture, between in (("phi3", 0), ("llama", 1)):
        tokenizer = tokenizer_of(
            tmp_path / architecture, "llama", tokens, scores=scores, architecture=architecture
        )
        ids = tokenizer.encode("<|user|>\nthe<s>")
        assert ids[:2] == [1, turn]
        assert (b"\n" in [tokenizer.token_bytes(token) for token in ids]) == bool(between)
