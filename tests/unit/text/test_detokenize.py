"""Pieces that are final, and that together are what decoding everything at once gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from pdserve.text.detokenize import Detokenizer
from pdserve.text.tokenizer import Tokenizer


def pieces(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def assert_prefixes_are_final(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    parts = pieces(tokenizer, ids, skip)
    assert "".join(parts) == whole
    assert "\ufffd" in whole or not any("\ufffd" in part for part in parts)


@settings(max_examples=300)
@given(data=st.data(), skip=st.booleans())
def test_any_ids_of_the_tiny_model(
    tiny_tokenizer: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    # Ids without a token are among them.
    ids = data.draw(st.lists(st.integers(0, tiny_tokenizer.vocab_size + 3), max_size=40))
    assert_prefixes_are_final(tiny_tokenizer, ids, skip)


@pytest.mark.model
@settings(max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_any_ids_of_the_real_model(
    smollm_tokenizer: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    # Many short byte tokens (the first 300 ids), some of everything.
    some_id = st.integers(0, 300) | st.integers(0, smollm_tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(some_id, max_size=40))
    assert_prefixes_are_final(smollm_tokenizer, ids, skip)


@settings(max_examples=200)
@given(text=st.text(max_size=40))
def test_any_text_of_the_tiny_model(tiny_tokenizer: Tokenizer, text: str) -> None:
    parts = pieces(tiny_tokenizer, tiny_tokenizer.encode(text), skip=False)
    assert "".join(parts) == text
    assert parts[-1] == ""


@settings(max_examples=200)
@given(text=st.text(max_size=30), skip=st.booleans())
def test_any_text_of_a_sentencepiece_model(sentencepiece_path: Path, text: str, skip: bool) -> None:
    tokenizer = Tokenizer.from_folder(sentencepiece_path)
    for ids in (tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)):
        assert_prefixes_are_final(tokenizer, ids, skip)


def test_a_character_waits_for_its_last_byte(tiny_tokenizer: Tokenizer) -> None:
    ids = tiny_tokenizer.encode("a\U0001f643b")
    assert len(ids) > 3
    parts = pieces(tiny_tokenizer, ids)
    assert [part for part in parts if part] == ["a", "\U0001f643", "b"]
    assert parts.index("\U0001f643") == len(ids) - 2, "as soon as it is complete"


def test_an_incomplete_end_shows_once(tiny_tokenizer: Tokenizer) -> None:
    ids = tiny_tokenizer.encode("\U0001f643")[:-1]
    assert pieces(tiny_tokenizer, ids) == [""] * len(ids) + ["\ufffd"]


def test_invalid_bytes_do_not_wait(tiny_tokenizer: Tokenizer) -> None:
    by_bytes = {tiny_tokenizer.token_bytes(i): i for i in range(3, tiny_tokenizer.vocab_size)}
    ids = [by_bytes[b"\xf0"], by_bytes[b"a"], by_bytes[b"\xff"]]
    assert pieces(tiny_tokenizer, ids) == ["", "\ufffda", "\ufffd", ""]


def test_special_tokens_are_left_out_or_shown(tiny_tokenizer: Tokenizer) -> None:
    ids = tiny_tokenizer.encode("a<|im_end|>b")
    assert pieces(tiny_tokenizer, ids) == ["a", "", "b", ""]
    assert pieces(tiny_tokenizer, ids, skip=False) == ["a", "<|im_end|>", "b", ""]


def test_added_tokens_with_odd_characters(tiny_model_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tiny_model_path / "tokenizer.json"))
    odd = ["<a b>", "日", "é", "ÿ x"]
    backend.add_tokens([AddedToken(text, normalized=False) for text in odd])
    tokenizer = Tokenizer(backend, {})
    ids = list(range(tokenizer.vocab_size - len(odd), tokenizer.vocab_size))
    assert_prefixes_are_final(tokenizer, ids, skip=True)
    assert_prefixes_are_final(tokenizer, ids[::-1], skip=True)


def test_sentencepiece_drops_the_first_space_only_at_a_beginning(sentencepiece_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(sentencepiece_path)
    ids = tokenizer.encode("the the", add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids)) == "the the"
    continuing = Detokenizer(tokenizer, continues_text=True)
    assert "".join(map(continuing.push, ids)) == " the the"
