"""The flags of ``pdserve plan``, and the options that they make."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.core.errors import ConfigError
from pdserve.policy.registry import make_policy
from pdserve.sim.arguments import add_decisions, add_machines
from pdserve.sim.machines import SPLITWISESIM
from pdserve.sim.plan.most import DEFAULT_PRECISION
from pdserve.sim.plan.promise import DEFAULT_TARGET
from pdserve.sim.plan.race import Goal, Measure
from pdserve.sim.plan.sureness import ASSUMED_ERROR
from pdserve.sim.plan.windows import DEFAULT_WINDOW_S, DEFAULT_WINDOWS
from pdserve.toml_flags import add_all, with_file
from pdserve.workload.arguments import add_contents, check_numbers
from pdserve.workload.slo import Slo, parse_slo

TABLE = "plan"
NINE = "splitwise"
"""The SLO of this name: the nine slowdowns of Splitwise's evaluation."""
NINE_REFERENCE = "a100"
SPLIT_POLICIES = ("predicted", "splitwise")
MIXED_POLICIES = ("aggregated",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags. What is parsed has only those that were typed: `PlanOptions.of` adds the rest."""
    add_all(parser, add_flags, TABLE)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those that can stand in the file as well."""
    _add_goal(parser.add_argument_group("what is sought"))
    _add_clusters(parser.add_argument_group("from which clusters"))
    contents = parser.add_argument_group("for which traffic")
    add_contents(contents)
    _add_times(contents)
    add_decisions(parser.add_argument_group("how they decide"))
    _add_live(parser.add_argument_group("for a running server"))
    _add_effort(parser.add_argument_group("how hard it is looked for"))
    _add_output(parser.add_argument_group("what is shown"))


def _add_goal(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--slo",
        nargs="+",
        metavar="SLO",
        help="bounds in ms, as ttft:2000 tpot:100; or splitwise: its nine slowdowns against an "
        "idle a100 (splitwise:h100: against that)",
    )
    add(
        "--target",
        type=float,
        default=DEFAULT_TARGET,
        metavar="SHARE",
        help="of the requests, those that must meet all bounds (default: 0.99)",
    )
    add("--rate", type=float, metavar="R", help="requests per second (default: the trace's own)")
    add("--budget-cost", type=float, metavar="C", help="the most for this price per hour")
    add("--budget-power", type=float, metavar="W", help="the most for these watts")
    add(
        "--measure",
        choices=tuple(Measure),
        default=Measure.COST,
        help="for a rate, what is to be least (default: cost; the other is told as well)",
    )


def _add_clusters(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--hardware", metavar="A,B,...", help="to choose from, as h100,a100-tp4,h100@ib-200")
    add_machines(group)
    add("--policies", metavar="P,...", help="of split clusters (default: predicted,splitwise)")
    add("--mixed-policies", metavar="P,...", help="of aggregated ones (default: aggregated)")
    add("--price", metavar="H=P,...", help="per worker and hour (default: the catalogue's)")
    add("--max-workers", type=int, default=512, metavar="N", help="of a cluster (default: 512)")


def _add_times(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--window", metavar="START:END", help="only this part of the trace, in seconds")
    add(
        "--smear",
        action=argparse.BooleanOptionalAction,
        help="spread requests with one time stamp (default: if most of the trace has shared ones)",
    )
    add(
        "--arrivals",
        choices=("trace", "poisson"),
        default="trace",
        help="the trace's own times, scaled to the rate, or a Poisson process (default: trace)",
    )


def _add_live(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--live", metavar="URL", help="plan for what this server has served, on its own workers")
    add("--api-key", default=os.environ.get("PDSERVE_API_KEY"))


def _add_effort(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--windows",
        type=int,
        default=DEFAULT_WINDOWS,
        metavar="N",
        help=f"into which the trace is cut (default: {DEFAULT_WINDOWS})",
    )
    add(
        "--window-s",
        type=float,
        default=DEFAULT_WINDOW_S,
        metavar="S",
        help="seconds of each; a trace that is too short for that is repeated (default: 45)",
    )
    add(
        "--precision",
        type=float,
        default=DEFAULT_PRECISION,
        metavar="P",
        help="of rates (default: 0.02)",
    )
    add(
        "--error",
        type=float,
        metavar="E",
        help="mean relative error of step times (default: the cost model's own; "
        f"{ASSUMED_ERROR:g} where it does not know)",
    )
    add("--resume", type=Path, metavar="FILE", help="keep evaluations there, and use those in it")
    for name, text in (
        ("sureness", "ask how sure the answer is (default)"),
        ("changes", "ask what would change the answer (default)"),
    ):
        add(f"--{name}", action=argparse.BooleanOptionalAction, default=True, help=text)


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--json", metavar="OUT", help="write one JSON document; -: on stdout and nothing else")
    add("--plot", type=Path, metavar="DIR", help="write pictures there, as SVG")
    add("--no-progress", action="store_true", help="no progress bar")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """All that was asked for. ``slo`` None: the nine slowdowns, against ``reference``. ``parsed``:
    the flags that need no more than reading."""

    slo: Slo | None
    reference: str
    goal: Goal | None
    hardware: tuple[str, ...]
    split_policies: tuple[str, ...]
    mixed_policies: tuple[str, ...]
    prices: Mapping[str, float]
    parsed: argparse.Namespace

    @classmethod
    def of(cls, typed: argparse.Namespace) -> PlanOptions:
        """Raises `ConfigError` for what cannot be."""
        parsed = with_file(typed, add_flags, TABLE, getattr(typed, "config", None))
        _check(parsed)
        slo, reference = _promise(parsed.slo)
        hardware = _listed(parsed.hardware)
        if not hardware and not parsed.live:
            raise ConfigError("say what there is to choose from, as --hardware a100,h100")
        usual = (SPLITWISESIM,) if parsed.profile == SPLITWISESIM else None
        own = (parsed.policy,) if hasattr(typed, "policy") else None
        return cls(
            slo=slo,
            reference=reference,
            goal=_goal(parsed),
            hardware=hardware,
            split_policies=_policies(parsed.policies, own or usual or SPLIT_POLICIES),
            mixed_policies=_policies(parsed.mixed_policies, usual or MIXED_POLICIES),
            prices=_prices(parsed.price),
            parsed=parsed,
        )


def _check(parsed: argparse.Namespace) -> None:
    check_numbers(
        parsed,
        above_0=("max_workers", "windows", "window_s", "precision", "block_size",
                 "max_step_tokens", "mixed_chunk_tokens", "max_running", "max_queued_requests",
                 "num_requests", "max_input", "max_output"),
        from_0=("one_shot_tokens", "queue_timeout", "error"),
    )  # fmt: skip
    if parsed.precision > 1:
        raise ConfigError(f"--precision is {parsed.precision:g}: it is a share, as 0.02")
    if parsed.classes or parsed.class_shares:
        raise ConfigError("a plan is for one SLO that all requests share: leave out --classes")
    if parsed.cancel_rate or parsed.draw:
        raise ConfigError("a plan takes the trace's own requests: leave out --cancel-rate, --draw")
    if parsed.live and parsed.trace:
        raise ConfigError("--live plans for what the server has served: leave out --trace")


def _promise(texts: Sequence[str] | None) -> tuple[Slo | None, str]:
    if not texts:
        raise ConfigError("say what is promised, as --slo ttft:2000 tpot:100, or --slo splitwise")
    name, _, reference = texts[0].partition(":")
    if name == NINE and len(texts) == 1:
        return None, reference or NINE_REFERENCE
    slo = parse_slo([part for text in texts for part in text.split(",") if part], "--slo")
    if not {"ttft", "e2e"} & {metric for metric, _ in slo.bounds_ms}:
        raise ConfigError(
            "an SLO without a bound on ttft or e2e lets every queue grow: add one, as ttft:5000"
        )
    return slo, ""


def _goal(parsed: argparse.Namespace) -> Goal | None:
    """None: a rate that the traffic says."""
    given = [
        name
        for name in ("rate", "budget_cost", "budget_power")
        if getattr(parsed, name) is not None
    ]
    if len(given) > 1:
        raise ConfigError("give one of --rate, --budget-cost and --budget-power")
    if not given:
        return None
    value = getattr(parsed, given[0])
    if not 0 < value < math.inf:
        raise ConfigError(f"--{given[0].replace('_', '-')} is {value:g}: give a number above 0")
    if given[0] == "rate":
        return Goal(Measure(parsed.measure), rate=value)
    measure = Measure.COST if given[0] == "budget_cost" else Measure.POWER
    return Goal(measure, budget=value)


def _policies(written: str | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    names = _listed(written) or usual
    for name in names:
        if name != SPLITWISESIM or SPLITWISESIM not in usual:
            make_policy(name)
    return names


def _prices(written: str | None) -> dict[str, float]:
    prices = {}
    for part in _listed(written):
        name, _, number = part.partition("=")
        try:
            price = float(number)
        except ValueError:
            price = 0.0
        if not name or not 0 < price < math.inf:
            raise ConfigError(f"--price {part!r}: write HARDWARE=PRICE, as h100=38")
        prices[name] = price
    return prices


def _listed(written: str | None) -> tuple[str, ...]:
    parts = (part.strip() for part in (written or "").split(","))
    return tuple(dict.fromkeys(part for part in parts if part))
