"""How near the native engine comes to what one worker's cores can do.

Two ceilings are measured in the same run, between the cases: the rate of a large matrix product (of
torch, in the engine's dtype) and the bandwidth of reading memory that no cache holds. A prefill is
set against the first over all its FLOPs; a decode step against the larger of its two bounds, bytes
of weights and KV over the bandwidth and FLOPs over the rate. What a step costs outside the compiled
kernels is timed call by call.

    taskset -c 1 python benchmarks/engine.py [--threads 1] [--clock cpu] [--numerics fast] ...
    python benchmarks/engine.py --scaling [--repeats 9]

Every figure is a median. On a machine that others use, too, ``--clock cpu`` counts the time that
the process had a core; it goes with one thread. ``--scaling`` sets a worker on two threads against
one on a single thread, step by step in turn, beside what two threads gain for torch's product and
for reading memory, to which two cores may share the way. Where others use the machine, too, the
lower quartiles say more than the medians; the ratio of these is given as well.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pdserve.core.ids import AttemptId, BlockId, Epoch, RequestId, StepId
from pdserve.core.layout import DTYPE_BYTES, KV_DTYPES, KvLayout
from pdserve.core.request import SamplingParams
from pdserve.core.step import SampleSpec, StepPlan, StepRow
from pdserve.engine.native import library
from pdserve.engine.torch.numerics import DTYPES
from pdserve.engine.torch.runner import TorchRunner
from pdserve.weights.config import ModelConfig
from pdserve.weights.folder import ModelFolder
from pdserve.weights.pull import resolve

BLOCK_SIZE = 16
GREEDY = SamplingParams(max_tokens=16, seed=0, temperature=0.0)
PREFILLS = (512, 1024, 2048)
DECODES = ((1, 256), (1, 1024), (16, 256), (16, 1024))
"""Batch, and tokens of context of each row."""
NUM_BLOCKS = max(batch * context for batch, context in DECODES) // BLOCK_SIZE

THREADS = (1, 2)
KERNELS = ("pdserve_run_layers", "pdserve_run", "pdserve_linear", "pdserve_norm", "pdserve_best")

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}


@dataclass(frozen=True)
class Case:
    """One step, what it must compute, and what it must read."""

    name: str
    plan: StepPlan
    flops: float
    read_bytes: float


def row(num_tokens: int, start: int, table: Sequence[int]) -> StepRow:
    return StepRow(
        attempt=AttemptId(RequestId("request"), Epoch(1)),
        token_ids=tuple(range(3, 3 + num_tokens)),
        start=start,
        block_ids=tuple(map(BlockId, table)),
        sample=SampleSpec(params=GREEDY, choices=(0,), index=0),
    )


def widths(config: ModelConfig) -> tuple[int, int]:
    """Weights that each token is multiplied with, in all layers; and those of the logits."""
    query = config.num_heads * config.head_dim
    key = config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * query + 2 * key + 3 * config.intermediate_size)
    return config.num_layers * layer, config.vocab_size * config.hidden_size


def cases(config: ModelConfig, weight_bytes: int, layout: KvLayout, num_blocks: int) -> list[Case]:
    """``weight_bytes`` are those of one number."""
    per_token, logits = widths(config)
    seen = 4 * config.num_layers * config.num_heads * config.head_dim  # FLOPs of a (query, key)
    kv = layout.pool_bytes(1) // layout.block_size  # of a token
    found = []
    for n in PREFILLS:
        plan = StepPlan(step_id=StepId(1), rows=(row(n, 0, range(-(-n // BLOCK_SIZE))),), copies=())
        flops = 2 * (per_token * n + logits) + seen * n * (n + 1) / 2
        found.append(Case(f"prefill {n}", plan, flops, (per_token + logits) * weight_bytes))
    for batch, context in DECODES:
        free = random.Random(0).sample(range(num_blocks), num_blocks)
        each = context // BLOCK_SIZE
        tables = [free[i * each : (i + 1) * each] for i in range(batch)]
        plan = StepPlan(
            step_id=StepId(1), rows=tuple(row(1, context - 1, table) for table in tables), copies=()
        )
        flops = 2 * batch * (per_token + logits) + seen * batch * context
        read = (per_token + logits) * weight_bytes + kv * batch * context
        found.append(Case(f"decode {batch} x {context}", plan, flops, read))
    return found


def a_runner(folder: ModelFolder, arguments: argparse.Namespace, threads: int) -> TorchRunner:
    return TorchRunner(
        folder.config,
        folder.load_tensors(dtype=arguments.dtype),
        weights_digest="benchmark",
        device="cpu",
        dtype=arguments.dtype,
        block_size=BLOCK_SIZE,
        num_threads=threads,
        numerics=arguments.numerics,
        weight_dtype=arguments.weight_dtype,
        kv_dtype=arguments.kv_dtype,
    )


class Ceilings:
    """What the machine can do, measured again and again between the cases."""

    def __init__(self, dtype: torch.dtype, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._square = torch.randn(2048, 2048).to(dtype)
        self._memory = torch.ones(64 << 20, dtype=torch.int32)
        self._rates: list[float] = []
        self._bandwidths: list[float] = []

    def measure(self) -> None:
        started = self._clock()
        torch.mm(self._square, self._square)
        self._rates.append(2 * 2048**3 / (self._clock() - started))
        started = self._clock()
        self._memory.max()
        self._bandwidths.append(self._memory.numel() * 4 / (self._clock() - started))

    @property
    def flops_per_s(self) -> float:
        return statistics.median(self._rates)

    @property
    def bytes_per_s(self) -> float:
        return statistics.median(self._bandwidths)


class KernelClock:
    """Time spent in compiled kernels. Make it before the runner whose calls it is to see."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.spent_s = 0.0
        self.clock = clock
        kernels = library.load()
        for name in KERNELS if kernels is not None else ():
            setattr(kernels, name, self._timed(getattr(kernels, name)))

    def _timed(self, kernel: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: object) -> int:
            started = self.clock()
            failed = kernel(*arguments)
            self.spent_s += self.clock() - started
            return failed

        return call


