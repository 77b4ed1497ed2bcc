"""What of pdserve is compiled: finds a library that lies beside the Python that calls it.

It is put there by an installation, or by a build in the source tree; of two, the newer one counts.
It may be missing, because installing pdserve does not demand a compiler, or be of another version
after an update: who asks for it can do without, and says so.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path


def find(
    folders: Iterable[str], name: str, what: str, version: str, abi: int
) -> tuple[ctypes.CDLL | None, str]:
    """(the library, "") or (None, why there is none that fits).

    ``name`` is the file's, ``what`` says what is in it (a plural), and ``version`` is the function
    that gives the version of its C interface, which must be ``abi``.
    """
    found = [path for folder in folders if (path := Path(folder) / name).exists()]
    if not found:
        return None, f"no compiled {what}: install a C++ compiler and then pdserve again"
    path = max(found, key=lambda path: path.stat().st_mtime)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"compiled {what} {path} do not load ({error})"
    if getattr(library, version)() != abi:
        return None, f"compiled {what} {path} are of another version: install pdserve again"
    return library, ""


def are_machines_compiled() -> bool:
    """True if pdserve was installed with ``PDSERVE_COMPILE=1`` (``tools/compile_machines.py``)."""
    machine = find_spec("pdserve.node.machine")
    return machine is not None and not str(machine.origin).endswith(".py")
