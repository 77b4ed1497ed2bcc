"""How long SplitwiseSim takes for a load, and how long ours: whole commands, CPU time, in turn.

Both read the same file of requests and write their reports. Each command is run again with one
request alone, the same number of times: what that takes is start-up (imports, settings, the table
of measurements, making the cluster), and is given and taken off alike. All runs of one process are
on one core; a repetition takes every load once, and who comes first changes from one to the next.
That both simulate the same is seen from their own reports.
"""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

Row = tuple[float, int, int]
"""Arrival in seconds, prompt and output tokens."""
METRICS = {"ttft_s": "ttft_times", "tbt_s": "tbt_times", "e2e_s": "response_times"}
"""Ours, and what SplitwiseSim's summary calls them."""
COLUMNS = (
    "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size"
)
PERCENTS = (50, 90, 99)
TRACE = "pdserve"
TICK_S = 0.01
"""CPU time is told in such steps: nothing takes less."""
THEIR_CLUSTERS = {  # SplitwiseSim's options for a design with so many of each
    "Baseline-A100": "start_state=baseline cluster.servers.0.count={0} cluster.servers.1.count=0",
    "Baseline-H100": "start_state=baseline cluster.servers.0.count=0 cluster.servers.1.count={0}",
    "AA": "start_state=splitwise cluster.servers.0.count={2} cluster.servers.1.count=0 {3}",
    "HH": "start_state=splitwise cluster.servers.0.count=0 cluster.servers.1.count={2} {3}",
    "HA": "start_state=splitwise start_state.split_type=heterogeneous"
    " cluster.servers.0.count={1} cluster.servers.1.count={0}",
    "HHcap": "cluster=hhcap_half_half start_state=splitwise_hhcap"
    " start_state.split_type=heterogeneous"
    " cluster.servers.0.count={1} cluster.servers.1.count={0}",
}


@dataclass(frozen=True, slots=True)
class Load:
    """Requests for a cluster: ``design`` with so many machines of each kind (``counts``), which
    is ``cluster`` in our words."""

    name: str
    design: str
    counts: tuple[int, ...]
    cluster: str
    model: str
    rows: Sequence[Row]


@dataclass(slots=True)
class Pair:
    """CPU seconds of ours and of SplitwiseSim, one of each a repetition."""

    ours_s: list[float] = field(default_factory=list)
    theirs_s: list[float] = field(default_factory=list)

    def ratio(self, off: Pair | None = None) -> float:
        """How much longer SplitwiseSim takes (median of the repetitions), less ``off`` each."""
        ours_s, theirs_s = (0.0, 0.0) if off is None else off.medians()
        return statistics.median(
            max(theirs - theirs_s, TICK_S) / max(ours - ours_s, TICK_S)
            for ours, theirs in zip(self.ours_s, self.theirs_s, strict=True)
        )

    def medians(self) -> tuple[float, float]:
        return statistics.median(self.ours_s), statistics.median(self.theirs_s)


