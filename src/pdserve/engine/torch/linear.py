"""Matrix products with weights, in tiles of bounded height.

On a CPU the weight is packed once into the layout that oneDNN's kernels want, as torch's own
compiler does it when it freezes a model. Measured on one Zen 5 core with torch 2.13: a pass over
all projections of SmolLM2-135M takes 8.8 ms packed against 15.6 ms unpacked for 4 rows in bf16, and
20 ms against 48 ms in fp32, which MKL would compute otherwise. Where torch is built without these
operators the plain product is used; `KERNELS` says which, and is part of the numerics class.
"""

from __future__ import annotations

import torch
from torch.nn import functional

MAX_ROWS = 256
"""Rows of one product at most: bounds the shapes for which the numerics contract must hold."""

MAX_LOGIT_ROWS = 64
"""The same for the output projection, whose many columns fill a kernel with fewer rows."""


def _can_pack() -> bool:
    ops = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(ops, "_reorder_linear_weight")
        and hasattr(ops, "_linear_pointwise")
    )


KERNELS = "onednn" if _can_pack() else "aten"


class Linear:
    """``y = x @ weight.T + bias``, with the weight in whatever layout is fastest here."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, max_rows: int = MAX_ROWS
    ) -> None:
        """``weight [out, in]`` and ``bias [out]``; a packed weight is a copy."""
        self.num_in = weight.shape[1]
        self.dtype = weight.dtype
        self.max_rows = max_rows
        self._packed = weight.device.type == "cpu" and KERNELS == "onednn"
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight, max_rows) if self._packed else weight
        )
        self._bias = bias

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows [n, in]`` of any float type -> ``[n, out]`` of the weight's."""
        rows = rows.to(self.dtype)
        if rows.shape[0] <= self.max_rows:
            return self._product(rows)
        return torch.cat([self._product(tile) for tile in torch.split(rows, self.max_rows)])

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if not self._packed:
            return functional.linear(rows, self._weight, self._bias)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self._bias, "none", [], ""
        )
        return product
