"""The machine of each group of a cluster: from data sheets, a table of measurements, or a profile.

Which of the three it is says ``--profile``: nothing (data sheets), a table's reading together with
``--perf-table`` (``table``, or ``splitwisesim``), or the file that ``pdserve calibrate`` wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pdserve.core.errors import ConfigError, why
from pdserve.cost.catalogue import CATALOGUE, Catalogue, find
from pdserve.cost.machine import ClusterTimes, LinkSpec, MachineModel
from pdserve.cost.profile import Profile, from_text, machine_from_profile
from pdserve.cost.roofline import machine_of
from pdserve.cost.table import PerfTable
from pdserve.cost.table_machine import machine_of_table
from pdserve.sim.spec import ClusterSpec, Group

SPLITWISESIM = "splitwisesim"
TABLE_PROFILES = ("table", SPLITWISESIM)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineOptions:
    """``model`` may be empty if a profile says it. ``link``: of groups that name none; empty: what
    comes with the hardware. ``max_step_tokens``: for the memory that a step takes."""

    model: str = ""
    profile: str = ""
    perf_table: Path | None = None
    link: str = ""
    max_step_tokens: int = 2048
    catalogue: Catalogue = CATALOGUE


class Machines:
    """Makes them. Raises `ConfigError` for a file that cannot be used.

    ``model`` and ``times`` are the profile's where there is one. ``block_size`` None: any will do.
    """

    def __init__(self, options: MachineOptions) -> None:
        self._options = options
        self._table = _table(options)
        self._profile = _profile(options)
        profile = self._profile
        self.times = ClusterTimes() if profile is None else profile.times
        self.block_size = None if profile is None else profile.machines[0].block_size
        self.model = options.model or ("" if profile is None else profile.model)
        if not self.model:
            raise ConfigError("say which model is simulated, as --model llama-3-70b")
        if profile is not None and self.model != profile.model:
            raise ConfigError(
                f"--model is {self.model}, and the profile {profile.name} is of {profile.model}: "
                "leave out --model, or calibrate with that model"
            )

    @property
    def imitated(self) -> PerfTable | None:
        """The table of ``--profile splitwisesim``, None with any other."""
        return self._table if self._options.profile == SPLITWISESIM else None

    def of(self, cluster: ClusterSpec, block_size: int) -> tuple[MachineModel, ...]:
        """One for each group. Raises `ConfigError` for what is unknown, or does not fit."""
        profile = self._profile
        if profile is not None:
            names = {group.hardware for group in cluster.groups}
            if profile.name not in names:
                raise ConfigError(
                    f"the profile is of {profile.name}, and the cluster has none of it: write it "
                    f"as 1x{profile.name}:prefill"
                )
            if block_size != self.block_size:
                raise ConfigError(
                    f"--block-size is {block_size}, and the profile {profile.name} was measured "
                    f"with {self.block_size}: leave it out"
                )
        return tuple(self._machine(group, block_size) for group in cluster.groups)

    def _machine(self, group: Group, block_size: int) -> MachineModel:
        options, profile = self._options, self._profile
        link = group.link or options.link
        if profile is not None and group.hardware == profile.name:
            spec = self._link(link, 1) if link else None
            return machine_from_profile(profile, group.role, spec)
        if self._table is not None:
            machine = machine_of_table(
                self._table,
                group.hardware,
                self.model,
                as_splitwisesim=options.profile == SPLITWISESIM,
                gqa=options.profile != SPLITWISESIM,
                block_size=block_size,
            )
            return replace(machine, link=self._link(link, machine.num_devices)) if link else machine
        return machine_of(
            group.hardware,
            self.model,
            block_size=block_size,
            link=link,
            max_step_tokens=options.max_step_tokens,
            catalogue=options.catalogue,
        )

    def _link(self, name: str, num_devices: int) -> LinkSpec:
        return find(self._options.catalogue.links, name, "link").of_worker(num_devices)


def _table(options: MachineOptions) -> PerfTable | None:
    profile, path = options.profile, options.perf_table
    if path is None:
        if profile in TABLE_PROFILES:
            raise ConfigError(f"--profile {profile} needs --perf-table FILE, the measured times")
        return None
    if profile not in ("", *TABLE_PROFILES):
        raise ConfigError("--perf-table goes with --profile table or splitwisesim")
    return PerfTable.read(_text_of(path, "--perf-table"), str(path))


def _profile(options: MachineOptions) -> Profile | None:
    if options.profile in ("", *TABLE_PROFILES):
        return None
    path = Path(options.profile)
    return from_text(_text_of(path, "--profile"), str(path))


def _text_of(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag}: cannot read {path}: {why(error)}") from error
