"""The weights digest: which model wrote a block of KV.

It salts the hashes of the prefix index and is part of `KvLayout`, so blocks of two models can never
be taken for each other. It covers the bytes, names, dtypes and shapes of all tensors that are
computed with, and the constants of the config that change KV; not the way in which the tensors are
spread over files. Hashing reads all the weights (some GB/s), so the tensors' part is kept in the
cache, keyed by path, and is valid as long as each file has its size and its times.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

import xxhash

from pdserve.weights.cache import cache_root, write_atomically
from pdserve.weights.config import ModelConfig
from pdserve.weights.progress import Report, silent
from pdserve.weights.tensor_files import TensorEntry

_VERSION = 1
_PIECE_BYTES = 1 << 26

# What the config adds to the tensors: numbers that change KV without changing a tensor.
_CONFIG_FIELDS = ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "rms_norm_eps")


def weights_digest(
    tensors: Mapping[str, TensorEntry],
    config: ModelConfig,
    *,
    cache_dir: Path | str | None = None,
    report: Report = silent,
) -> str:
    """32 hex digits (XXH3-128). ``tensors`` maps the names computed with to what lies on disk.

    Raises `OSError` if a file cannot be read; a cache that cannot be written is done without.
    """
    files = sorted({entry.file.resolve() for entry in tensors.values()})
    times = [(p.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p in files for s in [p.stat()]]
    identity = {"version": _VERSION, "tensors": sorted(tensors), "files": [list(t) for t in times]}
    key = blake2b("\0".join(map(str, files)).encode(), digest_size=16).hexdigest()
    cache_path = cache_root(cache_dir) / "digests" / f"{key}.json"
    tensors_digest = _cached(cache_path, identity)
    if tensors_digest is None:
        tensors_digest = _digest_tensors(tensors, report)
        document = json.dumps({**identity, "digest": tensors_digest}).encode()
        # A cache that cannot be written costs a second at each start, not the start.
        with contextlib.suppress(OSError):
            write_atomically(cache_path, document)
    constants = [repr(getattr(config, name)) for name in _CONFIG_FIELDS]
    rotation = (config.rotary_dim, config.rope_scaling, config.unrotated_layers)
    if rotation != (config.head_dim, None, ()):  # plain models keep the digest they had before
        constants.append(repr(rotation))
    return xxhash.xxh3_128_hexdigest("\0".join([tensors_digest, *constants]).encode())


def _cached(path: Path, identity: dict[str, object]) -> str | None:
    try:
        document = json.loads(path.read_bytes())
        digest = document.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return digest if document == identity and isinstance(digest, str) else None


def _digest_tensors(tensors: Mapping[str, TensorEntry], report: Report) -> str:
    total_bytes = sum(entry.num_bytes for entry in tensors.values())
    done_bytes = 0
    parts: dict[str, bytes] = {}
    for path in sorted({entry.file for entry in tensors.values()}):
        here = {name: entry for name, entry in tensors.items() if entry.file == path}
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            for name, entry in sorted(here.items(), key=lambda item: item[1].offset):
                hasher = xxhash.xxh3_128(f"{name}\0{entry.dtype}\0{entry.shape}\0".encode())
                end = entry.offset + entry.num_bytes
                for start in range(entry.offset, end, _PIECE_BYTES):
                    with view[start : min(start + _PIECE_BYTES, end)] as piece:
                        hasher.update(piece)
                        done_bytes += len(piece)
                    report("hashing weights", done_bytes, total_bytes)
                parts[name] = hasher.digest()
    return xxhash.xxh3_128_hexdigest(b"".join(parts[name] for name in sorted(parts)))
