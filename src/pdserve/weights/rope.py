"""Rotary embeddings as a ``config.json`` describes them: base, share of a head, scaling.

transformers 4 writes ``rope_theta`` and ``rope_scaling`` at top level, transformers 5 puts both
into ``rope_parameters``. Inside wins over outside, and a ``rope_scaling`` over ``rope_parameters``,
as in transformers 5. What a scaling means is computed in `engine.torch.rope`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdserve.core.errors import ModelError
from pdserve.weights.families import SUPPORTED, Family
from pdserve.weights.json_values import flag, positive, size


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions are divided by ``factor``."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Slow frequencies are divided by ``factor``, fast ones are not (Llama 3.1, arXiv:2407.21783).

    A frequency is slow if it turns less than ``low_turns`` times within ``original_tokens``, and
    fast if more than ``high_turns`` times; between them it is mixed.
    """

    factor: float
    low_turns: float
    high_turns: float
    original_tokens: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """The same idea with a ramp over the dimensions (Peng et al. 2023, arXiv:2309.00071).

    Cosines and sines are multiplied by ``attention_factor``. ``rounded``: the ramp begins and ends
    at whole dimensions.
    """

    factor: float
    original_tokens: int
    attention_factor: float
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    rounded: bool = True


@dataclass(frozen=True, slots=True)
class LongScaling:
    """Each frequency is divided by its own number (Ding et al. 2024, arXiv:2402.13753).

    ``divisors`` are those for texts of up to ``original_tokens``; for longer ones a model has
    others, with which all of the text's KV would have to be computed anew.
    """

    divisors: tuple[float, ...]
    attention_factor: float
    original_tokens: int


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """What `parse_rope` finds. ``max_tokens`` is how far it reaches, at least."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None
    max_tokens: int


_HARMLESS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
}
_LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor"}
_YARN = {"factor", "attention_factor", "beta_fast", "beta_slow", "truncate"} | {
    "mscale",
    "mscale_all_dim",
}
_LONG = {"factor", "attention_factor", "short_factor", "long_factor"}
_KEYS = {
    "default": _HARMLESS,
    "linear": _HARMLESS | {"factor"},
    "dynamic": _HARMLESS | {"factor"},
    "llama3": _HARMLESS | _LLAMA3,
    "yarn": _HARMLESS | _YARN,
    "longrope": _HARMLESS | _LONG,
}
"""Keys of each kind of scaling that are understood; another one is refused."""


def parse_rope(config: Mapping[str, Any], family: Family, head_dim: int, max_tokens: int) -> Rope:
    """``max_tokens`` is the model's ``max_position_embeddings``. Raises `ModelError`."""
    values = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(values, Mapping):
        raise ModelError(f"rope_parameters must be an object, not {values!r}")
    kind = _kind(values, family)
    unknown = sorted(set(values) - _KEYS[kind])
    if unknown:
        raise ModelError(f"rope_parameters has {', '.join(map(repr, unknown))}. {SUPPORTED}")
    theta = values.get("rope_theta", config.get("rope_theta"))
    rotary_dim = _rotary_dim(config, values, family, head_dim)
    original = _original_tokens(config, values, family, max_tokens)
    scaling = _scaling(values, kind, rotary_dim, max_tokens, original)
    if isinstance(scaling, LongScaling):
        max_tokens = min(max_tokens, scaling.original_tokens)
    if isinstance(scaling, YarnScaling):
        max_tokens = max(max_tokens, int(scaling.factor * scaling.original_tokens))
    return Rope(
        theta=family.rope_theta if theta is None else positive(theta, "rope_theta"),
        rotary_dim=rotary_dim,
        scaling=scaling,
        max_tokens=max_tokens,
    )


def _kind(values: Mapping[str, Any], family: Family) -> str:
    kind = str(values.get("rope_type", values.get("type", "default")))
    if family.model_type == "phi3":
        kind = {"su": "longrope", "yarn": "longrope"}.get(kind, kind)
        known = {"default", "longrope"}
    else:
        known = set(_KEYS)
    if kind not in known:
        raise ModelError(
            f"rotary embeddings are scaled (rope_type {kind!r}); a {family.model_type} model may "
            f"have {', '.join(sorted(known))}. {SUPPORTED}"
        )
    return kind


def _rotary_dim(
    config: Mapping[str, Any], values: Mapping[str, Any], family: Family, head_dim: int
) -> int:
    share = values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share in (None, 1):
        return head_dim
    if not family.rotates_parts:
        raise ModelError(
            f"partial_rotary_factor is {share!r}, which a {family.model_type} model does not have. "
            f"{SUPPORTED}"
        )
    rotary_dim = int(head_dim * positive(share, "partial_rotary_factor"))
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ModelError(
            f"partial_rotary_factor is {share!r}: it rotates {rotary_dim} of {head_dim} "
            "dimensions, and it must be an even number of them"
        )
    return rotary_dim


def _scaling(
    values: Mapping[str, Any], kind: str, rotary_dim: int, max_tokens: int, original: int
) -> RopeScaling | None:
    """None for ``dynamic``, which stretches only texts that are longer than ``max_tokens``."""
    if kind in ("default", "dynamic"):
        return None
    if kind == "linear":
        return LinearScaling(positive(values.get("factor"), "factor"))
    if kind == "llama3":
        return Llama3Scaling(
            factor=positive(values.get("factor"), "factor"),
            low_turns=positive(values.get("low_freq_factor"), "low_freq_factor"),
            high_turns=positive(values.get("high_freq_factor"), "high_freq_factor"),
            original_tokens=original,
        )
    factor = values.get("factor")
    factor = max_tokens / original if factor is None else positive(factor, "factor")
    if kind == "yarn":
        return YarnScaling(
            factor=factor,
            original_tokens=original,
            attention_factor=_yarn_attention(values, factor),
            fast_turns=positive(values.get("beta_fast") or 32, "beta_fast"),
            slow_turns=positive(values.get("beta_slow") or 1, "beta_slow"),
            rounded=flag(values, "truncate", True),
        )
    return LongScaling(
        divisors=_divisors(values, "short_factor", rotary_dim // 2),
        attention_factor=_long_attention(values, factor, original),
        original_tokens=original,
    )


def _original_tokens(
    config: Mapping[str, Any], values: Mapping[str, Any], family: Family, max_tokens: int
) -> int:
    """The length of the texts that the model was first trained on. Outside wins over inside."""
    key = "original_max_position_embeddings"
    if family.model_type == "phi3" or key in config:
        return size(config, key, 4096)
    return size(values, key, max_tokens)


def _yarn_attention(values: Mapping[str, Any], factor: float) -> float:
    given = values.get("attention_factor")
    if given is not None:
        return positive(given, "attention_factor")

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weight, weight_of_all = values.get("mscale"), values.get("mscale_all_dim")
    if weight and weight_of_all:
        return scale(positive(weight, "mscale")) / scale(positive(weight_of_all, "mscale_all_dim"))
    return scale(1.0)


def _long_attention(values: Mapping[str, Any], factor: float, original: int) -> float:
    given = values.get("attention_factor")
    if given is not None:
        return positive(given, "attention_factor")
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _divisors(values: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    divisors = values.get(key)
    if not isinstance(divisors, list) or len(divisors) != count:
        raise ModelError(f"{key} of rope_parameters must be a list of {count} numbers")
    return tuple(positive(divisor, key) for divisor in divisors)
