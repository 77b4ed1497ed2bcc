"""Matrix products with weights, behind a seam: packed when a model is loaded, used in every step.

`LibraryLinear` computes with torch, everywhere. On a CPU the weight is packed into the layout that
oneDNN's kernels want, as torch's own compiler does it when it freezes a model. Measured on one Zen
5 core with torch 2.13: a pass over all projections of SmolLM2-135M takes 8.8 ms packed against 15.6
ms unpacked for 4 rows in bf16, and 20 ms against 48 ms in fp32, which MKL would compute otherwise.
Where torch is built without these operators, or the processor is without the instructions, the
plain product is used; `kernels_of` says which.

`native_linear` has our own kernels, and `linear_registry` chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache

import torch
from torch.nn import functional

MAX_ROWS = 256
"""Rows of one product at most: bounds the shapes for which the numerics contract must hold."""

MAX_LOGIT_ROWS = 64
"""The same for the output projection, whose many columns fill a kernel with fewer rows."""


@cache
def kernels_of(dtype: torch.dtype) -> str:
    """Whose kernels multiply on this CPU: ``onednn``, packed, or ``aten``, as it comes.

    oneDNN's bf16 needs AVX-512 or AVX-NE-CONVERT, which it says by refusing to pack.
    """
    try:
        pack(torch.zeros(16, 16, dtype=dtype), 1)
    except (AttributeError, RuntimeError):
        return "aten"
    return "onednn"


def pack(weight: torch.Tensor, num_rows: int) -> torch.Tensor:
    """``weight [out, in]`` in oneDNN's layout for products with about ``num_rows`` rows."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
    return packed


class Linear(ABC):
    """``y = x @ weight.T + bias``. A gated one gives ``silu(gate) * up`` of its outputs' halves."""

    num_in: int
    dtype: torch.dtype
    """Of the weight before any rounding to fewer bits, and of the rows in the products."""
    max_rows: int
    """Most rows that are one product; the numerics contract is tried out up to here."""

    @abstractmethod
    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows [n, in]`` of any float type -> ``[n, out]`` of the output's."""

    @abstractmethod
    def add_to(self, residual: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the product to ``residual [n, out]`` in place. Not for a gated one."""


class LibraryLinear(Linear):
    """By torch: oneDNN on a CPU, whatever it has on other devices."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        max_rows: int = MAX_ROWS,
        *,
        gated: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        """``weight [out, in]`` and ``bias [out]``; a packed weight is a copy."""
        self.num_in = weight.shape[1]
        self.dtype = weight.dtype
        self.max_rows = max_rows
        self._gated = gated
        self._out_dtype = out_dtype or weight.dtype
        self._packed = weight.device.type == "cpu" and kernels_of(weight.dtype) == "onednn"
        self._weight = pack(weight, max_rows) if self._packed else weight
        self._bias = bias

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(self.dtype)
        if rows.shape[0] <= self.max_rows:
            return self._finished(self._product(rows))
        tiles = torch.split(rows, self.max_rows)
        return torch.cat([self._finished(self._product(tile)) for tile in tiles])

    def add_to(self, residual: torch.Tensor, rows: torch.Tensor) -> None:
        assert not self._gated, "a gated product has no residual"
        residual.add_(self(rows))

    def _finished(self, product: torch.Tensor) -> torch.Tensor:
        return (swiglu(product) if self._gated else product).to(self._out_dtype)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if not self._packed:
            return functional.linear(rows, self._weight, self._bias)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self._bias, "none", [], ""
        )
        return product


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``[token, 2 * intermediate]``, in fp32 (arXiv:2002.05202).

    silu is spelt out because the library's own gives other bits in a tensor's tail (`numerics`).
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    activated = gate.neg().exp_().add_(1.0)  # one buffer from here on
    return torch.div(gate, activated, out=activated).mul_(up)