def overhead_s(runner: TorchRunner, plan: StepPlan, kernels: KernelClock) -> float:
    """What a step takes outside the compiled kernels, this measuring included."""
    times = []
    for _ in range(15):
        kernels.spent_s = 0.0
        started = kernels.clock()
        runner.execute(plan)
        times.append(kernels.clock() - started - kernels.spent_s)
    return statistics.median(times)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    clock = CLOCKS[arguments.clock]
    kernels = KernelClock(clock)
    folder = ModelFolder.open(resolve(arguments.model, progress=False))
    runner = a_runner(folder, arguments, arguments.threads)
    layout = runner.info.layout
    num_blocks = NUM_BLOCKS
    memory = bytearray(layout.pool_bytes(num_blocks))
    runner.attach_pool(memoryview(memory), num_blocks)
    all_cases = cases(folder.config, weight_bytes(arguments), layout, num_blocks)
    ceilings = Ceilings(DTYPES[arguments.dtype], clock)
    times: dict[str, list[float]] = {case.name: [] for case in all_cases}
    for repeat in range(arguments.repeats + 1):
        for case in all_cases:
            ceilings.measure()
            started = clock()
            runner.execute(case.plan)
            if repeat:  # the first one warms up
                times[case.name].append(clock() - started)
    full = next(case for case in all_cases if case.name == "decode 16 x 256")
    report: dict[str, Any] = {
        "numerics": layout.numerics,
        "threads": arguments.threads,
        "clock": arguments.clock,
        "gemm_gflops_per_s": ceilings.flops_per_s / 1e9,
        "read_gb_per_s": ceilings.bytes_per_s / 1e9,
        "overhead_ms": overhead_s(runner, full.plan, kernels) * 1e3,
        "cases": {},
    }
    for case in all_cases:
        taken_s = statistics.median(times[case.name])
        compute_s = case.flops / ceilings.flops_per_s
        read_s = case.read_bytes / ceilings.bytes_per_s
        report["cases"][case.name] = {
            "ms": taken_s * 1e3,
            "compute_bound_ms": compute_s * 1e3,
            "read_bound_ms": read_s * 1e3,
            "of_bound": max(compute_s, read_s) / taken_s,
        }
    return report


