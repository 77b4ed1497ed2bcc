"""What a ``*.safetensors`` file says it holds, checked before anyone maps it.

The format: 8 bytes header length (little endian), a JSON header with name, dtype, shape and byte
range of each tensor, then the bytes
(https://github.com/huggingface/safetensors, "Format"). Reading headers takes milliseconds whatever
the size of the model, and a file that was cut off in copying is found here, not in mid-serving.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.core.errors import ModelError
from pdserve.weights.json_values import read_json_object

STORED_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
"""Spelling in the file -> ours."""

_DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_MAX_HEADER_BYTES = 100_000_000
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor on disk. ``offset`` and ``num_bytes`` are bytes from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def find_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model folder, from one file or from shards. Raises `ModelError`."""
    tensors: dict[str, TensorEntry] = {}
    for path in _weight_files(folder):
        for entry in read_header(path):
            if entry.name in tensors:
                raise ModelError(
                    f"tensor {entry.name} is in {tensors[entry.name].file.name} and {path.name}; "
                    f"remove the one that is left over from {folder}"
                )
            tensors[entry.name] = entry
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX_NAME).exists():
        return _shards(folder)
    files = sorted(folder.glob("*.safetensors"))
    if folder / "model.safetensors" in files:
        return [folder / "model.safetensors"]
    if len(files) == 1:
        return files
    if files:
        raise ModelError(
            f"{folder} has {len(files)} *.safetensors files but no {INDEX_NAME}; copy that too"
        )
    others = sorted(
        path.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf")
        for path in folder.glob(pattern)
    )
    found = f" (found {', '.join(others[:3])}, which it does not read)" if others else ""
    raise ModelError(
        f"{folder} has no *.safetensors files{found}; save the model with transformers' "
        "save_pretrained to get them"
    )


def _shards(folder: Path) -> list[Path]:
    index = read_json_object(folder / INDEX_NAME)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX_NAME} has no 'weight_map'; copy the model again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{folder / INDEX_NAME} names a file outside its folder: {name}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {', '.join(missing[:3])} ({len(missing)} of {len(names)} weight "
            "files); copy the model again"
        )
    return [folder / name for name in names]


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one file in the order of their bytes. Raises `ModelError` if it is broken."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise ModelError(f"{path} is no safetensors file, or cut off; copy it again")
            header = json.loads(file.read(header_bytes))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}; copy it again") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path} is no safetensors file; copy it again")
    data_start = 8 + header_bytes
    entries = [
        _entry(path, name, value, data_start)
        for name, value in header.items()
        if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: (entry.offset, entry.name))
    expected_bytes = max((e.offset + e.num_bytes for e in entries), default=data_start)
    if expected_bytes != file_bytes:
        raise ModelError(
            f"{path} has {file_bytes} bytes where its header promises {expected_bytes}: it is cut "
            "off or damaged; copy it again"
        )
    return entries


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        stored_dtype = str(value["dtype"])
        shape = tuple(int(size) for size in value["shape"])
        begin, end = (int(offset) for offset in value["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} describes tensor {name} wrongly; copy it again") from error
    dtype = STORED_DTYPES.get(stored_dtype)
    if dtype is None:
        raise ModelError(
            f"tensor {name} in {path} has dtype {stored_dtype}; pdserve reads "
            f"{', '.join(STORED_DTYPES)}: use the unquantised model"
        )
    if (
        begin < 0
        or min(shape, default=1) < 0
        or end - begin != math.prod(shape) * _DTYPE_BYTES[dtype]
    ):
        raise ModelError(f"{path} describes tensor {name} wrongly; copy it again")
    return TensorEntry(
        name=name,
        file=path,
        dtype=dtype,
        shape=shape,
        offset=data_start + begin,
        num_bytes=end - begin,
    )
