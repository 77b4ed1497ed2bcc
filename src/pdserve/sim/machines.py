"""The machine of each group of a cluster: from data sheets, a table of measurements, or a profile.

Which of the three it is says ``--profile``: nothing (data sheets), a table's reading together with
``--perf-table`` (``table``, or ``splitwisesim``), or the file that ``pdserve calibrate`` wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pdserve.core.errors import ConfigError
from pdserve.cost.machine import MachineModel
from pdserve.cost.roofline import CATALOGUE, Catalogue, find, machine_of
from pdserve.cost.table import PerfTable
from pdserve.cost.table_machine import machine_of_table
from pdserve.sim.spec import ClusterSpec, Group

TABLE_PROFILES = ("table", "splitwisesim")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineOptions:
    """``link``: of groups that name none; empty: what comes with the hardware. ``max_step_tokens``
    for the memory that a step takes."""

    model: str
    profile: str = ""
    perf_table: Path | None = None
    link: str = ""
    block_size: int = 16
    max_step_tokens: int = 2048
    catalogue: Catalogue = CATALOGUE


def machines_of(cluster: ClusterSpec, options: MachineOptions) -> tuple[MachineModel, ...]:
    """One for each group. Raises `ConfigError` for what is unknown, or does not fit."""
    table = _table(options)
    return tuple(_machine(group, options, table) for group in cluster.groups)


def _machine(group: Group, options: MachineOptions, table: PerfTable | None) -> MachineModel:
    link = group.link or options.link
    if table is None:
        return machine_of(
            group.hardware,
            options.model,
            block_size=options.block_size,
            link=link,
            max_step_tokens=options.max_step_tokens,
            catalogue=options.catalogue,
        )
    as_splitwisesim = options.profile == "splitwisesim"
    machine = machine_of_table(
        table,
        group.hardware,
        options.model,
        as_splitwisesim=as_splitwisesim,
        gqa=not as_splitwisesim,
        block_size=options.block_size,
    )
    if not link:
        return machine
    ends = find(options.catalogue.links, link, "link").of_worker(machine.num_devices)
    return replace(machine, link=ends)


def _table(options: MachineOptions) -> PerfTable | None:
    profile, path = options.profile, options.perf_table
    if path is None:
        if profile in TABLE_PROFILES:
            raise ConfigError(f"--profile {profile} needs --perf-table FILE, the measured times")
        return None
    if profile not in ("", *TABLE_PROFILES):
        raise ConfigError("--perf-table goes with --profile table or splitwisesim")
    try:
        return PerfTable.read(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--perf-table: cannot read {path}: {error}") from error
