"""Encoding and decoding against transformers, and the bytes behind each token."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, models

from pdserve.core.errors import ModelError, RequestError
from pdserve.text.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces   and\ttabs\n\n\nlines ",
    "in 2024, 3.14 and 1,000\n\n1. first\n2. second  12",
    "don't we'll I'M it's",
    "def f(x):\n    return x**2 + 10  # comment\n",
    "日本語テスト、ひらがな。中文也行",
    "Привет, мир! Ünïcödé naïve café",
    "مرحبا بالعالم नमस्ते 안녕하세요",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 emoji",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    " <|endoftext|> x <repo_name>y <|im_st",
    "½ ⅷ ² ٣",
    "a\x00b\x07\x1b[0m\ufeff\u200b",
]


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    ranges = [(32, 127), (32, 127), (48, 58), (10, 14), (0xA0, 0x600), (0x4E00, 0x9FFF)]
    ranges.append((0x1F300, 0x1F700))
    return [
        "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 50)))
        for _ in range(count)
    ]


def edited_copy(source: Path, target: Path, **config: Any) -> Path:
    """A tokenizer folder with other values in tokenizer_config.json."""
    target.mkdir()
    shutil.copy(source / "tokenizer.json", target)
    old = json.loads((source / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**old, **config}))
    return target


def assert_agrees(folder: Path, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    ours = Tokenizer.from_folder(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip
            )
    assert ours.special_ids == set(theirs.all_special_ids) | {
        token_id for token_id, token in theirs.added_tokens_decoder.items() if token.special
    }
    assert ours.vocab_size == len(theirs)


def test_agrees_with_transformers_on_the_tiny_model(tiny_model_path: Path) -> None:
    assert_agrees(tiny_model_path, TEXTS + random_texts(200, seed=1))


@pytest.mark.model
def test_agrees_with_transformers_on_the_real_model(smollm_path: Path) -> None:
    assert_agrees(smollm_path, TEXTS + random_texts(400, seed=2))


@pytest.mark.model
def test_the_real_model_sees_each_digit_alone(smollm_tokenizer: Tokenizer) -> None:
    """As SmolLM2 was trained (llama.cpp's pre-tokenizer ``smollm``); transformers' own conversion
    of the GGUF forgets it, and then puts ``\\n\\n1`` together differently."""
    pieces = [smollm_tokenizer.token_text(i) for i in smollm_tokenizer.encode("a\n\n12  3")]
    assert pieces == ["a", "\n\n", "1", "2", "  ", "3"]


def test_agrees_with_transformers_on_sentencepiece(sentencepiece_path: Path) -> None:
    assert_agrees(sentencepiece_path, ["", "the hello", " the", "  he", "日本 the é", "</s>the"])


@pytest.mark.parametrize("added", [True, False])
def test_bos_is_what_tokenizer_json_says(
    sentencepiece_path: Path, tmp_path: Path, added: bool
) -> None:
    """Transformers 5 ignores the flags of the other file, and so do we."""
    folder = edited_copy(
        sentencepiece_path, tmp_path / "t", add_bos_token=added, add_eos_token=added
    )
    assert_agrees(folder, ["the", "hello the"])
    assert Tokenizer.from_folder(folder).encode("the")[0] == 1


def test_no_bos_unless_the_tokenizer_says_so(tiny_tokenizer: Tokenizer) -> None:
    assert tiny_tokenizer.encode("the") == tiny_tokenizer.encode("the", add_special_tokens=False)


def test_the_config_can_make_a_token_special(tiny_model_path: Path, tmp_path: Path) -> None:
    plain = Tokenizer.from_folder(tiny_model_path)
    the = plain.encode("the")
    assert plain.decode(the) == "the"
    decoder = {str(the[0]): {"content": "the", "special": True}}
    folder = edited_copy(tiny_model_path, tmp_path / "t", added_tokens_decoder=decoder)
    changed = Tokenizer.from_folder(folder)
    assert changed.special_ids == plain.special_ids | {the[0]}
    assert changed.vocab_size == plain.vocab_size


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_the_tokens_are_the_text(tiny_tokenizer: Tokenizer, text: str) -> None:
    ids = tiny_tokenizer.encode(text)
    assert b"".join(map(tiny_tokenizer.token_bytes, ids)) == text.encode()


def test_every_byte_has_a_token(tiny_tokenizer: Tokenizer) -> None:
    alone = {tiny_tokenizer.token_bytes(i) for i in range(tiny_tokenizer.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= alone


def test_incomplete_characters_show_as_replacement(tiny_tokenizer: Tokenizer) -> None:
    texts = {tiny_tokenizer.token_text(i) for i in tiny_tokenizer.encode("\U0001f643")}
    assert "\ufffd" in "".join(texts)


def test_an_added_token_with_odd_characters_is_plain_text(tiny_model_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tiny_model_path / "tokenizer.json"))
    backend.add_tokens([AddedToken("<a b>", normalized=False), AddedToken("日", normalized=False)])
    tokenizer = Tokenizer(backend, {})
    for text in ("<a b>", "日"):
        (token_id,) = tokenizer.encode(text)
        assert tokenizer.token_bytes(token_id) == text.encode()
        assert tokenizer.decode([token_id]) == text


def test_ids_without_a_token_have_no_text(tiny_tokenizer: Tokenizer) -> None:
    assert tiny_tokenizer.token_bytes(100_000) == b""
    assert tiny_tokenizer.token_bytes(-1) == b""
    assert tiny_tokenizer.decode([100_000]) == ""


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_numbers_that_are_no_ids_are_the_clients_mistake(
    tiny_tokenizer: Tokenizer, token_id: int
) -> None:
    with pytest.raises(RequestError, match="no token id"):
        tiny_tokenizer.decode([token_id])


def test_threads_may_share_it(tiny_tokenizer: Tokenizer) -> None:
    texts = random_texts(400, seed=3)
    alone = [tiny_tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tiny_tokenizer.encode, texts)) == alone
        assert list(pool.map(tiny_tokenizer.decode, alone)) == texts


def test_truncation_and_padding_in_the_file_are_off(tiny_model_path: Path, tmp_path: Path) -> None:
    folder = edited_copy(tiny_model_path, tmp_path / "t")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    text = "prefill and decode"
    assert Tokenizer.from_folder(folder).decode(Tokenizer.from_folder(folder).encode(text)) == text
    assert len(Tokenizer.from_folder(folder).encode("a")) == 1


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer\.json.*save_pretrained"),
        (lambda f: (f / "tokenizer.json").write_text("{"), r"cannot read .*tokenizer\.json"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), r"tokenizer_config\.json"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), "JSON object"),
    ],
)
def test_broken_files_are_named(
    tiny_model_path: Path, tmp_path: Path, break_it: Callable[[Path], object], named: str
) -> None:
    folder = edited_copy(tiny_model_path, tmp_path / "t")
    break_it(folder)
    with pytest.raises(ModelError, match=named):
        Tokenizer.from_folder(folder)


def test_a_folder_may_lack_the_config(tiny_model_path: Path, tmp_path: Path) -> None:
    folder = edited_copy(tiny_model_path, tmp_path / "t")
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(folder).named_tokens == {}


@pytest.mark.parametrize(
    "decoder",
    [None, tokenizers.decoders.WordPiece(), tokenizers.decoders.Metaspace()],
)
def test_an_unknown_kind_of_tokenizer_is_refused(decoder: Any) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(ModelError, match="byte-level decoders"):
        Tokenizer(backend, {})
