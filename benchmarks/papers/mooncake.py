"""Mooncake: what routing by caches does to TTFT (FAST 2025, Fig. 5), and what early rejection saves
under overload (technical report, Table 3).

Routing: the conversation trace on 8 prefill and 8 decode nodes of 8 A800 (A100s whose NVLink is
slower), a dummy Llama-3-70B, 4 x 200 Gbit/s a node, 3 M tokens of KV a node in its DRAM. The paper
names 16 nodes, not how they are divided; the technical report has 8 and 8. DRAM is simulated as the
node's own pool: a cached prefix costs nothing to read.

Rejection: the same cluster, the trace at a multiple of its speed, a promise of TTFT 30 s and TPOT
100 ms (the technical report's bounds for its replay). Its trace of 23,608 requests is not in our
hands; the conversation trace has 12,031, longer ones. And with a single decode node for 8 to 16
that prefill: what prediction adds to early rejection is a matter of decode load, and of how long
prompts take until they become some. Seeds smear the trace's ticks; that is asked with several.

    python benchmarks/papers/mooncake.py --data DIR
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from paper_runs import Clients, Lab, figures, parser_of, patient, plain, promised, simulate
from paper_tables import Cell, apart, bars_svg, table, write

from pdserve.core.events import LifeEvent, LifeName
from pdserve.core.ids import RequestId
from pdserve.cost.machine import LinkSpec, MachineModel
from pdserve.cost.roofline import machine_of
from pdserve.policy import admission as admission_policies
from pdserve.sim.observe import Ended, Observer
from pdserve.sim.settings import SimSettings
from pdserve.sim.spec import ClusterSpec, parse_cluster
from pdserve.workload import shaping
from pdserve.workload.request import TraceRequest
from pdserve.workload.reuse import prefix_reuse
from pdserve.workload.traces import iter_trace

TRACE = "mooncake_conversation.jsonl"
CLUSTER = "8xa100-tp8:prefill,8xa100-tp8:decode"
SCARCE = tuple(f"{prefill}xa100-tp8:prefill,1xa100-tp8:decode" for prefill in (8, 10, 12, 16))
"""Where decoding is scarce: from a limit beside prefilling to the only one."""
MODEL = "llama-3.1-70b"
"""Llama-3-70B's shape, which is Llama-2-70B's as well, without its limit of 8,192 tokens: 57 % of
the trace's prompts would not fit, and the authors' model was a dummy of that shape."""
DRAM_TOKENS = 3_000_000
NODE_LINK = LinkSpec(bytes_per_s=87e9, fixed_s=8e-3)
"""Of 4 x 200 Gbit/s: FAST 2025, sec. 5.4.1."""
BLOCK_TOKENS = 512
ROUTING: dict[str, tuple[str, float]] = {
    "random": ("random", 19.65),
    "load balancing": ("shortest_queue", 5.27),
    "local cache-aware": ("prefix_aware", 3.58),
    "global cache-aware": ("predicted", 3.07),
}
"""The paper's name of it: our policy, and the paper's mean TTFT in seconds."""
WITHOUT_FETCH = "predicted:fetch_ratio=1e9"
TTFT_S, TPOT_S = 30.0, 0.1
REJECTION: dict[str, tuple[str, int]] = {
    "no rejection": ("none", 4183),
    "early rejection": ("early", 3771),
    "predicted": ("predicted", 3589),
}
"""Admission, and how many the paper's cluster rejected of 23,608. Its baseline rejects at each
stage; ours rejects nobody, and what is counted is who was not served within the promise."""
PAPER_REQUESTS = 23_608
WITHOUT_MARGIN = 1.0
"""The share of the promised TPOT up to which the paper lets in. The server gives a part of it away
(`admission.TPOT_MARGIN`), whatever the policy."""
WARM_UP_S = 60.0
"""Of a run under overload, before it is looked at how many decode."""


class Decoding(Observer):
    """How many sequences decode, over the time from `WARM_UP_S` to the last arrival."""

    def __init__(self) -> None:
        self._there: set[RequestId] = set()
        self._since_s = WARM_UP_S
        self._sums = self._by_last = (0.0, 0.0, 0.0)

    def arrived(self, at_s: float, request_id: RequestId, prompt_tokens: int) -> None:
        self._go_on(at_s)
        self._by_last = self._sums

    def life(self, event: LifeEvent) -> None:
        if event.name is LifeName.DECODE_STARTED:
            self._go_on(event.at_s)
            self._there.add(event.request_id)

    def ended(self, at_s: float, request: Ended) -> None:
        self._go_on(at_s)
        self._there.discard(request.request_id)

    def figures(self) -> dict[str, float]:
        """Mean and standard deviation over time."""
        time_s, first, second = self._by_last
        mean = first / time_s if time_s else 0.0
        deviation = math.sqrt(max(0.0, second / time_s - mean * mean)) if time_s else 0.0
        return {"mean": mean, "deviation": deviation}

    def _go_on(self, at_s: float) -> None:
        past_s, number = at_s - self._since_s, len(self._there)
        if past_s > 0.0:
            time_s, first, second = self._sums
            self._sums = time_s + past_s, first + past_s * number, second + past_s * number**2
            self._since_s = at_s


class Study:
    """``num_requests`` of the trace, ``num_overload`` of it under overload; None: all. ``scarce``:
    the clusters of the second question about rejection. ``num_seeds``: of runs under overload."""

    def __init__(
        self,
        lab: Lab,
        trace: Path,
        *,
        cluster: str = CLUSTER,
        scarce: Sequence[str] = SCARCE,
        num_requests: int | None = None,
        num_overload: int | None = None,
        seed: int = 0,
        num_seeds: int = 1,
    ) -> None:
        self.lab = lab
        self.trace, self.seed = trace, seed
        self.seeds = range(seed, seed + num_seeds)
        self.num_requests, self.num_overload = num_requests, num_overload
        self.cluster: ClusterSpec = parse_cluster(cluster)
        self.scarce = tuple(map(parse_cluster, scarce))

    def load(
        self, speed: float = 1.0, most: int | None = None, seed: int | None = None
    ) -> Iterator[TraceRequest]:
        smeared = shaping.smear(iter_trace(self.trace), self.seed if seed is None else seed)
        return itertools.islice(shaping.scale(smeared, speed), most)

    def machine(self, hardware: str) -> MachineModel:
        machine = machine_of(hardware, MODEL, block_size=BLOCK_TOKENS)
        return replace(machine, num_blocks=DRAM_TOKENS // BLOCK_TOKENS, link=NODE_LINK)

    def settings(
        self, policy: str, admission: str = "none", cluster: ClusterSpec | None = None
    ) -> SimSettings:
        cluster = cluster or self.cluster
        return patient(
            SimSettings(
                cluster=cluster,
                machines=tuple(self.machine(group.hardware) for group in cluster.groups),
                policy=policy,
                admission=admission,
                seed=self.seed,
            )
        )

    def run(
        self, settings: SimSettings, speed: float, most: int | None, margin: float | None = None
    ) -> dict[str, Any]:
        """``margin``: share of the promised TPOT up to which requests are let in; None: the
        server's."""
        asked = plain(settings) | {
            "trace": self.trace.name, "num_requests": most, "speed": speed,
        }  # fmt: skip
        if margin is not None:
            asked["tpot_margin"] = margin

        def work() -> dict[str, Any]:
            clients, decoding = Clients(), Decoding()
            with _margin(margin):
                simulate(settings, self.load(speed, most, settings.seed), [clients, decoding])
            kept = [each for each in clients.seen if each.meets(TTFT_S, TPOT_S)]
            return figures(clients.seen) | {
                "kept": len(kept),
                "kept_prompt_tokens": sum(each.prompt_tokens for each in kept),
                "decoding": decoding.figures(),
            }

        return self.lab.result(asked, work)


