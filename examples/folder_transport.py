"""KV through files in a folder: a whole transport, for whoever writes one.

A pool is a file that its owner maps and computes in. A peer hears the file's name, maps it too, and
copies: what it writes the owner sees at once, for both look at the same pages. docs/hosts.md leads
through it. Serve with it:

    PYTHONPATH=examples pdserve serve --transport folder_transport:FolderTransport

The files lie in ``KV_FOLDER``, or in ``/dev/shm``, which is memory. Whoever may write there is
trusted, and a worker that is killed leaves its file behind: pdserve's own ``shm`` does neither.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pdserve.core.errors import ConfigError, TransferError
from pdserve.transport.base import KIN, Pool, PoolExport, Region, RemotePool, Transport, Writer
from pdserve.transport.regions import copy_regions
from pdserve.transport.shm import close_all


class FilePool(Pool):
    """The owner's side."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        descriptor, name = tempfile.mkstemp(prefix="kv-", dir=folder)
        self._file: Path | None = Path(name)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)  # zeroed; a full disk shows now, not later
            self.memory = memoryview(mmap.mmap(descriptor, num_bytes))
        except BaseException:
            self._file.unlink()
            raise
        finally:
            os.close(descriptor)

    def export(self, writer: Writer = KIN) -> PoolExport:
        if self._file is None:
            raise TransferError("the pool is closed and cannot be exported")
        return PoolExport(FolderTransport.name, self._file.name.encode(), self.memory.nbytes)

    def close(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        self._file, self.memory = None, memoryview(b"")  # whoever still has views keeps the pages


class RemoteFile(RemotePool):
    """The writer's side."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._memory: memoryview | None = memoryview(mapping)

    def write(self, source: memoryview, regions: Sequence[Region]) -> None:
        memory = self._memory  # once: another thread may close this side meanwhile
        if memory is None:
            raise TransferError("this side has closed its view of the peer's pool")
        copy_regions(source, memory, regions)  # checks all of them before it copies the first

    def close(self) -> None:
        self._memory = None


class FolderTransport(Transport):
    """``folder`` must be the same for all workers."""

    name = "folder"

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(os.environ.get("KV_FOLDER", "/dev/shm"))

    def allocate(self, num_bytes: int) -> Pool:
        try:
            return FilePool(self._folder, num_bytes)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"{self._folder} has no {num_bytes} bytes for KV ({error}): serve with fewer blocks"
            ) from error

    def attach(self, export: PoolExport) -> RemotePool:
        close_all(export.fds)  # descriptors that came with it are this side's, and it wants none
        try:
            name = Path(export.token.decode()).name  # a name in this folder, whatever it says
            with (self._folder / name).open("r+b") as file:
                mapping = mmap.mmap(file.fileno(), 0)
        except (OSError, ValueError) as error:
            raise TransferError(f"the peer's pool cannot be mapped: {error}") from error
        if (export.transport, export.fds, export.num_bytes) != (self.name, (), len(mapping)):
            raise TransferError(f"no pool of this folder: {export}")
        return RemoteFile(mapping)
