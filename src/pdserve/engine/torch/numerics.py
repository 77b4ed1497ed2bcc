"""What makes a token's logits the same bits in every batch, and the name under which that holds.

A matrix product is a sum, and a library picks the order of that sum by the shape that it is given:
with few rows it takes another kernel, with several threads it may cut the rows into pieces so small
that they take another kernel too. Measured with torch 2.11 and 2.13 on Zen 5: a fp32 product of MKL
(attention here) differs at 1 to 3 rows, and on two threads also at 5, 6, 7, 9 and 11; one of oneDNN
(the projections) at 1 row, in fp32 and in some shapes in bf16. Every other op that the model uses
is either correctly rounded by IEEE 754 (add, multiply, divide, square root), exact (max, copy), or
was measured to give a row the same bits in any place of any batch (``exp``, sums along a row of a
batch of rows). Known not to: fp32 ``silu`` and ``sigmoid`` (their scalar tail differs), ``sum`` of
a single long row on several threads.

So under ``exact`` numerics all rows of a step are padded up to a multiple of a *granule*, products
run in tiles of bounded height (`linear`), and the granule is measured when a model is loaded
(`granule`).
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from pdserve.core.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NUMERICS = ("exact", "fast")

KERNEL_REVISION = 1
"""Part of the numerics class: raised by a change here that changes the bits of a result."""


@dataclass(frozen=True, slots=True)
class Numerics:
    """How a step's rows are laid out: padded for the contract (exact) or as they come (fast)."""

    exact: bool
    granule: int

    def padded(self, num_rows: int) -> int:
        """The next multiple of the granule."""
        return -(-num_rows // self.granule) * self.granule


FAST = Numerics(exact=False, granule=1)


def check_choice(device: str, dtype: str, numerics: str) -> None:
    """Raise `ConfigError` for a device, dtype or numerics that cannot be had here."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    if numerics not in NUMERICS:
        raise ConfigError(f"numerics {numerics!r} is unknown: choose one of {', '.join(NUMERICS)}")
    kind = torch.device(device).type if re.fullmatch(r"cpu|cuda(:\d+)?", device) else None
    if kind is None:
        raise ConfigError(f"device {device!r} is unknown: choose cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device {device!r} is not available: torch {torch.__version__} sees no CUDA device; "
            "use --device cpu, or install a CUDA build of torch and its driver"
        )


def numerics_class(device: str, dtype: str, num_threads: int, numerics: str, kernels: str) -> str:
    """Name of the class within which results are equal bit by bit.

    On a CPU: torch build, threads, kernels (``kernels`` names those of the projections and of
    attention), and the processor's model, because MKL and oneDNN pick theirs by it. On CUDA it only
    says on what the values were computed.
    """
    build = f"torch{torch.__version__}"
    promise = f"{numerics}{KERNEL_REVISION}"
    if torch.device(device).type == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
        return f"cuda-{dtype}-{build}-{promise}-{name}"
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return f"cpu-{dtype}-{build}-t{num_threads}-{promise}-{kernels}-{capability}-{_processor()}"


def _processor() -> str:
    """Vendor, family and model of the processor, such as ``authenticamd-26-2``."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = [
        match.group(1).strip().lower()
        for key in ("vendor_id", "cpu family", "model")
        if (match := re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE))
    ]
    return "-".join(found) or platform.machine().lower()
