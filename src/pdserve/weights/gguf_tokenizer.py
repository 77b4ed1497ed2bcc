"""The tokenizer in a GGUF file as a ``tokenizer.json``.

Two kinds are known. ``gpt2`` is byte-level BPE: vocabulary and merges are there, and the name of
the rule that splits a text before (``tokenizer.ggml.pre``); those of our architectures are known by
name. ``llama`` is SentencePiece's BPE: pieces with scores, and the best pair of neighbours that is
a piece is joined first; as merges, that is each way to join a piece, in the order of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdserve.core.errors import ModelError
from pdserve.weights.gguf_config import CONTROL_TOKEN, Metadata

if TYPE_CHECKING:
    import tokenizers

_NORMAL_TOKEN, _UNKNOWN_TOKEN, _USER_TOKEN = 1, 2, 4
_SPACE_MARK = "\u2581"
_NAMED_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


@dataclass(frozen=True, slots=True)
class Split:
    """What is done to a text before BPE. ``pattern`` empty: GPT-2's."""

    pattern: str = ""
    digits_alone: bool = False
    """Each digit is a piece of its own before the pattern is tried."""
    composed: bool = False
    """Unicode's form NFC first."""
    whole_words: bool = False
    """A piece that is in the vocabulary is taken whole, whatever the merges say."""
    begins: bool = False
    """A text begins with the begin token, unless the file says otherwise."""


# The patterns are those of the models' own tokenizers, as their tokenizer.json publish them.
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
)
_SLASHED_REST = _REST.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)
_TEKKEN = _CASED.replace("{0}", "") + r"|\p{N}" + _SLASHED_REST
_GPT_4O = _CASED.replace("{0}", _ENDINGS + "?") + r"|\p{N}{1,3}" + _SLASHED_REST

SPLITS = {
    "gpt-2": Split(),
    "smollm": Split(digits_alone=True),
    "llama-bpe": Split(_LLAMA3, whole_words=True, begins=True),
    "smaug-bpe": Split(_LLAMA3),
    "dbrx": Split(_LLAMA3),  # Phi-4
    "qwen2": Split(_QWEN2, composed=True),
    "deepseek-r1-qwen": Split(_QWEN2),
    "tekken": Split(_TEKKEN, whole_words=True, begins=True),  # Mistral from Nemo on
    "gpt-4o": Split(_GPT_4O),  # Phi-4-mini
}
"""By llama.cpp's name in ``tokenizer.ggml.pre`` (llama-vocab.cpp)."""

ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
"""Of older converters, by the same source."""


def read_tokenizer(metadata: Metadata) -> tokenizers.Tokenizer:
    """Vocabulary, merges, splits, added tokens, begin token. Raises `ModelError` for what is not
    known."""
    kind = metadata.required("tokenizer.ggml.model")
    if metadata.get("tokenizer.ggml.add_eos_token", False):
        raise ModelError("the GGUF file sets add_eos_token, which this converter does not know")
    if kind == "gpt2":
        tokenizer, begins = _byte_level(metadata)
    elif kind == "llama":
        tokenizer, begins = _sentencepiece(metadata), True
    else:
        raise ModelError(f"the GGUF file has a {kind!r} tokenizer; pdserve reads gpt2 and llama")
    tokenizer.add_tokens(_added_tokens(metadata, kind))
    if metadata.get("tokenizer.ggml.add_bos_token", begins):
        _begin(tokenizer, metadata)
    return tokenizer


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """``tokenizer_config.json``; its class is the one that takes tokenizer.json as it is."""
    tokens = metadata.required("tokenizer.ggml.tokens")
    named = {
        name: tokens[token_id]
        for name, key in _NAMED_TOKENS.items()
        if (token_id := metadata.get(f"tokenizer.ggml.{key}")) is not None
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata.own_required("context_length"),
        "clean_up_tokenization_spaces": False,
        **named,
    }


def _byte_level(metadata: Metadata) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer, and whether its texts begin with the begin token by default."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    split = SPLITS.get(ALIASES.get(pre, pre))
    if split is None:
        raise ModelError(
            f"the GGUF file has a 'gpt2' tokenizer with {pre!r} pre-tokenizer; pdserve knows "
            f"{', '.join(SPLITS)}"
        )
    if metadata.get("tokenizer.ggml.add_space_prefix", False):
        raise ModelError("the GGUF file sets add_space_prefix for a byte-level tokenizer")
    merges: list[tuple[str, str]] = []
    for merge in metadata.required("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    vocabulary = {text: n for n, text in enumerate(metadata.required("tokenizer.ggml.tokens"))}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.whole_words)
    )
    steps: list[Any] = []
    if split.digits_alone:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.pattern:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split.pattern))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if split.composed:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, split.begins


def _sentencepiece(metadata: Metadata) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = metadata.required("tokenizer.ggml.tokens")
    kinds = metadata.required("tokenizer.ggml.token_type")
    unknown = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN_TOKEN]
    model = models.BPE(
        vocab={text: n for n, text in enumerate(tokens)},
        merges=_merges_of_scores(tokens, kinds, metadata.required("tokenizer.ggml.scores")),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    marks: list[Any] = [normalizers.Replace(" ", _SPACE_MARK)]
    texts: list[Any] = [decoders.Replace(_SPACE_MARK, " "), decoders.ByteFallback()]
    texts.append(decoders.Fuse())
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        marks.insert(0, normalizers.Prepend(_SPACE_MARK))
        texts.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(marks)
    tokenizer.decoder = decoders.Sequence(texts)
    return tokenizer


def _merges_of_scores(
    tokens: list[str], kinds: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    pieces = {
        text: score
        for text, kind, score in zip(tokens, kinds, scores, strict=True)
        if kind == _NORMAL_TOKEN
    }
    merges: list[tuple[str, str]] = []
    for piece in sorted(pieces, key=pieces.__getitem__, reverse=True):
        for middle in range(1, len(piece)):
            if piece[:middle] in pieces and piece[middle:] in pieces:
                merges.append((piece[:middle], piece[middle:]))
    return merges


def _added_tokens(metadata: Metadata, model: str) -> list[tokenizers.AddedToken]:
    """Control tokens, which are no text, and tokens of the user's, which are."""
    from tokenizers import AddedToken

    tokens = metadata.required("tokenizer.ggml.tokens")
    kinds = metadata.required("tokenizer.ggml.token_type")
    # Phi-3's swallow the space behind them, which a GGUF file does not say (llama.cpp knows it).
    swallows = metadata.architecture == "phi3" and model == "llama"
    plain = ("<unk>", "<s>", "<|endoftext|>")
    return [
        AddedToken(
            token,
            normalized=False,
            special=kind == CONTROL_TOKEN,
            rstrip=swallows and token not in plain,
        )
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL_TOKEN, _USER_TOKEN)
    ]


def _begin(tokenizer: tokenizers.Tokenizer, metadata: Metadata) -> None:
    from tokenizers import processors

    token_id = metadata.required("tokenizer.ggml.bos_token_id")
    token = metadata.required("tokenizer.ggml.tokens")[token_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, token_id)]
    )
