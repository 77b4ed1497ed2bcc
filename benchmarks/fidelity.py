"""How right is the simulator? A calibrated profile predicts loads that it was not calibrated on.

For each layout of the live server on this machine (one prefill and one decode worker; one mixed
worker) one server is started. Rounds of the calibration, and open loads at 0.2, 0.5 and 0.75 of
what it can do in a closed loop, follow each other on it, so that both see the machine as it is in
the same minutes (``fidelity_live.py``). Each load, of two mixes of lengths, is sent twice with the
same arrivals and lengths and other prompts, minutes apart, and is simulated with the profile. A
cell is a percentile of TTFT, TPOT or E2E: it is met if the prediction (the median of five seeds) is
off the mean of the two live runs by no more than the larger of 10 % (TTFT) or 5 % (TPOT, E2E) and
of what the two runs differ by.

What was measured of a layout is kept in ``--folder``; if it is there already, it is fitted and
compared anew, and nothing is measured. The model is that of ``pdserve serve``; further flags go to
it.

    python benchmarks/fidelity.py --folder fidelity [--layouts 1+1,mixed] [--cores 0,1] [FLAG ...]
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fidelity_live import (
    LAYOUTS,
    MIXES,
    SHARES,
    Latencies,
    Measured,
    Place,
    Times,
    fitted,
    latencies,
    measured,
    pace_load,
    timed_load,
)

from pdserve.cost.profile import Profile, machine_from_profile, to_text
from pdserve.sim.observe import Ended, Observer
from pdserve.sim.settings import SimSettings
from pdserve.sim.simulation import Simulation
from pdserve.sim.spec import parse_cluster
from pdserve.workload.request import TraceRequest
from pdserve.workload.summary import percentile

BOUNDS = {"TTFT": 0.10, "TPOT": 0.05, "E2E": 0.05}
PERCENTS = (50, 90, 99)
SEEDS = range(5)


class Ends(Observer):
    def __init__(self) -> None:
        self.requests: list[Ended] = []

    def ended(self, at_s: float, request: Ended) -> None:
        self.requests.append(request)


def simulated(
    profile: Profile, layout: str, requests: Iterable[TraceRequest], seed: int
) -> Latencies:
    cluster = parse_cluster(LAYOUTS[layout][1])
    settings = SimSettings(
        cluster=cluster,
        machines=tuple(machine_from_profile(profile, group.role) for group in cluster.groups),
        times=profile.times,
        declared_tokens=None,
        heartbeat_s=0.5,
        queue_timeout_s=600.0,
        seed=seed,
    )
    ends = Ends()
    Simulation(settings, iter(requests), [ends]).run()
    return latencies(ends.requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    layout: str
    mix: str
    share: float
    name: str
    percent: int
    num: int
    lives_s: tuple[float, ...]
    predicted_s: float

    @property
    def live_s(self) -> float:
        return statistics.fmean(self.lives_s)

    @property
    def off(self) -> float:
        return self.predicted_s / self.live_s - 1.0

    @property
    def bound(self) -> float:
        spread = (max(self.lives_s) - min(self.lives_s)) / self.live_s
        return max(BOUNDS[self.name], spread)

    @property
    def is_met(self) -> bool:
        return abs(self.off) <= self.bound

    @property
    def text(self) -> str:
        """How far off; bold if by more than the bound."""
        return f"{self.off:+.1%}" if self.is_met else f"**{self.off:+.1%}**"


def cells_of(profile: Profile, layout: str, found: Measured) -> Iterator[Cell]:
    for mix in MIXES:
        for share in SHARES:
            runs = found.of(mix, share)
            load = timed_load(mix, runs[0].rate, runs[0].seconds)
            guesses = [simulated(profile, layout, load.requests, seed) for seed in SEEDS]
            for name in BOUNDS:
                for percent in PERCENTS:
                    predicted_s = [percentile(guess[name], percent) for guess in guesses]
                    yield Cell(
                        layout=layout,
                        mix=mix,
                        share=share,
                        name=name,
                        percent=percent,
                        num=len(runs[0].latencies[name]),
                        lives_s=tuple(percentile(run.latencies[name], percent) for run in runs),
                        predicted_s=statistics.median(predicted_s),
                    )


# --- shown -------------------------------------------------------------------------------------


def show_profile(layout: str, profile: Profile, found: Measured) -> None:
    """Which machine it was, how it drifted, and what the profile says of itself."""
    one_by_one = [replace(r, at_s=10.0 * place) for place, r in enumerate(pace_load().requests)]
    lone = simulated(profile, layout, one_by_one, 0)
    threads = profile.machines[0].threads
    errors = [(k, e) for machine in profile.machines for k, e in machine.errors.items()]
    print(
        f"{layout}: {profile.host.cpu}, {profile.host.pinning}, {threads} threads a worker; "
        f"capacity {', '.join(f'{mix} {rate:.2f}/s' for mix, rate in found.capacity.items())}; "
        f"steps off by {', '.join(f'{kind} {error.median:.1%}' for kind, error in errors)}"
    )
    for place, name in ((1, "TTFT"), (2, "TPOT")):
        values = [pace[place] * 1e3 for pace in found.paces]
        print(
            f"{layout}: {name} of a lone request {statistics.median(values):.4g} ms "
            f"({min(values):.4g} to {max(values):.4g}), by the profile "
            f"{percentile(lone[name], 50) * 1e3:.4g}; between the pieces "
            + " ".join(f"{value:.3g}" for value in values)
        )
    for warning in profile.warnings:
        print(f"{layout}: warning: {warning}")


def show(cells: Sequence[Cell]) -> None:
    """A row for each load, misses in bold."""
    titles = [f"{name} P50 | P90 | P99" for name in BOUNDS]
    print(f"| workers | lengths | load | requests | {' | '.join(titles)} |")
    print("| --- | --- | ---: | ---: |" + 3 * len(BOUNDS) * " ---: |")
    rows: dict[tuple[str, str, float, int], list[str]] = {}
    for cell in cells:
        rows.setdefault((cell.layout, cell.mix, cell.share, cell.num), []).append(cell.text)
    for (layout, mix, share, num), texts in rows.items():
        print(f"| {layout} | {mix} | {share:g} | {num} | {' | '.join(texts)} |")


def show_details(cells: Sequence[Cell]) -> None:
    """A row for each cell, both live runs in it."""
    print("| layout | lengths | load | | live ms | predicted ms | off | bound | |")
    print("| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | --- |")
    for cell in cells:
        lives = " / ".join(f"{live_s * 1e3:.4g}" for live_s in cell.lives_s)
        print(
            f"| {cell.layout} | {cell.mix} | {cell.share:g} | {cell.name} P{cell.percent} "
            f"| {lives} | {cell.predicted_s * 1e3:.4g} | {cell.off:+.1%} | {cell.bound:.1%} "
            f"| {'' if cell.is_met else 'miss'} |"
        )
    print()


def show_sums(cells: Sequence[Cell]) -> None:
    for layout in dict.fromkeys(cell.layout for cell in cells):
        for name in BOUNDS:
            of = [cell for cell in cells if (cell.layout, cell.name) == (layout, name)]
            middle = statistics.median(abs(cell.off) for cell in of)
            lean = statistics.median(cell.off for cell in of)
            print(
                f"{layout}, {name}: {sum(cell.is_met for cell in of)} of {len(of)} cells within "
                f"the bound, off by {middle:.1%} in the median ({lean:+.1%} with its sign)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--folder", type=Path, required=True, help="where what was measured is kept"
    )
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="of " + ", ".join(LAYOUTS))
    parser.add_argument("--cores", help="run on these, as 0,1 (client, gateway and workers)")
    parser.add_argument(
        "--seconds", type=float, default=150.0, help="of each calibration, all rounds (150)"
    )
    parser.add_argument(
        "--capacity-seconds", type=float, default=16.0, help="to find it, for each mix (16)"
    )
    parser.add_argument(
        "--duration", type=float, default=24.0, help="seconds of arrivals in a run, at least (24)"
    )
    parser.add_argument("--details", action="store_true", help="print a row for each cell, too")
    arguments, flags = parser.parse_known_args()
    if arguments.cores:
        os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    times = Times(
        calibration=arguments.seconds, load=arguments.duration, capacity=arguments.capacity_seconds
    )
    cells: list[Cell] = []
    for layout in arguments.layouts.split(","):
        place = Place(arguments.folder / layout)
        found = measured(place, layout, times, flags)
        profile = fitted(place, layout, found)
        (place.folder / "profile.json").write_text(to_text(profile))
        show_profile(layout, profile, found)
        cells += cells_of(profile, layout, found)
    print()
    if arguments.details:
        show_details(cells)
    show(cells)
    print()
    show_sums(cells)


if __name__ == "__main__":
    main()