@dataclass(frozen=True, slots=True)
class Simulators:
    """Where both are: SplitwiseSim's folder and what it runs with; our table of measurements."""

    theirs: Path
    python: Path
    table: Path

    def take_turns(self, loads: Sequence[Load], repeat: int) -> int:
        """Times them, prints a table, and gives 1 if their reports differ by more than 1 %."""
        with _one_core():
            return self._take_turns(loads, repeat)

    def _take_turns(self, loads: Sequence[Load], repeat: int) -> int:
        whole = {load.name: Pair() for load in loads}
        start = {load.name: Pair() for load in loads}
        worst = 0.0
        for number in range(repeat):
            for load in loads:
                self._time(load, load.rows[:1], start[load.name], number)
                off = self._time(load, load.rows, whole[load.name], number)
                worst = max(worst, off)
                ours_s, theirs_s = whole[load.name].ours_s[-1], whole[load.name].theirs_s[-1]
                line = f"{number + 1} {load.name}: {ours_s:.2f} s, SplitwiseSim {theirs_s:.2f} s"
                print(f"{line}, reports {off:.2%} apart", file=sys.stderr, flush=True)
        _print_table(loads, whole, start)
        print(f"largest difference of a percentile {worst:.2%}")
        return 0 if worst < 0.01 else 1

    def _time(self, load: Load, rows: Sequence[Row], pair: Pair, number: int) -> float:
        """Runs both, and gives the largest relative difference of their percentiles."""
        trace = self.theirs / "traces" / f"{TRACE}.csv"
        trace.write_text("\n".join([COLUMNS, *map(_line, range(len(rows)), rows), ""]))
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = Path(folder) / "ours.json", Path(folder) / "theirs"
            turns = [
                (pair.ours_s, self._our_command(load, trace, ours), Path.cwd()),
                (pair.theirs_s, self.their_command(load, theirs), self.theirs),
            ]
            for times_s, command, at in turns if number % 2 == 0 else reversed(turns):
                times_s.append(cpu_s(command, at))
            return difference(json.loads(ours.read_text()), theirs / "summary.csv")

    def _our_command(self, load: Load, trace: Path, report: Path) -> list[str]:
        return [
            sys.executable, "-m", "pdserve", "sim", "--profile", "splitwisesim", "--perf-table",
            str(self.table), "--model", load.model, "--cluster", load.cluster, "--trace",
            str(trace), "--json", str(report), "--no-progress",
        ]  # fmt: skip

    def their_command(self, load: Load, folder: Path) -> list[str]:
        """What SplitwiseSim is asked; it writes its results into ``folder``."""
        prefill, decode = load.counts[0], load.counts[-1]
        pools = f"start_state.prompt.num_instances={prefill} "
        pools += f"start_state.token.num_instances={decode}"
        written = THEIR_CLUSTERS[load.design].format(prefill, decode, prefill + decode, pools)
        options = written.split()
        if not any(option.startswith("cluster=") for option in options):
            options.insert(0, "cluster=half_half")
        scheduler = "token_jsq" if "Baseline" in load.design else "mixed_pool"
        if "llama" in load.model:
            options += ["applications.0.model_architecture=llama2-70b"]
            options += ["applications.0.model_size=llama2-70b-fp16"]
        return [
            str(self.python), "run.py", f"applications.0.scheduler={scheduler}", *options,
            "performance_model=db", f"trace.filename={TRACE}", "seed=0", f"output_dir={folder}",
        ]  # fmt: skip


@contextmanager
def _one_core() -> Iterator[None]:
    """What is started meanwhile stays on the last of the cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _line(number: int, row: Row) -> str:
    at_s, prompt, output = row
    return f"{number},2,0,{at_s!r},1,{prompt},{output}"


def cpu_s(command: Sequence[str], folder: Path) -> float:
    """CPU seconds of a command, which may use one thread."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **threads}, stdout=said, stderr=said
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)}:\n{said.read().decode(errors='replace')}")
    return used.ru_utime + used.ru_stime


def difference(ours: dict[str, dict[str, float]], summary: Path) -> float:
    """The largest relative one of a percentile, of our report and SplitwiseSim's file."""
    with summary.open() as lines:
        theirs = next(csv.DictReader(lines))
    return max(
        abs(ours[metric][f"p{percent}"] / float(theirs[f"{their_name}_p{percent}"]) - 1)
        for metric, their_name in METRICS.items()
        for percent in PERCENTS
    )


def _print_table(loads: Sequence[Load], whole: dict[str, Pair], start: dict[str, Pair]) -> None:
    """Medians of the repetitions, as Markdown."""
    print("| load | ours | SplitwiseSim | ratio | ours, start | its start | ratio without |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    ratios, without = [], []
    for load in loads:
        pair, off = whole[load.name], start[load.name]
        ratios.append(pair.ratio())
        without.append(pair.ratio(off))
        ours_s, theirs_s = pair.medians()
        print(
            f"| {load.name} | {ours_s:.2f} s | {theirs_s:.2f} s | {ratios[-1]:.2f} | "
            f"{off.medians()[0]:.2f} s | {off.medians()[1]:.2f} s | {without[-1]:.2f} |"
        )
    for text, reduced in (("geometric mean", _geometric_mean), ("least", min)):
        print(f"| {text} | | | {reduced(ratios):.2f} | | | {reduced(without):.2f} |")


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
