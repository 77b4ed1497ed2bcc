"""The structs of the C interface (abi.h and what it names), for ctypes."""

from __future__ import annotations

import ctypes


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
        ("kv_is_bf16", ctypes.c_int32),
        ("queries_are_bf16", ctypes.c_int32),
        ("out_is_bf16", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]
