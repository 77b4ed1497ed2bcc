"""Which kernels compute attention: a worker's choice, made once.

A name in `MAKERS` stands for a way to make an `Attention`. The compiled kernels are taken where
they are installed and the model is on the CPU, whatever the numerics: they are exact and the
fastest. Otherwise exact numerics take the tiled reference, and fast ones what torch has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pdserve.core.errors import ConfigError
from pdserve.core.layout import INT8, KV_DTYPES
from pdserve.engine.torch import kv_int8
from pdserve.engine.torch.attention import KV_TILE, Attention, SdpaAttention, TiledAttention
from pdserve.engine.torch.native_attention import NativeAttention
from pdserve.engine.torch.numerics import DTYPES, Numerics
from pdserve.engine.torch.rows import NativeRows, Rows, TorchRows
from pdserve.weights.config import ModelConfig

ATTENTION_REVISION = 1
"""Part of the numerics class: raised when the bits of compiled attention change, or those of the
compiled `Rows` that go with it."""


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """How a model's attention is computed."""

    kernels: str
    """A name in `MAKERS`."""
    level: str = ""
    """Instruction set of compiled kernels."""
    kv_dtype: str = "auto"
    """One of `KV_DTYPES`."""

    @property
    def name(self) -> str:
        """For the numerics class."""
        kv = "" if self.kv_dtype == "auto" else f"-kv{self.kv_dtype}"
        if self.kernels != "native":
            return f"{self.kernels}{kv}"
        return f"attention{ATTENTION_REVISION}.{self.level}{kv}"

    def make(
        self, config: ModelConfig, dtype: str, block_size: int, numerics: Numerics
    ) -> Attention:
        """Raises `ConfigError` for blocks that fit no tile: they must do so for every kind, since a
        peer may compute with another one. The same for what a pool of int8 cannot hold."""
        if self.kv_dtype == INT8:
            kv_int8.check_shape(config.head_dim, block_size)
        if KV_TILE % block_size and block_size % KV_TILE:
            raise ConfigError(
                f"block size {block_size} does not fit attention tiles of {KV_TILE} positions: "
                f"choose a divisor of {KV_TILE} or a multiple of it"
            )
        return MAKERS[self.kernels](self, config, dtype, block_size, numerics)

    def rows(self, config: ModelConfig, dtype: str, device: torch.device) -> Rows:
        """What goes with it for norms, rotation and the write to the pool."""
        if self.kernels == "native":
            return NativeRows(config, DTYPES[dtype], self.level)
        return TorchRows(config, device)


def choose_attention(
    device: str, numerics: str, level: str | None, kv_dtype: str = "auto"
) -> AttentionKind:
    """The best kind for a device. ``level`` is that of the compiled kernels, None without them.

    Raises `ConfigError` for a ``kv_dtype`` that is not one of `KV_DTYPES`.
    """
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(f"KV dtype {kv_dtype!r} is unknown: choose one of {', '.join(KV_DTYPES)}")
    if level is not None and torch.device(device).type == "cpu":
        return AttentionKind("native", level, kv_dtype)
    return AttentionKind("sdpa" if numerics == "fast" else "tiled", kv_dtype=kv_dtype)


def _make_native(
    kind: AttentionKind, config: ModelConfig, dtype: str, block_size: int, numerics: Numerics
) -> Attention:
    return NativeAttention(
        config.num_heads, config.num_kv_heads, config.head_dim, DTYPES[dtype], kind.level
    )


def _make_tiled(
    kind: AttentionKind, config: ModelConfig, dtype: str, block_size: int, numerics: Numerics
) -> Attention:
    return TiledAttention(
        config.num_heads, config.num_kv_heads, config.head_dim, block_size, numerics
    )


def _make_sdpa(
    kind: AttentionKind, config: ModelConfig, dtype: str, block_size: int, numerics: Numerics
) -> Attention:
    return SdpaAttention(DTYPES[dtype])


Maker = Callable[[AttentionKind, ModelConfig, str, int, Numerics], Attention]

MAKERS: dict[str, Maker] = {"native": _make_native, "tiled": _make_tiled, "sdpa": _make_sdpa}
"""Kernels by name: (kind, config, dtype, block size, numerics) -> `Attention`."""
