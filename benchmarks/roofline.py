"""How far the roofline is from what others measured on A100 and H100.

Splitwise's table of Llama-2-70B and BLOOM-176B (``splitwise_perf_model.csv`` in a folder of yours,
medians of its repeats; prompts together of at most `FITTED_TOKENS` tokens, and all of them), and
DistServe's curves of OPT-13B and OPT-66B. An error is ``predicted / measured - 1``. Below that: the
pools that DistServe states, and the mean power that Splitwise's table has of A100.

    python benchmarks/roofline.py --data DIR [--points] [--fit] [--json]
    python benchmarks/roofline.py --catalogue

``--catalogue`` prints the devices and links of the catalogue, as docs/hardware.md has them.
``--points`` prints every point. ``--fit`` searches, one constant after another from those in the
catalogue, for ones with a smaller error, and prints what it finds.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import log
from pathlib import Path

from pdserve.core.step import StepShape
from pdserve.cost.hardware import HARDWARE, Hardware
from pdserve.cost.links import LINKS
from pdserve.cost.models import MODELS
from pdserve.cost.roofline import DECODE_BASE_SHARE, DECODE_MEMORY_SHARE, machine_of
from pdserve.cost.roofline_timer import RUNTIMES, RooflineTimer, Runtime

FITTED_TOKENS = 2048
NAMES = {
    "llama2-70b": "llama-2-70b",
    "bloom-176b": "bloom-176b",
    "a100-80gb": "a100",
    "h100-80gb": "h100",
}
SOFTWARE = {"splitwise": "eager", "distserve": "native"}

# DistServe's fits on A100-80GB (its repository, evaluation/docs), in ms: prompts a + b * tokens +
# c * tokens^2; decode a + b * context + c * batch, of small batches and of 95 or more.
Curve = tuple[float, float, float]
DISTSERVE: Mapping[tuple[str, int], tuple[Curve, Curve, Curve]] = {
    ("opt-13b", 1): ((18.10, 0.10191, 7.12e-6), (19.93, 6.27e-4, 0.0385), (7.17, 5.80e-4, 0.158)),
    ("opt-13b", 2): ((14.74, 0.06858, 2.45e-6), (13.29, 3.41e-4, 0.063), (10.64, 3.12e-4, 0.0856)),
    ("opt-13b", 4): ((12.06, 0.03808, 5.2e-7), (10.26, 1.88e-4, 0.0327), (10.48, 1.71e-4, 0.0457)),
    ("opt-66b", 2): ((43.06, 0.27423, 2.25e-5), (48.29, 9.42e-4, 0.1276), (28.73, 4.74e-4, 0.296)),
    ("opt-66b", 4): ((29.44, 0.15135, 8.32e-6), (30.76, 4.52e-4, 0.0633), (27.47, 4.05e-4, 0.125)),
}
DISTSERVE_POOLS = {  # tokens: its max_num_tokens.csv
    ("opt-13b", 1): 66_144,
    ("opt-13b", 2): 163_008,
    ("opt-13b", 4): 356_736,
    ("opt-66b", 2): 11_600,
    ("opt-66b", 4): 78_496,
}
LARGE_BATCH = 95


@dataclass(frozen=True, slots=True)
class Point:
    """One measured step."""

    source: str
    model: str
    hardware: str
    tp: int
    phase: str
    shape: StepShape
    seconds: float
    label: str

    @property
    def series(self) -> tuple[str, str, str, int, str]:
        return self.source, self.model, self.hardware, self.tp, self.phase


@dataclass(frozen=True, slots=True)
class Row:
    """One configuration of Splitwise's table: medians of its repeats, times in ms."""

    model: str
    hardware: str
    tp: int
    prompt: int
    batch: int
    output: int
    prompt_ms: float
    token_ms: float
    e2e_ms: float
    power: float


def splitwise_rows(path: Path) -> list[Row]:
    groups: dict[tuple[str, str, int, int, int, int], list[list[float]]] = defaultdict(list)
    columns = ("prompt_time", "token_time", "e2e_time", "average_power")
    with path.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if row["hardware"] not in NAMES:  # the capped H100 is made up of the other's times
                continue
            sizes = (int(row[name]) for name in ("prompt_size", "batch_size", "token_size"))
            prompt, batch, output = sizes
            tp = int(row["tensor_parallel"])
            key = (NAMES[row["model"]], NAMES[row["hardware"]], tp, prompt, batch, output)
            groups[key].append([float(row[name]) for name in columns])
    return [
        Row(*key, *(statistics.median(column) for column in zip(*repeats, strict=True)))
        for key, repeats in sorted(groups.items())
    ]


