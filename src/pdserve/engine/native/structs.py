"""The structs of the C interface (abi.h and what it names), for ctypes."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from enum import IntEnum


class AttentionArgs(ctypes.Structure):
    """`pdserve_attention_args` in attention.h, which says what each field is."""

    _fields_ = [
        ("queries", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("kv", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("kv_kind", ctypes.c_int32),
        ("queries_are_bf16", ctypes.c_int32),
        ("out_is_bf16", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


class NormArgs(ctypes.Structure):
    """`pdserve_norm_args` in rows.h."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("is_bf16", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
    ]


class PlaceLayer(ctypes.Structure):
    """`pdserve_place_layer` in rows.h."""

    _fields_ = [
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("rotates", ctypes.c_int64),
    ]


class PlaceArgs(ctypes.Structure):
    """`pdserve_place_args` in rows.h."""

    _fields_ = [
        ("heads", ctypes.c_void_p),
        ("kv", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("layer", PlaceLayer),
        ("rows", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("num_rows", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("rotary_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("is_bf16", ctypes.c_int32),
        ("kv_is_int8", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
    ]


class Op(ctypes.Structure):
    """`pdserve_op` in program.cpp: a kernel and its arguments, which must outlive it."""

    _fields_ = [
        ("args", ctypes.c_void_p),
        ("kernel", ctypes.c_int32),
        ("level", ctypes.c_int32),
    ]


class KvKind(IntEnum):
    """Numbers of a pool, as in attention.h."""

    FP32 = 0
    BF16 = 1
    INT8 = 2


class Layers(ctypes.Structure):
    """`pdserve_layers` in program.cpp."""

    _fields_ = [
        ("ops", ctypes.c_void_p),
        ("attention", ctypes.c_void_p),
        ("place", ctypes.c_void_p),
        ("place_layers", ctypes.c_void_p),
        ("kv", ctypes.c_void_p),
        ("layer_bytes", ctypes.c_int64),
        ("ops_per_layer", ctypes.c_int32),
    ]


class BestArgs(ctypes.Structure):
    """`pdserve_best_args` in rows.h."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("num_threads", ctypes.c_int32),
    ]


class Kernel(IntEnum):
    """What an `Op` can be, by its number in program.cpp."""

    NORM = 0
    PLACE = 1
    ATTENTION = 2
    LINEAR = 3


class StepTable:
    """The rows of a step and their block tables, as `pdserve_row` and one list of blocks."""

    def __init__(self, rows: Iterable[tuple[int, int, int, Sequence[int]]]) -> None:
        """Each row as (first token, number of tokens, start, block ids)."""
        self._rows, self._tables = array("i"), array("i")
        for first, num_tokens, start, block_ids in rows:
            self._rows.extend((first, num_tokens, start, len(self._tables)))
            self._tables.extend(block_ids)
        self.num_rows = len(self._rows) // 4

    @property
    def rows(self) -> int:
        """Address of the rows; good as long as this object lives."""
        return self._rows.buffer_info()[0]

    @property
    def tables(self) -> int:
        """Address of the block ids."""
        return self._tables.buffer_info()[0]
