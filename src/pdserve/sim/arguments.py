"""The flags of ``pdserve sim``, and the options that they make."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from pdserve.core.errors import ConfigError
from pdserve.core.request import ServiceClass
from pdserve.node.settings import RoleControl
from pdserve.policy.admission import ADMISSION_POLICIES
from pdserve.policy.registry import (
    BATCH_POLICIES,
    DEFAULT_POLICY,
    ROUTE_POLICIES,
    make_batching,
    make_policy,
)
from pdserve.service_classes import ONE_CLASS, ServiceClasses, parse_classes
from pdserve.sim.catalogue import read_catalogue
from pdserve.sim.machines import MachineOptions
from pdserve.sim.settings import SimSettings
from pdserve.sim.spec import ClusterSpec, parse_cluster
from pdserve.toml_flags import add_all, with_file
from pdserve.workload.arguments import add_contents, add_times, check_numbers, workload_options
from pdserve.workload.options import WorkloadOptions
from pdserve.workload.scenario import Scenario, read_scenario
from pdserve.workload.slo import Slo, parse_slo

TABLE = "sim"
EXACT = "exact"
_DEFAULTS = {name: field.default for name, field in SimSettings.__dataclass_fields__.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags. What is parsed has only those that were typed: `SimOptions.of` adds the rest."""
    add_all(parser, add_flags, TABLE)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those that can stand in the file as well."""
    add_cluster(parser.add_argument_group("the cluster"))
    add_decisions(parser.add_argument_group("how it decides"))
    add_contents(parser.add_argument_group("what is sent"))
    add_times(parser.add_argument_group("when it is sent"))
    _add_faults(parser.add_argument_group("what goes wrong"))
    _add_output(parser.add_argument_group("what is shown"))


def add_cluster(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--cluster",
        metavar="SPEC",
        help="COUNTxHARDWARE:ROLE[@LINK] and commas between, as 25xh100:prefill,15xh100:decode",
    )
    add_machines(group)


def add_machines(group: argparse._ArgumentGroup) -> None:
    """What the workers are made of."""
    add = group.add_argument
    add("--model", metavar="NAME", help="a name of the catalogue's, or a model's folder")
    add("--catalogue", type=Path, metavar="FILE", help="TOML with hardware, models, links of yours")
    add("--link", metavar="NAME", help="of workers that name none (default: of their hardware)")
    add(
        "--profile",
        metavar="FILE",
        help="step times as pdserve calibrate measured them; or table, or splitwisesim, with ...",
    )
    add("--perf-table", type=Path, metavar="FILE", help="... Splitwise's table of measurements")
    add(
        "--block-size",
        type=int,
        metavar="N",
        help="tokens per KV block (default: 16; 512 for traces with block hashes)",
    )


def add_decisions(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--policy",
        default=DEFAULT_POLICY,
        metavar="P",
        help=f"how requests are routed: {', '.join(ROUTE_POLICIES)} (default: {DEFAULT_POLICY})",
    )
    add(
        "--batching",
        metavar="B",
        help=f"how workers batch: {', '.join(BATCH_POLICIES)} (default: what goes with --policy)",
    )
    add(
        "--roles",
        choices=tuple(RoleControl),
        default=RoleControl.FIXED,
        help="who moves workers between the pools (default: fixed)",
    )
    add(
        "--admission",
        choices=("auto", *ADMISSION_POLICIES),
        default="auto",
        help="who is refused early (default: auto, predicted if classes have bounds)",
    )
    add(
        "--classes",
        metavar="CLASSES",
        help="classes of service: NAME:ttft=MS,tpot=MS,weight=N; ...",
    )
    add("--class-shares", metavar="NAME=SHARE,...", help="how the requests divide over the classes")
    _add_limits(group)
    add(
        "--prefix-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep KV of prompts for later ones (default)",
    )
    add(
        "--learn",
        action="store_true",
        help="the router learns step and link times, as live; default: it is told them",
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    for name, text in (
        ("max_step_tokens", "most tokens in one step"),
        ("mixed_chunk_tokens", "most prompt tokens in a step that also decodes"),
        ("max_running", "most sequences in a step"),
        ("one_shot_tokens", "KV of a shorter prompt moves at once, not layer by layer"),
        ("max_queued_requests", "most that wait in the router"),
    ):
        flag, default = "--" + name.replace("_", "-"), _DEFAULTS[name]
        add(flag, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    add(
        "--queue-timeout",
        type=float,
        default=_DEFAULTS["queue_timeout_s"],
        metavar="S",
        help="seconds a request may wait before it is refused (default: 30)",
    )
    add(
        "--declared-tokens",
        default=str(_DEFAULTS["declared_tokens"]),
        metavar="N",
        help=f"max_tokens of each request, or {EXACT}: as many as it gets (default: 4096)",
    )


def _add_faults(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--scenario",
        type=Path,
        metavar="FILE",
        help="kills, hangs and link faults to have happen (docs/failures.md)",
    )
    add(
        "--load-time",
        type=float,
        default=_DEFAULTS["load_s"],
        metavar="S",
        help="from the start of a new process until it can serve (default: %(default)s)",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--slo",
        "--goodput",
        nargs="+",
        metavar="SLO",
        help="objectives in ms, as ttft:2000 tpot:100 e2e:20000; or ttft:2s",
    )
    add("--json", metavar="OUT", help="write one JSON document; -: on stdout and nothing else")
    add("--plot", type=Path, metavar="DIR", help="write pictures there, as SVG")
    add(
        "--events",
        type=Path,
        metavar="FILE",
        help="life events, as serve --log-format json has them",
    )
    add("--requests", type=Path, metavar="FILE", help="a line for each request: CSV, or .jsonl")
    add("--sample-interval", type=float, default=1.0, metavar="S", help="of the pools (default: 1)")
    add("--no-progress", action="store_true", help="no progress bar")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimOptions:
    """All that was asked for. ``parsed``: the flags that need no more than reading."""

    cluster: ClusterSpec
    machines: MachineOptions
    workload: WorkloadOptions
    classes: ServiceClasses
    service_of: Callable[[object], ServiceClass] | None
    declared_tokens: int | None
    slo: Slo | None
    scenario: Scenario | None
    parsed: argparse.Namespace

    @classmethod
    def of(cls, typed: argparse.Namespace) -> SimOptions:
        """Raises `ConfigError` for what cannot be."""
        parsed = with_file(
            typed,
            add_flags,
            TABLE,
            getattr(typed, "config", None),
            {"classes": lambda tables: str(parse_classes(tables))},
        )
        if not parsed.cluster:
            raise ConfigError("say what is simulated, as --cluster 2xh100:prefill,2xh100:decode")
        _check(parsed)
        classes = _classes(parsed.classes)
        return cls(
            cluster=parse_cluster(parsed.cluster),
            machines=machine_options(parsed),
            workload=workload_options(parsed),
            classes=classes,
            service_of=_service_of(classes, parsed.class_shares, parsed.seed),
            declared_tokens=declared(parsed.declared_tokens),
            slo=parse_slo(parsed.slo, "--slo") if parsed.slo else None,
            scenario=read_scenario(parsed.scenario) if parsed.scenario else None,
            parsed=parsed,
        )


def machine_options(parsed: argparse.Namespace) -> MachineOptions:
    """Of the flags that `add_machines` and `add_decisions` add."""
    return MachineOptions(
        model=parsed.model or "",
        profile=parsed.profile or "",
        perf_table=parsed.perf_table,
        link=parsed.link or "",
        max_step_tokens=parsed.max_step_tokens,
        catalogue=read_catalogue(parsed.catalogue, parsed.model or ""),
    )


def _check(parsed: argparse.Namespace) -> None:
    check_numbers(
        parsed,
        above_0=("block_size", "max_step_tokens", "mixed_chunk_tokens", "max_running",
                 "max_queued_requests", "sample_interval"),
        from_0=("one_shot_tokens", "queue_timeout", "load_time"),
    )  # fmt: skip
    make_policy(parsed.policy)
    if parsed.batching:
        make_batching(parsed.batching)


def check_blocks(parsed: argparse.Namespace, block_size: int) -> None:
    """Raises `ConfigError` if a step could hold no block."""
    for name in ("max_step_tokens", "mixed_chunk_tokens"):
        value = getattr(parsed, name)
        if value < block_size:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {value}: it must be at least one block, "
                f"{block_size} tokens (--block-size)"
            )


def declared(text: str) -> int | None:
    """What ``--declared-tokens`` says. Raises `ConfigError`."""
    if text == EXACT:
        return None
    if not text.isdigit() or not int(text):
        raise ConfigError(f"--declared-tokens is {text!r}: give a number above 0, or {EXACT}")
    return int(text)


def _classes(written: Any) -> ServiceClasses:
    return ONE_CLASS if written is None else parse_classes(written)


def _service_of(
    classes: ServiceClasses, shares: str | None, seed: int
) -> Callable[[object], ServiceClass] | None:
    """A class for each request, in the order in which they come."""
    by_name = {service.name: service for service in classes.classes}
    if shares is None:
        others = [service for service in classes.classes if service.name != "default"]
        if len(others) > 1:
            raise ConfigError(
                "say how the requests divide over the classes, as --class-shares "
                + ",".join(f"{service.name}=1" for service in others)
            )
        chosen = others[0] if others else by_name["default"]
        return lambda asked: chosen
    weights: dict[str, float] = {}
    for part in shares.split(","):
        name, _, number = part.partition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if name not in by_name or not 0 <= share < float("inf"):
            known = ", ".join(by_name)
            raise ConfigError(f"--class-shares {part!r}: write NAME=SHARE; classes are {known}")
        weights[name] = share
    if not sum(weights.values()):
        raise ConfigError("--class-shares: at least one share must be above 0")
    drawn = Random(f"{seed}/classes")
    services = [by_name[name] for name in weights]
    return lambda asked: drawn.choices(services, list(weights.values()))[0]
