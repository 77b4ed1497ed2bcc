"""Which kernels compute the products with weights: a worker's choice, made once.

A name in `MAKERS` stands for a way to make a `Linear`. The compiled kernels are taken where they
are installed and the model is on the CPU; torch otherwise. Weights in int8 need the compiled ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pdserve.core.errors import ConfigError
from pdserve.engine.torch.linear import (
    MAX_LOGIT_ROWS,
    MAX_ROWS,
    LibraryLinear,
    Linear,
    kernels_of,
)
from pdserve.engine.torch.native_linear import NativeLinear
from pdserve.engine.torch.numerics import DTYPES

WEIGHT_DTYPES = ("auto", "int8")
"""``auto`` is the dtype of everything else."""

LINEAR_REVISION = 1
"""Part of the numerics class: raised when the bits of a compiled product change."""


@dataclass(frozen=True, slots=True)
class LinearKind:
    """How a model's products are computed."""

    kernels: str
    """A name in `MAKERS`."""
    level: str = ""
    """Instruction set of compiled kernels; of torch's, whose they are (`kernels_of`)."""
    weight_dtype: str = "auto"

    @property
    def name(self) -> str:
        """For the numerics class."""
        if self.kernels == "torch":
            return self.level
        weights = "" if self.weight_dtype == "auto" else f"-w{self.weight_dtype}"
        return f"linear{LINEAR_REVISION}.{self.level}{weights}"

    def make(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        gated: bool = False,
        logits: bool = False,
    ) -> Linear:
        """``weight [out, in]``, ``bias [out]``. ``gated``: see `Linear`; ``logits``: the output
        projection, which gives fp32."""
        return MAKERS[self.kernels](self, weight, bias, gated, logits)


def choose_linear(device: str, dtype: str, weight_dtype: str, level: str | None) -> LinearKind:
    """The best kind for a device, given the level of the compiled kernels (None: there are none).

    Raises `ConfigError` for weights that cannot be had here.
    """
    if weight_dtype not in WEIGHT_DTYPES:
        known = ", ".join(WEIGHT_DTYPES)
        raise ConfigError(f"weight dtype {weight_dtype!r} is unknown: choose one of {known}")
    native = level is not None and torch.device(device).type == "cpu"
    if weight_dtype == "int8":
        if dtype != "bf16":
            raise ConfigError(f"int8 weights go with --dtype bf16, and it is {dtype}")
        if not native:
            raise ConfigError(
                "int8 weights need the compiled kernels and a CPU: install a C++ compiler and then "
                "pdserve again, or use --weight-dtype auto"
            )
    if not native:
        on_cpu = torch.device(device).type == "cpu"
        return LinearKind("torch", kernels_of(DTYPES[dtype]) if on_cpu else "")
    assert level is not None
    return LinearKind("native", level, weight_dtype)


def _make_library(
    kind: LinearKind,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gated: bool,
    logits: bool,
) -> Linear:
    rows = MAX_LOGIT_ROWS if logits else MAX_ROWS
    out_dtype = torch.float32 if logits or gated else None
    return LibraryLinear(weight, bias, rows, gated=gated, out_dtype=out_dtype)


def _make_native(
    kind: LinearKind,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gated: bool,
    logits: bool,
) -> Linear:
    return NativeLinear(
        weight,
        bias,
        level=kind.level,
        int8=kind.weight_dtype == "int8",
        gated=gated,
        out_dtype=torch.float32 if logits else None,
    )


Maker = Callable[[LinearKind, torch.Tensor, torch.Tensor | None, bool, bool], Linear]

MAKERS: dict[str, Maker] = {"torch": _make_library, "native": _make_native}
"""Kernels by name: (kind, weight, bias, gated, logits) -> `Linear`."""
