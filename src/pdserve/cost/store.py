"""Fits as text, so that the next server starts from what this one has learned.

A saved fit belongs to what it was measured on: steps to (weights, engine, device, numerics class),
links to a transport. Text that is broken, of another format or out of range is refused as a whole;
a fit is cheap to learn again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from pdserve.cost.fit import LinkFit, LinkFitState, StepFit, StepFitState
from pdserve.cost.link import LinkModel
from pdserve.cost.regression import RegressionState
from pdserve.cost.shape import ModelShape
from pdserve.cost.step import StepModel

FORMAT = 1


@dataclass(frozen=True, slots=True, order=True)
class StepKey:
    """Workers whose steps take the same time, as far as is known."""

    weights_digest: str
    engine: str
    device: str
    numerics: str


@dataclass(frozen=True, slots=True)
class SavedSteps:
    key: StepKey
    fit: StepFitState


@dataclass(frozen=True, slots=True)
class SavedLink:
    transport: str
    fit: LinkFitState


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCosts:
    """What a router is told of costs at its birth: enough for priors, and what earlier servers have
    learned. ``num_cores``: of a CPU worker. ``token_bytes`` of a worker that does not say it comes
    from ``shape``."""

    shape: ModelShape | None = None
    num_cores: int = 1
    transport: str = ""
    steps: tuple[SavedSteps, ...] = ()
    link: SavedLink | None = None


def to_text(saved: SavedSteps | SavedLink) -> str:
    """One fit as JSON."""
    kind = "steps" if isinstance(saved, SavedSteps) else "link"
    return json.dumps({"format": FORMAT, "kind": kind, **asdict(saved)}, indent=1)


def from_text(text: str) -> SavedSteps | SavedLink:
    """The fit that `to_text` made this of. Raises `ValueError` for anything else."""
    document = json.loads(text)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"it is not a fit of format {FORMAT}")
    try:
        saved = _parsed(document)
        if isinstance(saved, SavedSteps):
            StepFit(saved.fit.prior, state=saved.fit)
        else:
            LinkFit(saved.fit.prior, state=saved.fit)
    except (KeyError, TypeError, AttributeError, ArithmeticError, IndexError) as error:
        raise ValueError(f"it is not a fit: {error!r}") from error
    return saved


def _parsed(document: dict[str, Any]) -> SavedSteps | SavedLink:
    fit = document["fit"]
    if document["kind"] == "link":
        link = LinkFitState(prior=LinkModel(**_numbers(fit["prior"])), line=_state(fit["line"]))
        return SavedLink(str(document["transport"]), link)
    if document["kind"] != "steps":
        raise ValueError(f"it is a fit of {document['kind']!r}")
    names = ("weights_digest", "engine", "device", "numerics")
    steps = StepFitState(
        prior=StepModel(**_numbers(fit["prior"])),
        prompt=_state(fit["prompt"]),
        decode=_state(fit["decode"]),
    )
    return SavedSteps(StepKey(*(str(document["key"][name]) for name in names)), steps)


def _state(document: dict[str, Any]) -> RegressionState:
    return RegressionState(
        moments=tuple(map(_number, document["moments"])),
        targets=tuple(map(_number, document["targets"])),
        num_samples=int(_number(document["num_samples"])),
        weight=_number(document["weight"]),
        log_level=_number(document["log_level"], least=-50.0),
        error=_number(document["error"]),
        spread=_number(document["spread"]),
        drift=_number(document["drift"], least=-1.0),
    )


def _numbers(document: dict[str, Any]) -> dict[str, float]:
    return {name: _number(value) for name, value in document.items()}


def _number(value: Any, least: float = 0.0) -> float:
    number = float(value)
    if not isfinite(number) or number < least or number > 1e100:
        raise ValueError(f"{value!r} is out of range")
    return number
