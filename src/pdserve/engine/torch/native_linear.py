"""Matrix products with weights in our own compiled kernels (`native/linear.cpp`).

Weights are packed once, when a model is loaded, into panels of `PANEL` output columns that a kernel
reads from front to back. Every output is one chain of additions over the inputs in their order, so
a row has the same bits in a batch of any size, on any number of threads, with or without what is
fused behind the product (a scale, a bias, a residual, the gate of SwiGLU). Packed weights lie in
memory of their own that asks for huge pages.

Weights in int8 are symmetric and scaled per output channel: ``w = q * max|w| / 127`` with ``q``
rounded to -127..127 (the weight-only form of Dettmers et al. 2022, arXiv:2208.07339, section 2.1).
Activations stay bf16, products and sums are those of bf16, for which every ``q`` is exact; the
scale is put on the sum.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

from pdserve.core.errors import ConfigError
from pdserve.engine.native import library
from pdserve.engine.torch.linear import Linear

PANEL = 48
"""Output columns of one panel (``kPanel`` in native/linear.hpp)."""

PROBED_ROWS = 96
"""Any number of rows is one product; so many are tried when the row granule is measured."""

_KINDS = {torch.bfloat16: 0, torch.float32: 1, torch.int8: 2}
_HELD_TOGETHER = {torch.bfloat16: 2, torch.float32: 1, torch.int8: 4}
_STORE, _ADD, _GATE = 0, 1, 2
_HUGE_PAGE_BYTES = 2 << 20


class LinearCall(ctypes.Structure):
    """Arguments of ``pdserve_linear``; the fields are explained in native/linear.hpp."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("num_in", ctypes.c_int64),
        ("num_out", ctypes.c_int64),
        ("rows_kind", ctypes.c_int32),
        ("weight_kind", ctypes.c_int32),
        ("out_kind", ctypes.c_int32),
        ("epilogue", ctypes.c_int32),
        ("level", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


class NativeLinear(Linear):
    """At one instruction set level, on torch's number of threads. The engine thread owns it."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        level: str,
        int8: bool = False,
        gated: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        """``weight [out, in]`` bf16 or fp32, ``bias [out]``; both are copied.

        ``int8`` rounds the weight, which must be bf16, to eight bits. ``gated`` takes the first
        half of the outputs as the gate of the second. ``out_dtype`` is the weight's, or fp32.
        Raises `ConfigError` without the compiled kernels.
        """
        kernels = library.load()
        if kernels is None:
            raise ConfigError("compiled kernels are asked for, but are not installed here")
        assert not int8 or weight.dtype == torch.bfloat16, "int8 weights go with bf16 rows"
        self.num_in = weight.shape[1]
        self.num_out = weight.shape[0] // (2 if gated else 1)
        self.dtype = weight.dtype
        self.max_rows = PROBED_ROWS
        self.out_dtype = out_dtype or weight.dtype
        self._gated = gated
        order = _column_order(weight.shape[0], gated)
        columns = _with_zero_row(weight)[order]  # [packed out, in]
        self._bias = None if bias is None else _with_zero_row(bias.float())[order].contiguous()
        self._scale = None
        if int8:
            columns, self._scale = quantize(columns)
        self._packed = _in_huge_pages(pack(columns))
        together = _HELD_TOGETHER[columns.dtype]
        self._missing_in = -self.num_in % together
        self._run = kernels.pdserve_linear
        self._call = LinearCall(
            weight=self._packed.data_ptr(),
            scale=_address(self._scale),
            bias=_address(self._bias),
            num_in=self.num_in + self._missing_in,
            num_out=self.num_out,
            weight_kind=_KINDS[columns.dtype],
            out_kind=_KINDS[self.out_dtype],
            level=library.LEVELS.index(level),
        )
        self._argument = ctypes.byref(self._call)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty(rows.shape[0], self.num_out, dtype=self.out_dtype)
        self._launch(rows, out, _GATE if self._gated else _STORE)
        return out

    def add_to(self, residual: torch.Tensor, rows: torch.Tensor) -> None:
        assert not self._gated, "a gated product has no residual"
        assert residual.is_contiguous(), "kernels read rows one after another"
        assert residual.dtype == self.out_dtype, "a sum has the type of its parts"
        assert residual.shape == (rows.shape[0], self.num_out), "one residual for each output"
        self._launch(rows, residual, _ADD)

    @property
    def reads_in_place(self) -> bool:
        """Whether rows of the weight's dtype can be read where they are: see `call_on`."""
        return not self._missing_in

    def call_on(self, rows: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> LinearCall:
        """The call that puts the product of ``rows`` into ``out``, or adds it to that.

        Both are contiguous and of the weight's dtype, and must outlive the call.
        """
        assert self.reads_in_place, "rows of this width are padded first"
        assert (rows.dtype, out.dtype) == (self.dtype, self.out_dtype), "read and written as is"
        assert out.shape == (rows.shape[0], self.num_out), "one output for each column"
        call = LinearCall()
        ctypes.pointer(call)[0] = self._call
        call.rows, call.rows_kind = rows.data_ptr(), _KINDS[rows.dtype]
        call.out = call.residual = out.data_ptr()
        call.num_rows = rows.shape[0]
        call.epilogue = _ADD if add else _GATE if self._gated else _STORE
        call.num_threads = torch.get_num_threads()
        return call

    def _launch(self, rows: torch.Tensor, out: torch.Tensor, epilogue: int) -> None:
        assert rows.shape[1] == self.num_in, "rows are as wide as the weight"
        if self.dtype == torch.float32 or rows.dtype not in _KINDS:
            rows = rows.to(self.dtype)
        if self._missing_in:
            rows = torch.nn.functional.pad(rows, (0, self._missing_in))
        rows = rows.contiguous()
        call = self._call
        call.rows = rows.data_ptr()
        call.rows_kind = _KINDS[rows.dtype]
        call.num_rows = rows.shape[0]
        call.out = call.residual = out.data_ptr()
        call.epilogue = epilogue
        call.num_threads = torch.get_num_threads()
        if failed := self._run(self._argument):
            raise MemoryError(f"a product failed ({failed}): no memory for its scratch space")


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight [out, in]`` as (int8 ``[out, in]``, fp32 scale ``[out]``); a row of zeros has 1."""
    wide = weight.float()
    largest = wide.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / 127.0, 1.0)
    return (wide / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale.contiguous()


def pack(columns: torch.Tensor) -> torch.Tensor:
    """``columns [panels * PANEL, in]`` in the order of native/linear.hpp, flat."""
    together = _HELD_TOGETHER[columns.dtype]
    columns = torch.nn.functional.pad(columns, (0, -columns.shape[1] % together))
    num_out, num_in = columns.shape
    panels = num_out // PANEL
    if columns.dtype != torch.int8:
        split = columns.view(panels, PANEL, num_in // together, together)
        return split.permute(0, 2, 1, 3).reshape(-1)
    # panel, sixteen, four of them, column, then: four inputs, pair of these, input
    split = columns.view(panels, 3, 4, 4, num_in // 4, 2, 2)
    return split.permute(0, 4, 1, 2, 5, 3, 6).reshape(-1)


def _column_order(num_out: int, gated: bool) -> torch.Tensor:
    """Which output stands in each packed column; ``num_out`` stands for one of zeros."""
    if not gated:
        order = torch.arange(num_out + -num_out % PANEL)
        return order.clamp_(max=num_out)
    half, width = num_out // 2, PANEL // 2
    outputs = torch.arange(half + -half % width)
    gates = torch.where(outputs < half, outputs, num_out).view(-1, 1, width)
    ups = torch.where(outputs < half, outputs + half, num_out).view(-1, 1, width)
    return torch.cat((gates, ups), dim=1).flatten()


def _with_zero_row(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat((tensor, tensor.new_zeros(1, *tensor.shape[1:])))


def _in_huge_pages(packed: torch.Tensor) -> torch.Tensor:
    """A copy at the start of huge pages, where the system has them; mapped until it is dropped."""
    size = packed.numel() * packed.element_size()
    memory = mmap.mmap(-1, size + 2 * _HUGE_PAGE_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % _HUGE_PAGE_BYTES
    placed = whole[first : first + size].view(packed.dtype)
    return placed.copy_(packed)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
