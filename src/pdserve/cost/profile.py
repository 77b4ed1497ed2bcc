"""What ``pdserve calibrate`` has measured of a live server, as a file.

A profile describes the workers of one deployment on one machine: how long their steps take, with
the error of that by cross-validation, how fast KV and messages travel, what the edge costs. The
simulator makes its machines of it (`machine_from_profile`). It holds for what it was measured on:
the model, the dtypes, the threads and the pinning are in it, for people to compare.

Text that is broken, of another format or out of range is refused as a whole, with the place that is
wrong: half a profile would be a wrong one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from math import isfinite
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from pdserve.core.errors import ConfigError
from pdserve.core.request import Role
from pdserve.cost.machine import ClusterTimes, LinkSpec, MachineModel, StepRange
from pdserve.cost.measured import Kind, MeasuredSteps
from pdserve.cost.measured_fit import FitError
from pdserve.cost.pace import KINDS, Gap, Lost, Pace, Spread
from pdserve.cost.step import StepModel

FORMAT = 1
LARGEST = 1e18
UNMEASURED_LINK = LinkSpec(bytes_per_s=1e9, fixed_s=1e-3)
"""Of mixed workers without a measured one: they hand over only to be drained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Where it was measured. ``pinning``: the cores that the server could use, in words."""

    cpu: str
    num_cores: int
    pinning: str
    system: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Workers that are alike. ``roles``: home roles of those that were measured; ``mixed`` None: no
    step of that kind was. ``num_blocks`` is the live pool's. ``gaps`` by kind of step; one that is
    not there has the gap of ``times``."""

    roles: tuple[Role, ...]
    device: str
    engine: str
    numerics: str
    threads: int
    num_layers: int
    token_kv_bytes: int
    block_size: int
    num_blocks: int
    max_model_tokens: int
    prompt: Kind
    decode: Kind
    mixed: Kind | None
    linear: StepModel
    measured: StepRange
    errors: dict[str, FitError]
    spreads: dict[str, Spread]
    lost: dict[str, Lost]
    gaps: dict[str, Gap] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Of its steps together: the mean of the kinds' median errors, by how often each ran."""
        num = sum(error.num_steps for error in self.errors.values())
        return sum(error.median * error.num_steps for error in self.errors.values()) / max(num, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFit:
    """What hand-offs say of the link: the spec, how many there were, and by how much what the fit
    says was off, in the median of those left out of it, in seconds."""

    spec: LinkSpec
    num_transfers: int
    error_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """``made``: the day. ``flags``: those of ``serve``. ``workers``: how many of each home role
    there were on the host. ``link`` None: nothing was handed over. ``warnings``: what makes it
    less to be trusted, for people."""

    name: str
    made: str
    model: str
    host: Host
    flags: tuple[str, ...]
    workers: dict[str, int]
    machines: tuple[Machine, ...]
    link: LinkFit | None
    times: ClusterTimes
    warnings: tuple[str, ...] = ()

    def machine(self, role: Role) -> Machine:
        """Of workers of this home role; if none was measured, of the first that were: every worker
        can do both phases."""
        for machine in self.machines:
            if role in machine.roles:
                return machine
        return self.machines[0]


def machine_from_profile(
    profile: Profile, role: Role = Role.MIXED, link: LinkSpec | None = None
) -> MachineModel:
    """A simulated worker as the measured ones of this role. ``link``: in place of the measured one,
    and needed by a worker that is to hand over if none was measured (`ConfigError`)."""
    machine = profile.machine(role)
    spec = link or (profile.link.spec if profile.link is not None else None)
    if spec is None and role is Role.MIXED:
        spec = UNMEASURED_LINK
    if spec is None:
        raise ConfigError(
            f"the profile {profile.name} was measured without a hand-off, so it knows no link: "
            "name one, as in 1xNAME:prefill@LINK, or calibrate with --prefill 1 --decode 1"
        )
    return MachineModel(
        name=profile.name,
        model=profile.model,
        steps=MeasuredSteps(machine.prompt, machine.decode, machine.mixed),
        linear=machine.linear,
        num_layers=machine.num_layers,
        token_kv_bytes=machine.token_kv_bytes,
        block_size=machine.block_size,
        num_blocks=machine.num_blocks,
        max_model_tokens=machine.max_model_tokens,
        link=spec,
        measured=machine.measured,
        error=machine.error,
        source=f"calibrated on {profile.host.cpu}, {profile.made}",
        pace=Pace(
            spreads=machine.spreads,
            lost=machine.lost,
            gaps=machine.gaps,
            per_host={Role(role): count for role, count in profile.workers.items()},
        ),
    )


# --- as text -----------------------------------------------------------------------------------


def to_text(profile: Profile) -> str:
    """The profile as JSON."""
    document = {"format": FORMAT, "kind": "profile", **asdict(profile)}
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def from_text(text: str, where: str = "the profile") -> Profile:
    """The profile that `to_text` made this of. Raises `ConfigError` for anything else; ``where``
    is what the message calls it."""
    try:
        document = json.loads(text)
        if not isinstance(document, dict) or document.get("kind") != "profile":
            raise ValueError("it is not a profile of pdserve calibrate")
        if document.get("format") != FORMAT:
            raise ValueError(
                f"its format is {document.get('format')!r} and this build reads {FORMAT}"
            )
        rest = {key: value for key, value in document.items() if key not in ("format", "kind")}
        profile: Profile = _read(Profile, rest, "")
        _check(profile)
    except ValueError as error:
        raise ConfigError(
            f"{where} cannot be used: {error}; make it again with pdserve calibrate"
        ) from error
    return profile


def _check(profile: Profile) -> None:
    if not profile.machines:
        raise ValueError("it holds no machine")
    for machine in profile.machines:
        for name in ("threads", "num_layers", "token_kv_bytes", "block_size", "num_blocks"):
            if getattr(machine, name) < 1:
                raise ValueError(f"machines.{name} is not above 0")
        for name in ("errors", "spreads", "lost", "gaps"):
            strangers = set(getattr(machine, name)) - set(KINDS)
            if strangers:
                raise ValueError(f"machines.{name} names kinds of steps that there are not")
    if profile.link is not None and profile.link.spec.bytes_per_s <= 0:
        raise ValueError("link.spec.bytes_per_s is not above 0")
    for role in profile.workers:
        if role not in set(Role):
            raise ValueError(f"workers names {role!r}, which is no role")


def _read(wanted: Any, value: Any, place: str) -> Any:
    """The value as the type that is wanted: numbers, texts, dataclasses and collections of them.
    Raises `ValueError` with the place."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin is UnionType:
        if value is None and NoneType in arguments:
            return None
        return _read(next(a for a in arguments if a is not NoneType), value, place)
    if is_dataclass(wanted):
        return _dataclass(wanted, value, place)
    if origin is tuple:
        values = enumerate(_list(value, place))
        return tuple(_read(arguments[0], v, f"{place}[{i}]") for i, v in values)
    if origin is dict:
        pairs = _mapping(value, place)
        return {str(key): _read(arguments[1], v, f"{place}.{key}") for key, v in pairs.items()}
    return _scalar(wanted, value, place)


def _dataclass(wanted: Any, value: Any, place: str) -> Any:
    pairs, types = _mapping(value, place), get_type_hints(wanted)
    known = {one.name: one for one in fields(wanted)}
    for name in pairs:
        if name not in known:
            raise ValueError(f"{place}.{name} is unknown".lstrip("."))
    for name, one in known.items():
        if name not in pairs and one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"{place}.{name} is missing".lstrip("."))
    found = {n: _read(types[n], v, f"{place}.{n}".lstrip(".")) for n, v in pairs.items()}
    try:
        return wanted(**found)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{place} is not a list")
    return value


def _mapping(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place or 'it'} is not an object")
    return value


def _scalar(wanted: Any, value: Any, place: str) -> Any:
    if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not isfinite(value) or not 0 <= value <= LARGEST:
            raise ValueError(f"{place} is {value!r}, which is out of range")
        return float(value)
    if wanted is int and isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value <= LARGEST:
            raise ValueError(f"{place} is {value!r}, which is out of range")
        return value
    if wanted is bool and isinstance(value, bool):
        return value
    if wanted is str and isinstance(value, str):
        return value
    if wanted is Role and value in set(Role):
        return Role(value)
    raise ValueError(f"{place} is {value!r}, and should be a {getattr(wanted, '__name__', wanted)}")