def weight_bytes(arguments: argparse.Namespace) -> int:
    return 1 if arguments.weight_dtype == "int8" else DTYPE_BYTES[arguments.dtype]


def scaling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each case on one thread and on two, in turn."""
    folder = ModelFolder.open(resolve(arguments.model, progress=False))
    runners = {threads: a_runner(folder, arguments, threads) for threads in THREADS}
    layout = runners[1].info.layout
    memory = bytearray(layout.pool_bytes(NUM_BLOCKS))
    for runner in runners.values():
        runner.attach_pool(memoryview(memory), NUM_BLOCKS)
    square = torch.randn(2048, 2048).to(DTYPES[arguments.dtype])
    array = torch.ones(64 << 20, dtype=torch.int32)
    work: dict[str, Callable[[int], object]] = {
        "product": lambda threads: torch.mm(square, square),
        "reading": lambda threads: array.max(),
    }
    for case in cases(folder.config, weight_bytes(arguments), layout, NUM_BLOCKS):
        work[case.name] = lambda threads, plan=case.plan: runners[threads].execute(plan)
    report: dict[str, Any] = {}
    for name, run in work.items():
        times: dict[int, list[float]] = {threads: [] for threads in THREADS}
        for repeat in range(arguments.repeats + 1):
            for threads, taken in times.items():
                torch.set_num_threads(threads)
                started = time.perf_counter()
                run(threads)
                if repeat:
                    taken.append(time.perf_counter() - started)
        one, two = (sorted(times[threads]) for threads in THREADS)
        report[name] = {
            "one_ms": statistics.median(one) * 1e3,
            "two_ms": statistics.median(two) * 1e3,
            "scaling": statistics.median(one) / statistics.median(two),
            "quartile_scaling": one[len(one) // 4] / two[len(two) // 4],
        }
    return report


def print_scaling(report: dict[str, Any]) -> None:
    print(f"{'':16}{'1 thread':>10}{'2 threads':>10}{'median':>8}{'quartile':>10}")
    for name, case in report.items():
        print(
            f"{name:16}{case['one_ms']:10.1f}{case['two_ms']:10.1f}"
            f"{case['scaling']:7.2f}x{case['quartile_scaling']:9.2f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--weight-dtype", choices=("auto", "int8"), default="auto")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="auto")
    parser.add_argument("--numerics", choices=("exact", "fast"), default="exact")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scaling", action="store_true", help="one thread against two")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and arguments.threads != 1:
        parser.error("--clock cpu counts one thread: it goes with --threads 1")
    torch.set_num_threads(arguments.threads)
    report = scaling(arguments) if arguments.scaling else measure(arguments)
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    if arguments.scaling:
        print_scaling(report)
        return
    print(f"{report['numerics']}, {report['clock']} time")
    print(f"product {report['gemm_gflops_per_s']:.0f} GFLOP/s, ", end="")
    print(f"reading {report['read_gb_per_s']:.1f} GB/s, ", end="")
    print(f"outside the compiled kernels {report['overhead_ms']:.2f} ms of decode 16 x 256")
    print(f"{'':16}{'ms':>9}{'compute':>9}{'read':>9}{'of bound':>10}")
    for name, case in report["cases"].items():
        print(
            f"{name:16}{case['ms']:9.1f}{case['compute_bound_ms']:9.1f}"
            f"{case['read_bound_ms']:9.1f}{case['of_bound']:10.0%}"
        )


if __name__ == "__main__":
    main()