@contextmanager
def _margin(share: float | None) -> Iterator[None]:
    """Admission lets in up to that share of the promised TPOT meanwhile."""
    usual = admission_policies.TPOT_MARGIN
    admission_policies.TPOT_MARGIN = usual if share is None else share
    try:
        yield
    finally:
        admission_policies.TPOT_MARGIN = usual


def routing(study: Study) -> dict[str, dict[str, Any]]:
    """Figures of each policy, by the paper's name of it."""
    found = {
        name: study.run(study.settings(policy), 1.0, study.num_requests)
        | {"policy": policy, "paper": paper}
        for name, (policy, paper) in ROUTING.items()
    }
    alone = study.run(study.settings(WITHOUT_FETCH), 1.0, study.num_requests)
    found["global, no fetches"] = alone | {"policy": WITHOUT_FETCH, "paper": None}
    return found


Rejected = dict[tuple[str, float], dict[str, list[dict[str, Any]]]]
"""Figures of each seed by (cluster, speed), then by kind of rejection."""


def rejection(study: Study, speeds: Sequence[float], margin: float | None = None) -> Rejected:
    """With a ``margin`` of its own: only where decoding is scarce, and of those who reject."""
    found: Rejected = {}
    clusters = (study.cluster, *study.scarce) if margin is None else study.scarce
    for cluster, speed in itertools.product(clusters, speeds):
        found[str(cluster), speed] = {
            name: [
                study.run(
                    replace(
                        promised(study.settings("predicted", admission, cluster), TTFT_S, TPOT_S),
                        seed=seed,
                    ),
                    speed,
                    study.num_overload,
                    margin,
                )
                for seed in (study.seeds if _swings(study, admission, cluster) else study.seeds[:1])
            ]
            for name, (admission, _) in REJECTION.items()
            if margin is None or admission != "none"
        }
    return found