def splitwise_points(rows: list[Row]) -> Iterator[Point]:
    for row in rows:
        if (row.model, row.tp, row.batch) == ("llama-2-70b", 2, 64):
            continue  # did not fit: the table has the times of fewer sequences
        where = ("splitwise", row.model, row.hardware, row.tp)
        label = f"{row.prompt} in x {row.batch}, {row.output} out"
        tokens = row.prompt * row.batch
        prompt = StepShape(tokens, tokens * row.prompt)
        yield Point(*where, "prompt", prompt, row.prompt_ms / 1e3, label)
        context = row.batch * (row.prompt + min(row.output, 1024) // 2)
        decode = StepShape(num_decoding=row.batch, context_tokens=context)
        yield Point(*where, "decode", decode, row.token_ms / 1e3, label)


def distserve_points() -> Iterator[Point]:
    for (model, tp), (prompt, small, large) in DISTSERVE.items():
        where = ("distserve", model, "a100", tp)
        for tokens in (64, 128, 256, 512, 1024, 2048):
            ms = prompt[0] + prompt[1] * tokens + prompt[2] * tokens * tokens
            shape = StepShape(tokens, tokens * tokens)
            yield Point(*where, "prompt", shape, ms / 1e3, f"{tokens} in")
        for batch in (1, 4, 16, 64, 128):
            for length in (128, 512, 1024):
                if batch * length > DISTSERVE_POOLS[model, tp]:
                    continue
                a, b, c = small if batch < LARGE_BATCH else large
                shape = StepShape(num_decoding=batch, context_tokens=batch * length)
                seconds = (a + b * batch * length + c * batch) / 1e3
                yield Point(*where, "decode", shape, seconds, f"{batch} at {length}")


Devices = Mapping[str, Hardware]
Software = Mapping[str, Runtime]


def errors(points: list[Point], devices: Devices, software: Software) -> list[float]:
    """``predicted / measured - 1`` of each."""
    timers: dict[tuple[str, str, str, int], RooflineTimer] = {}
    found = []
    for point in points:
        key = point.source, point.model, point.hardware, point.tp
        if key not in timers:
            runtime = software[SOFTWARE[point.source]]
            shape = MODELS[point.model].shape
            timers[key] = RooflineTimer(shape, devices[point.hardware], point.tp, runtime)
        found.append(timers[key].step_s(point.shape) / point.seconds - 1.0)
    return found


def is_fitted(point: Point) -> bool:
    return point.source != "splitwise" or point.shape.prompt_tokens <= FITTED_TOKENS


def summary(found: list[float]) -> dict[str, float]:
    sizes = sorted(map(abs, found))
    return {
        "points": len(found),
        "median": statistics.median(sizes),
        "mean": statistics.fmean(sizes),
        "p90": sizes[int(0.9 * (len(sizes) - 1))],
        "bias": statistics.median(found),
    }


def tables(points: list[Point]) -> dict[str, dict[str, dict[str, float]]]:
    """By series, by source and phase, and of those that the constants are fitted to."""
    found = errors(points, HARDWARE, RUNTIMES)
    series: dict[str, list[float]] = defaultdict(list)
    phases: dict[str, list[float]] = defaultdict(list)
    for point, error in zip(points, found, strict=True):
        source, model, hardware, tp, phase = point.series
        series[f"{source}: {model} on {tp} x {hardware}, {phase}"].append(error)
        phases[f"{source}, {phase}, all"].append(error)
        if is_fitted(point) and (source, phase) == ("splitwise", "prompt"):
            phases[f"{source}, {phase}, at most {FITTED_TOKENS} tokens of prompts"].append(error)
    return {
        "series": {name: summary(each) for name, each in series.items()},
        "phases": {name: summary(each) for name, each in sorted(phases.items())},
    }


# --- what else can be checked -----------------------------------------------------------------


def pools() -> dict[str, float]:
    """Relative error of the pool, in tokens."""
    found = {}
    for (model, tp), tokens in DISTSERVE_POOLS.items():
        machine = machine_of("a100", model, tp=tp)
        mine = machine.num_blocks * machine.block_size
        found[f"{model} on {tp} x a100"] = mine / tokens - 1.0
    return found


def powers(rows: list[Row]) -> dict[str, float]:
    """Relative error of mean power, of A100 and of prompts of at most 2048 tokens (with longer
    ones the table's power falls below that of its own decode steps)."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.power == 0 or row.prompt * row.batch > FITTED_TOKENS:
            continue
        shape, hardware = MODELS[row.model].shape, HARDWARE[row.hardware]
        rate = hardware.bytes_per_s * row.tp
        used = shape.memory_bytes / (row.token_ms / 1e3 * rate)
        decode = DECODE_BASE_SHARE + DECODE_MEMORY_SHARE * used
        share = row.prompt_ms / row.e2e_ms
        mean = share * 1.0 + (1.0 - share) * decode
        found[f"{row.model} on {row.tp} x {row.hardware}"].append(mean / row.power - 1.0)
    return {name: statistics.median(each) for name, each in found.items()}


# --- the search -------------------------------------------------------------------------------

SHARED = ("memory_share", "peer_share")
FIELDS = ("prompt_launch_s", "decode_launch_s", "sequence_s", "step_s", "reduce_s")
SHARES = ("attention_share", "kv_share")


def fit(points: list[Point]) -> dict[str, tuple[float, float]]:
    """Constants of the catalogue, and what a search from there finds. Each series of a source and
    phase counts as much as another; the error is the mean of ``|log(predicted / measured)|``."""
    chosen = [point for point in points if is_fitted(point)]
    start = {f"{name}.compute_share": HARDWARE[name].compute_share for name in ("a100", "h100")}
    start["h100.host_speed"] = HARDWARE["h100"].host_speed
    start |= {name: getattr(HARDWARE["a100"], name) for name in SHARED}
    for name in SOFTWARE.values():
        start |= {f"{name}.{each}": getattr(RUNTIMES[name], each) for each in (*FIELDS, *SHARES)}

    def loss(values: Mapping[str, float]) -> float:
        devices, software = _made(values)
        groups: dict[tuple[str, str], list[float]] = defaultdict(list)
        for point, error in zip(chosen, errors(chosen, devices, software), strict=True):
            groups[point.source, point.phase].append(abs(log(1.0 + error)))
        return sum(map(statistics.fmean, groups.values()))

    best, least, step = dict(start), loss(start), 0.1
    while step > 0.01:
        moved = False
        for name in start:
            for factor in (1.0 + step, 1.0 / (1.0 + step)):
                tried = {**best, name: best[name] * factor}
                if name.endswith("_share") and tried[name] > 1.0:
                    continue
                found = loss(tried)
                if found < least - 1e-5:
                    best, least, moved = tried, found, True
        if not moved:
            step /= 2.0
    return {name: (value, best[name]) for name, value in start.items()}


def _made(values: Mapping[str, float]) -> tuple[Devices, Software]:
    shared = {name: values[name] for name in SHARED}
    devices = {
        name: replace(HARDWARE[name], compute_share=values[f"{name}.compute_share"], **shared)
        for name in ("a100", "h100")
    }
    devices["h100"] = replace(devices["h100"], host_speed=values["h100.host_speed"])
    software = {
        name: replace(RUNTIMES[name], **{k: values[f"{name}.{k}"] for k in (*FIELDS, *SHARES)})
        for name in SOFTWARE.values()
    }
    return devices, software


def catalogue() -> list[str]:
    """Lines of two tables."""
    lines = [
        "| device | TFLOP/s | TB/s | GB | to a neighbour | network | W idle, at most, host | $/h |",
        "| --- | --- | --- | ---: | ---: | --- | --- | ---: |",
    ]
    for name, each in HARDWARE.items():
        peer = f"{each.peer_bytes_per_s / 1e9:.0f} GB/s" if each.peer_bytes_per_s else "none"
        cells = (
            f"`{name}`",
            f"{each.flops / 1e12:.4g} x {each.compute_share:.2g}",
            f"{each.bytes_per_s / 1e12:.3g} x {each.memory_share:.2g}",
            f"{each.memory_bytes / 1e9:.1f}",
            peer,
            f"`{each.network}`",
            f"{each.idle_w:g}, {each.limit_w:g}, {each.host_w:g}",
            f"{each.price_per_hour:.4g}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| link | GB/s | of a worker | fixed |", "| --- | --- | --- | ---: |"]
    for name, link in LINKS.items():
        rate = f"{link.bytes_per_s / 1e9:.4g} x {link.share:.3g}"
        adapters = "one for each device" if link.per_device else "one"
        lines.append(f"| `{name}` | {rate} | {adapters} | {link.fixed_s * 1e3:g} ms |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="has splitwise_perf_model.csv")
    parser.add_argument("--catalogue", action="store_true", help="print what is known by name")
    parser.add_argument("--points", action="store_true", help="print every point")
    parser.add_argument("--fit", action="store_true", help="search for better constants")
    parser.add_argument("--json", action="store_true")
    parsed = parser.parse_args()
    if parsed.catalogue:
        print("\n".join(catalogue()))
        return
    if parsed.data is None:
        parser.error("--data DIR is needed")
    rows = splitwise_rows(parsed.data / "splitwise_perf_model.csv")
    points = [*splitwise_points(rows), *distserve_points()]
    if parsed.fit:
        for name, (old, new) in fit(points).items():
            print(f"{name:28} {old:10.4g} -> {new:10.4g}")
        return
    document = {**tables(points), "pools": pools(), "powers": powers(rows)}
    if parsed.json:
        print(json.dumps(document, indent=1))
        return
    if parsed.points:
        for point, error in zip(points, errors(points, HARDWARE, RUNTIMES), strict=True):
            print(*point.series, f"{point.label}: {point.seconds * 1e3:.1f} ms, {error:+.1%}")
    for title in ("series", "phases"):
        print(f"| {title} | points | median | mean | P90 | bias |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for name, each in document[title].items():
            sizes = " | ".join(f"{each[key]:.1%}" for key in ("median", "mean", "p90"))
            print(f"| {name} | {each['points']} | {sizes} | {each['bias']:+.1%} |")
        print()
    for title in ("pools", "powers"):
        print(f"{title}: " + ", ".join(f"{k} {v:+.1%}" for k, v in document[title].items()))


if __name__ == "__main__":
    main()
