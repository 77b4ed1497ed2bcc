"""Compiles the machines, the policies and the simulator from their Python, with mypyc.

    PDSERVE_COMPILE=1 pip install .        # what runs this; `make compiled` says it
    python tools/compile_machines.py OUT   # or by hand: extension modules, in OUT/pdserve/...

The files stay as they are and are installed beside what is made of them: Python takes the compiled
module where there is one for its own version, and the file otherwise. Values (``core``, settings,
views of policies) are left alone: they have no code to speak of, and mypyc does not keep what their
annotations say. docs/decisions/0023-compiled-machines.md has what was gained, and why nobody
needs it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from mypyc.build import mypycify
from setuptools import Distribution

SOURCE = Path(__file__).resolve().parent.parent / "src"
COMPILED = (
    "kv/*.py",
    "node/*.py",
    "policy/*.py",
    "cost/table.py",
    "sim/clients.py",
    "sim/clock.py",
    "sim/distribution.py",
    "sim/engine.py",
    "sim/gateway.py",
    "sim/network.py",
    "sim/simulation.py",
    "sim/timers.py",
    "sim/transfers.py",
    "sim/worker.py",
)
"""Files of the package, by pattern."""
LEFT_AS_THEY_ARE = (
    "node/settings.py",
    "policy/batch.py",
    "policy/cluster.py",
    "policy/rebalance.py",
    "policy/registry.py",
    "policy/roles.py",
)
"""Of these, what stays Python: values, which are read back from files by their annotations, and
what policies of one's own are made from."""


def sources() -> list[str]:
    """What is compiled, as paths from `SOURCE`."""
    package = SOURCE / "pdserve"
    found = {path for pattern in COMPILED for path in package.glob(pattern)}
    left = {package / name for name in LEFT_AS_THEY_ARE} | set(package.glob("*/__init__.py"))
    return sorted(str(path.relative_to(SOURCE)) for path in found - left)


def compile_into(folder: Path) -> None:
    """``folder`` gets ``pdserve/...`` with the modules, and the library that they share."""
    os.chdir(SOURCE)
    with tempfile.TemporaryDirectory() as build:
        options = ["--strict", "--ignore-missing-imports", "--config-file=", f"--cache-dir={build}"]
        extensions = mypycify(
            [*options, *sources()],
            group_name="pdserve",
            opt_level=os.environ.get("MYPYC_OPT_LEVEL", "3"),
            debug_level="0",
            target_dir=build,
        )
        command = Distribution({"ext_modules": extensions}).get_command_obj("build_ext")
        command.build_lib, command.build_temp = str(folder), build
        command.ensure_finalized()
        command.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="a folder, made if it is missing")
    compile_into(parser.parse_args().out.resolve())


if __name__ == "__main__":
    main()
