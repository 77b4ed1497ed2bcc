"""How many instances does splitting save at an equal SLO? In the manner of RTP-LLM's claim.

The claim, of January 2025 and of one internal service: 24 % fewer instances, mean latency 48 % and
P99 78 % lower. Model, hardware, load, SLO and even which latency are unpublished, so nothing here
reproduces it; the same question is asked of a setting that anybody can repeat.

The Azure traces of 2023 with their own, bursty times, some time as fast; Llama-3.1-70B on workers
of 4 H100s; a promise on TTFT and TPOT that 99 % of the requests must see kept. The least number of
workers that keeps it is searched for three fleets: ``aggregated`` (every worker does both),
``split`` (two pools, the division that needs fewest), ``predicted`` (two pools of that division
that the role controller may resize, each request served in two places or in one). Then all of them
get as many workers as the aggregated fleet needs, and latencies are compared.

    python benchmarks/papers/fleet.py --data DIR [--loads conversation code]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper_runs import (
    Clients,
    Judge,
    Lab,
    figures,
    lowest,
    parser_of,
    patient,
    plain,
    promised,
    simulate,
)
from paper_tables import Cell, bars_svg, table, write

from pdserve.cost.roofline import machine_of
from pdserve.node.settings import RoleControl
from pdserve.sim.settings import SimSettings
from pdserve.sim.spec import parse_cluster
from pdserve.workload import shaping
from pdserve.workload.request import TraceRequest
from pdserve.workload.traces import iter_trace

LOADS = {"conversation": "azure_2023_conv.csv", "code": "azure_2023_code.csv"}
MODEL, HARDWARE = "llama-3.1-70b", "h100-tp4"
FLEETS = ("aggregated", "split", "predicted")
SHARES = (0.5, 0.6, 0.4, 0.7, 0.3, 0.8, 0.2, 0.9)
"""Of the workers, those that prefill: tried in this order after the last one that did."""
PAPER = {"instances": -0.24, "mean": -0.48, "p99": -0.78}
KEPT = 0.99


@dataclass(frozen=True, slots=True)
class Found:
    """The least workers of a fleet, None if none would do, and the share of them that prefill."""

    workers: int | None
    share: float


class Study:
    """``speed``: of the trace; ``window_s``: of its own time."""

    def __init__(
        self,
        lab: Lab,
        data: Path,
        *,
        speed: float,
        window_s: tuple[float, float],
        ttft_s: float,
        tpot_s: float,
        most: int,
        hardware: str = HARDWARE,
        seed: int = 0,
    ) -> None:
        self.lab, self.data = lab, data
        self.speed, self.window_s = speed, window_s
        self.ttft_s, self.tpot_s, self.most = ttft_s, tpot_s, most
        self.hardware, self.seed = hardware, seed

    def load(self, name: str) -> list[TraceRequest]:
        window = shaping.window(iter_trace(self.data / LOADS[name]), *self.window_s)
        return list(shaping.scale(window, self.speed))

    def settings(self, fleet: str, workers: int, share: float) -> SimSettings:
        if fleet == "aggregated":
            cluster = f"{workers}x{self.hardware}:mixed"
        else:
            prefill = min(workers - 1, max(1, round(workers * share)))
            cluster = (
                f"{prefill}x{self.hardware}:prefill,{workers - prefill}x{self.hardware}:decode"
            )
        spec = parse_cluster(cluster)
        policies = {"aggregated": "aggregated", "split": "shortest_queue", "predicted": "predicted"}
        settings = SimSettings(
            cluster=spec,
            machines=tuple(machine_of(group.hardware, MODEL) for group in spec.groups),
            policy=policies[fleet],
            roles=RoleControl.AUTO if fleet == "predicted" else RoleControl.FIXED,
            declared_tokens=2048,
            seed=self.seed,
        )
        return promised(patient(settings), self.ttft_s, self.tpot_s)

    def asked(self, settings: SimSettings, load: str) -> dict[str, Any]:
        return plain(settings) | {
            "load": load, "speed": self.speed, "window_s": list(self.window_s),
            "roles": str(settings.roles),
        }  # fmt: skip

    def keeps(self, load: str, fleet: str, workers: int, share: float) -> bool:
        """Whether 99 % of the requests see the promise kept."""
        if fleet != "aggregated" and workers < 2:
            return False
        settings = self.settings(fleet, workers, share)

        def work() -> dict[str, Any]:
            requests = self.load(load)
            allowed = math.floor(len(requests) * (1 - KEPT) + 1e-9)
            judge = Judge(self.ttft_s, self.tpot_s, allowed)
            return {"kept": simulate(settings, iter(requests), [judge]), "missed": judge.num_missed}

        asked = self.asked(settings, load) | {"kept": KEPT}
        return bool(self.lab.result(asked, work)["kept"])

    def latencies(self, load: str, fleet: str, workers: int, share: float) -> dict[str, Any]:
        settings = self.settings(fleet, workers, share)

        def work() -> dict[str, Any]:
            clients = Clients()
            simulate(settings, iter(self.load(load)), [clients])
            met = sum(each.meets(self.ttft_s, self.tpot_s) for each in clients.seen)
            return figures(clients.seen) | {"attainment": met / max(1, len(clients.seen))}

        return self.lab.result(self.asked(settings, load), work)

    def least(self, load: str, fleet: str, guess: int, share: float) -> Found:
        """The least workers that keep the promise; of a split fleet with any division."""
        if fleet != "split":
            return Found(
                lowest(lambda n: self.keeps(load, fleet, n, share), guess, self.most), share
            )
        kept = {"share": share}

        def passes(workers: int) -> bool:
            for each in dict.fromkeys((kept["share"], *SHARES)):
                if self.keeps(load, fleet, workers, each):
                    kept["share"] = each
                    return True
            return False

        return Found(lowest(passes, guess, self.most), kept["share"])


def fleets(study: Study, load: str, guess: int) -> dict[str, Found]:
    found: dict[str, Found] = {}
    share = SHARES[0]
    for fleet in FLEETS:
        found[fleet] = study.least(load, fleet, guess, share)
        workers, share = found[fleet].workers or guess, found[fleet].share
        guess = min(guess, workers) if fleet == "aggregated" else workers
    return found


def change(ours: float | None, base: float | None) -> str | None:
    return f"{100 * (ours / base - 1):+.0f} %" if ours and base else None


def report(
    study: Study,
    found: dict[str, dict[str, Found]],
    equal: dict[str, dict[str, dict[str, Any]]],
    said: str,
) -> str:
    rows: list[list[Cell]] = []
    for load, by_fleet in found.items():
        base = by_fleet["aggregated"].workers
        for fleet, each in by_fleet.items():
            cluster = (
                str(study.settings(fleet, each.workers, each.share).cluster)
                if each.workers
                else None
            )
            rows.append([load, fleet, each.workers, change(each.workers, base), cluster])
    rows.append(["(RTP-LLM's service)", "split", None, f"{100 * PAPER['instances']:+.0f} %", None])
    bounds = f"TTFT {study.ttft_s:g} s and TPOT {study.tpot_s * 1e3:g} ms for {KEPT:.0%}"
    head = ["load", "fleet", "workers", "against aggregated", "cluster"]
    parts = [f"{said}\n", f"### Workers that keep {bounds}\n\n{table(head, rows)}"]
    rows = []
    for load, by_name in equal.items():
        base_of = by_name["aggregated"]
        for fleet, figure in by_name.items():
            row: list[Cell] = [load, fleet]
            for name, part in itertools.product(("ttft_s", "e2e_s"), ("mean", "p99")):
                row += [figure[name][part], change(figure[name][part], base_of[name][part])]
            rows.append([*row, f"{100 * figure['attainment']:.1f} %"])
    rows.append(
        ["(RTP-LLM's service, latency not named)", "split", None, f"{100 * PAPER['mean']:+.0f} %",
         None, f"{100 * PAPER['p99']:+.0f} %", None, None, None, None, None]
    )  # fmt: skip
    head = ["load", "fleet", "mean TTFT, s", "", "P99 TTFT, s", "", "mean E2E, s", "", "P99 E2E, s",
            "", "promise kept"]  # fmt: skip
    parts.append(f"### With as many workers as the aggregated fleet needs\n\n{table(head, rows)}")
    return "\n".join(parts)


def answer(study: Study, loads: Sequence[str], guess: int) -> list[Path]:
    """Asks everything, and writes it down."""
    found = {load: fleets(study, load, guess) for load in loads}
    equal = {
        load: {
            fleet: study.latencies(load, fleet, max(2, workers), each.share)
            for fleet, each in by_fleet.items()
        }
        for load, by_fleet in found.items()
        if (workers := by_fleet["aggregated"].workers)
    }
    said = (
        f"{MODEL} on {study.hardware}, seconds {study.window_s[0]:g} to {study.window_s[1]:g} of "
        f"the traces {study.speed:g} times as fast, seed {study.seed}; made by revision "
        f"{', '.join(sorted(study.lab.revisions))}."
    )
    markdown = report(study, found, equal, said)
    bars = {load: {f: each.workers for f, each in by.items()} for load, by in found.items()}
    pictures = {"fleet-workers": bars_svg("workers at an equal SLO", bars)}
    document = {
        "workers": {
            load: {f: {"workers": e.workers, "prefill_share": e.share} for f, e in by.items()}
            for load, by in found.items()
        },
        "latencies": equal,
        "revisions": sorted(study.lab.revisions),
    }
    print(markdown)
    return write(study.lab.folder, "fleet", markdown, document, pictures)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("fleet", __doc__)
    parser.add_argument("--loads", nargs="+", choices=tuple(LOADS), default=list(LOADS))
    parser.add_argument("--speed", type=float, default=10.0, metavar="X")
    parser.add_argument("--window", type=float, nargs=2, default=(600.0, 1500.0), metavar="S")
    parser.add_argument("--ttft", type=float, default=2.0, metavar="S", help="promise (default: 2)")
    parser.add_argument("--tpot", type=float, default=0.05, metavar="S", help="(default: 0.05)")
    parser.add_argument("--most", type=int, default=64, metavar="N", help="workers (default: 64)")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.loads, chosen.window, chosen.speed = ["conversation"], (600.0, 660.0), 4.0
    study = Study(
        Lab(chosen.out, fresh=chosen.fresh),
        chosen.data,
        speed=chosen.speed,
        window_s=tuple(chosen.window),
        ttft_s=chosen.ttft,
        tpot_s=chosen.tpot,
        most=chosen.most,
        seed=chosen.seed,
    )
    for path in answer(study, chosen.loads, 4 if chosen.quick else 12):
        print(path)


if __name__ == "__main__":
    main()
