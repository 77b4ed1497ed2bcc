"""Splitwise's clusters: which machines are in its designs, how many, what they cost and draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COST = {"a100": 8 * 2.21, "h100": 8 * 4.76, "h100cap": 8 * 4.76}
"""Of a machine, per hour: the artifact's notebooks/utils.py."""
POWER = {"a100": 24.8, "h100": 44.0, "h100cap": 30.8}
"""Of a machine, in the artifact's unit."""


@dataclass(frozen=True, slots=True)
class Design:
    """``prompt``, ``token``: the hardware of the two pools; the same and ``mixed``: a baseline."""

    prompt: str
    token: str
    mixed: bool = False

    def cluster(self, counts: Sequence[int]) -> str:
        if self.mixed:
            return f"{counts[0]}x{self.prompt}:mixed"
        return f"{counts[0]}x{self.prompt}:prefill,{counts[1]}x{self.token}:decode"

    def total(self, counts: Sequence[int], of: dict[str, float]) -> float:
        return sum(n * of[name] for n, name in zip(counts, (self.prompt, self.token), strict=False))


DESIGNS = {
    "Baseline-A100": Design("a100", "a100", mixed=True),
    "Baseline-H100": Design("h100", "h100", mixed=True),
    "AA": Design("a100", "a100"),
    "HH": Design("h100", "h100"),
    "HA": Design("h100", "a100"),
    "HHcap": Design("h100", "h100cap"),
}
COUNTS: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {
    ("equal power", "conversation"): {
        "Baseline-A100": (70,), "Baseline-H100": (40,),
        "AA": (45, 25), "HH": (25, 15), "HA": (25, 26), "HHcap": (25, 21),
    },
    ("equal power", "code"): {
        "Baseline-A100": (70,), "Baseline-H100": (40,),
        "AA": (55, 15), "HH": (35, 5), "HA": (35, 8), "HHcap": (35, 7),
    },
    ("equal cost", "conversation"): {
        "Baseline-A100": (86,), "Baseline-H100": (40,),
        "AA": (51, 35), "HH": (25, 15), "HA": (30, 21), "HHcap": (30, 10),
    },
    ("equal cost", "code"): {
        "Baseline-A100": (86,), "Baseline-H100": (40,),
        "AA": (66, 20), "HH": (35, 5), "HA": (35, 10), "HHcap": (35, 7),
    },
}  # fmt: skip

BUDGETS = {"equal power": (POWER, "h100", 40), "equal cost": (COST, "h100", 40)}
"""What a setting's clusters may take: as much as so many of these machines."""
SHARE_STEP = 0.08


def division(setting: str, name: str, share: float) -> tuple[int, int]:
    """Prompt and token machines of a design, the prompt machines with that share of the budget."""
    of, hardware, number = BUDGETS[setting]
    design, budget = DESIGNS[name], of[hardware] * number
    prompt = max(1, round(budget * share / of[design.prompt]))
    return prompt, max(1, int((budget - prompt * of[design.prompt]) / of[design.token] + 1e-9))
