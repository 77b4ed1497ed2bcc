"""The compiled products against oneDNN's, in the shapes of a model, with the ceilings of the run.

Weights come from memory, as in a decode step: each shape has as many copies as fill `COPIES_BYTES`,
used in turn. Times are of this thread's CPU clock (a shared machine takes it off the core), the
lower quartile of the repeats, which are interleaved. The ceilings are a sum over a large array and
oneDNN's product of 2,048 x 2,048 x 2,048 in bf16.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/linear.py [--rows 1 16] [--level avx2] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence

import torch

from pdserve.engine.native import library
from pdserve.engine.torch.linear import LibraryLinear
from pdserve.engine.torch.native_linear import NativeLinear

SHAPES = {  # of SmolLM2-135M: name -> (in, out)
    "qkv": (576, 960),
    "attention out": (576, 576),
    "gate and up": (576, 3072),
    "down": (1536, 576),
    "output": (576, 49152),
}
COPIES_BYTES = 50 << 20
BYTES = {"bf16": 2, "int8": 1}


def quartiles_s(work: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Lower quartile of each, called in turn."""
    times: list[list[float]] = [[] for _ in work]
    for _ in range(repeats):
        for taken, call in zip(times, work, strict=True):
            before = time.thread_time()
            call()
            taken.append(time.thread_time() - before)
    return [sorted(taken)[len(taken) // 4] for taken in times]


def ceilings() -> dict[str, float]:
    array = torch.ones(1 << 25)
    square = torch.randn(2048, 2048).bfloat16()
    product = LibraryLinear(square, None, 2048)
    read_s, product_s = quartiles_s([array.sum, lambda: product(square)], 7)
    return {"read_gb_s": array.nbytes / read_s / 1e9, "gflop_s": 2 * 2048**3 / product_s / 1e9}


def through(linears: Sequence[Callable[[torch.Tensor], object]], rows: torch.Tensor) -> None:
    for linear in linears:
        linear(rows)


def measure(name: str, num_rows: int, level: str, repeats: int) -> dict[str, object]:
    num_in, num_out = SHAPES[name]
    copies = max(1, COPIES_BYTES // (num_in * num_out * 2))
    weights = [torch.randn(num_out, num_in).bfloat16() for _ in range(copies)]
    rows = torch.randn(num_rows, num_in).bfloat16()
    kinds = {
        "onednn": [LibraryLinear(weight, None, num_rows) for weight in weights],
        "bf16": [NativeLinear(weight, None, level=level) for weight in weights],
        "int8": [NativeLinear(weight, None, level=level, int8=True) for weight in weights],
    }
    work = [lambda used=used: through(used, rows) for used in kinds.values()]
    through([call for used in kinds.values() for call in used], rows)
    taken = dict(zip(kinds, quartiles_s(work, repeats), strict=True))
    report: dict[str, object] = {"product": name, "rows": num_rows}
    for kind, seconds in taken.items():
        report[f"{kind}_us"] = seconds / copies * 1e6
        report[f"{kind}_gflop_s"] = 2 * num_in * num_out * num_rows * copies / seconds / 1e9
        if kind in BYTES:
            report[f"{kind}_gb_s"] = num_in * num_out * BYTES[kind] * copies / seconds / 1e9
            report[f"{kind}_speedup"] = taken["onednn"] / seconds
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 32, 128, 512])
    parser.add_argument("--product", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--level", default=library.choose_level(), choices=library.levels())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.inference_mode():
        limits = ceilings()
        if not options.json:
            print(f"ceilings: {limits['read_gb_s']:.1f} GB/s, {limits['gflop_s']:.0f} GFLOP/s")
            print("product        rows  oneDNN us | bf16 us  GB/s  GFLOP/s  ratio | int8 the same")
        reports = []
        for name in options.product:
            for num_rows in options.rows:
                report = measure(name, num_rows, options.level, options.repeats)
                reports.append(report)
                if not options.json:
                    parts = [
                        f"{report[f'{kind}_us']:9.1f} {report[f'{kind}_gb_s']:5.1f} "
                        f"{report[f'{kind}_gflop_s']:6.0f} {report[f'{kind}_speedup']:6.2f}"
                        for kind in BYTES
                    ]
                    print(
                        f"{name:14s} {num_rows:4d} {report['onednn_us']:9.1f} |", " | ".join(parts)
                    )
    if options.json:
        print(json.dumps({"level": options.level, "ceilings": limits, "products": reports}))


if __name__ == "__main__":
    main()