def _swings(study: Study, admission: str, cluster: ClusterSpec) -> bool:
    """Whether the outcome hangs on who happens to be let in: early and predicted rejection, where
    decoding is scarce. The rest is asked once."""
    return admission != "none" and cluster != study.cluster


def report(
    study: Study,
    routed: dict[str, dict[str, Any]],
    rejected: Rejected,
    bare: Rejected,
    said: str,
) -> str:
    rows: list[list[Cell]] = []
    base = routed["random"]["ttft_s"]["mean"]
    for name, found in routed.items():
        ours, paper = found["ttft_s"]["mean"], found["paper"]
        relative = paper / ROUTING["random"][1] if paper else None
        rows.append(
            [
                name, f"`{found['policy']}`", paper, ours, apart(ours, paper), relative,
                ours / base, found["ttft_s"]["p50"], found["ttft_s"]["p99"],
                f"{100 * found['cached_share']:.1f} %",
            ]
        )  # fmt: skip
    head = [
        "routing", "policy", "paper, s", "ours, s", "apart", "paper / random", "ours / random",
        "P50, s", "P99, s", "prompt tokens cached",
    ]  # fmt: skip
    ceiling = prefix_reuse(study.load(most=study.num_requests), math.inf).token_share
    parts = [
        f"{said}\n",
        f"### Mean TTFT by routing\n\n{table(head, rows)}",
        f"An endless cache would have {100 * ceiling:.1f} % of the prompt tokens.\n",
    ]
    for speed in dict.fromkeys(speed for _, speed in rejected):
        own = {str(study.cluster): rejected[str(study.cluster), speed]}
        parts.append(_overload(f"Overload, the trace {speed:g} times as fast", own, paper=True))
        scarce = {str(cluster): rejected[str(cluster), speed] for cluster in study.scarce}
        parts.append(_overload(f"The same with few that decode, {speed:g} x", scarce, paper=False))
        scarce = {str(cluster): bare[str(cluster), speed] for cluster in study.scarce}
        title = f"And let in up to the bound itself, {speed:g} x"
        parts.append(_overload(title, scarce, paper=False))
    return "\n".join(parts)


def _overload(
    title: str, kinds_of: dict[str, dict[str, list[dict[str, Any]]]], *, paper: bool
) -> str:
    """A row for each kind of rejection of each cluster; means over the seeds."""
    rows: list[list[Cell]] = []
    for cluster, kinds in kinds_of.items():
        for name, runs in kinds.items():
            row: list[Cell] = [cluster, name]
            if paper:
                row.append(f"{100 * REJECTION[name][1] / PAPER_REQUESTS:.1f} %")
            missed = [found["num"] - found["kept"] for found in runs]
            refused = _mean(runs, "refused")
            decoding = [found["decoding"] for found in runs]
            rows.append(
                [
                    *row, f"{100 * sum(missed) / sum(found['num'] for found in runs):.1f} %",
                    ", ".join(map(str, missed)), round(refused),
                    round(sum(missed) / len(missed) - refused),
                    1e3 * sum(found["tpot_s"]["p99"] for found in runs) / len(runs),
                    _mean(runs, "kept_prompt_tokens") / 1e6,
                    f"{_mean(decoding, 'mean'):.0f} ± {_mean(decoding, 'deviation'):.0f}",
                ]
            )  # fmt: skip
    head = [
        "cluster", "", *(["paper: rejected"] if paper else []), "not served as promised",
        "requests, by seed", "refused", "late", "P99 of TPOT, ms",
        "prompt tokens served as promised, M", "sequences decoding, ± deviation",
    ]  # fmt: skip
    return f"### {title}\n\n{table(head, rows)}"


def _mean(runs: Sequence[dict[str, Any]], name: str) -> float:
    return math.fsum(found[name] for found in runs) / len(runs)


def answer(study: Study, speeds: Sequence[float]) -> list[Path]:
    """Asks everything, and writes it down."""
    routed, rejected = routing(study), rejection(study, speeds)
    bare = rejection(study, speeds, WITHOUT_MARGIN)
    said = (
        f"{study.cluster}, {MODEL}, {study.num_requests or 'all'} requests of {study.trace.name} "
        f"(under overload {study.num_overload or 'all'}), seed {study.seed} (there "
        f"{', '.join(map(str, study.seeds))}); made by "
        f"revision {', '.join(sorted(study.lab.revisions))}."
    )
    markdown = report(study, routed, rejected, bare, said)
    bars = {
        name: {"paper": found["paper"], "ours": found["ttft_s"]["mean"]}
        for name, found in routed.items()
    }
    pictures = {"mooncake-routing": bars_svg("mean TTFT by routing", bars, "s")}
    for (cluster, speed), kinds in rejected.items():
        if cluster != str(study.cluster):
            continue
        shares = {
            name: {
                "paper": 100 * REJECTION[name][1] / PAPER_REQUESTS,
                "ours": 100 * (1 - _mean(runs, "kept") / _mean(runs, "num")),
            }
            for name, runs in kinds.items()
        }
        title = f"not served as promised, {speed:g} x"
        pictures[f"mooncake-rejection-{speed:g}x"] = bars_svg(title, shares, "%")
    document = {
        "routing": routed,
        "rejection": {f"{c} x {speed:g}": kinds for (c, speed), kinds in rejected.items()},
        "without_margin": {f"{c} x {speed:g}": kinds for (c, speed), kinds in bare.items()},
        "revisions": sorted(study.lab.revisions),
    }
    print(markdown)
    return write(study.lab.folder, "mooncake", markdown, document, pictures)


def main(arguments: Sequence[str] | None = None) -> None:
    parser: argparse.ArgumentParser = parser_of("mooncake", __doc__)
    parser.add_argument("-n", "--num-requests", type=int, help="of the trace (default: all)")
    parser.add_argument("--num-overload", type=int, help="of them under overload (default: all)")
    parser.add_argument("--seeds", type=int, help="of each run under overload (default: 3)")
    parser.add_argument("--speeds", type=float, nargs="*", default=[2.0, 3.0], metavar="X",
                        help="of the overload (default: 2 3)")  # fmt: skip
    chosen = parser.parse_args(arguments)
    few = 300 if chosen.quick else None
    study = Study(
        Lab(chosen.out, fresh=chosen.fresh),
        chosen.data / TRACE,
        num_requests=chosen.num_requests or few,
        num_overload=chosen.num_overload or few,
        seed=chosen.seed,
        num_seeds=chosen.seeds or (1 if chosen.quick else 3),
    )
    for path in answer(study, chosen.speeds[:1] if chosen.quick else chosen.speeds):
        print(path)


if __name__ == "__main__":
    main()
