"""What has been asked and answered, and what follows from it.

An answer is kept for good, in a file if the user wants to go on later (`Journal`). And it spares
others: what n workers of a design cannot do, fewer of the same cannot, nor can n at a higher rate;
what they can do, more of them can, and n at a lower rate. (Of a real policy this is nearly true,
and taken to be.)

A verdict over several windows adds up their misses, and stops at the window in which the promise is
lost, as the simulation of that window itself stops.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from pdserve.core.errors import ConfigError, why
from pdserve.sim.plan.promise import Promise, allowed_misses
from pdserve.sim.plan.trial import (
    Candidate,
    Conditions,
    Counts,
    Design,
    Evaluate,
    Evaluation,
    Factors,
    Trial,
)

Key = tuple[Design, int, Factors, Factors]
Told = Callable[[Trial, Evaluation], None]


_BEGINS = '{"key": '
"""Every line of a journal."""


class Journal:
    """Evaluations in a file, one a line, each under the digest of all that it depends on. A line
    that broke off is passed over, so a search that was killed goes on where it was."""

    def __init__(self, path: Path | None, problem: str) -> None:
        """``problem``: digest of what all evaluations have in common. Raises `ConfigError`."""
        self._problem = problem
        self._found: dict[str, Evaluation] = {}
        self._file: int | None = None
        if path is None:
            return
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--resume: cannot use {path}: {why(error)}") from error
        if text and not text.startswith(_BEGINS):
            raise ConfigError(f"--resume: {path} is no file that a plan has written: name another")
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                document = json.loads(line)
                self._found[document["key"]] = Evaluation.of(document["evaluation"])
        if text and not text.endswith("\n"):
            os.write(self._file, b"\n")

    def find(self, trial: Trial) -> Evaluation | None:
        return self._found.get(self._key(trial))

    def keep(self, trial: Trial, evaluation: Evaluation) -> None:
        key = self._key(trial)
        self._found[key] = evaluation
        if self._file is not None:
            line = {"key": key, "trial": str(trial), "evaluation": evaluation.document()}
            os.write(self._file, json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _key(self, trial: Trial) -> str:
        whole = f"{self._problem}/{trial!r}"
        return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()


class _Facts:
    """Of one design under like conditions: the (counts, rate) that met, and that failed."""

    def __init__(self) -> None:
        self.met: list[tuple[Counts, float]] = []
        self.failed: list[tuple[Counts, float]] = []

    def verdict(self, counts: Counts, rate: float) -> bool | None:
        """What follows from what is known; None: nothing."""
        for more, faster in self.failed:
            if rate >= faster and all(a <= b for a, b in zip(counts, more, strict=True)):
                return False
        for fewer, slower in self.met:
            if rate <= slower and all(a >= b for a, b in zip(counts, fewer, strict=True)):
                return True
        return None


class Book:
    """Asks ``evaluate`` only what is not known. ``levels``: how many windows each level judges by,
    the last one all. ``told`` hears of every evaluation that was made."""

    def __init__(
        self,
        evaluate: Evaluate,
        promise: Promise,
        levels: Sequence[int],
        journal: Journal | None = None,
        told: Told = lambda trial, evaluation: None,
    ) -> None:
        self.levels = tuple(levels)
        self.num_asked = 0
        self._evaluate = evaluate
        self._promise = promise
        self._journal = journal if journal is not None else Journal(None, "")
        self._told = told
        self._facts: dict[Key, _Facts] = {}

    def meets(self, candidate: Candidate, conditions: Conditions, level: int) -> bool:
        """Does it hold the promise, over the level's windows together?"""
        facts = self._facts_of(candidate, conditions, level)
        known = facts.verdict(candidate.counts, conditions.rate)
        if known is not None:
            return known
        verdict = self._ask(candidate, conditions, self.levels[level])
        chosen = facts.met if verdict else facts.failed
        chosen.append((candidate.counts, conditions.rate))
        return verdict

    def known(self, candidate: Candidate, conditions: Conditions, level: int) -> bool | None:
        """The verdict, if nothing need be asked for it."""
        facts = self._facts_of(candidate, conditions, level)
        return facts.verdict(candidate.counts, conditions.rate)

    def met(self, level: int) -> list[tuple[Candidate, float]]:
        """All candidates that were seen to hold the promise as it is, with the rates."""
        return [
            (Candidate(design, counts), rate)
            for (design, at_level, looser, slower), facts in self._facts.items()
            if at_level == level and not looser and not slower
            for counts, rate in facts.met
        ]

    def window(self, candidate: Candidate, conditions: Conditions, window: int) -> Evaluation:
        """Of one window: simulated to its end, or until it has more misses than all windows
        together may have."""
        num = sum(self._evaluate.num_judged(number) for number in range(self.levels[-1]))
        allowed = allowed_misses(self._promise, num)
        return self._enough(Trial(candidate, conditions, window), allowed)

    def num_judged(self, window: int) -> int:
        return self._evaluate.num_judged(window)

    def may_miss(self, num: int) -> tuple[int, ...]:
        """Of so many requests, for each bound."""
        return allowed_misses(self._promise, num)

    def _facts_of(self, candidate: Candidate, conditions: Conditions, level: int) -> _Facts:
        key = (candidate.design, level, conditions.looser, conditions.slower)
        return self._facts.setdefault(key, _Facts())

    def _ask(self, candidate: Candidate, conditions: Conditions, num_windows: int) -> bool:
        num = sum(self._evaluate.num_judged(window) for window in range(num_windows))
        left = list(allowed_misses(self._promise, num))
        trials = [Trial(candidate, conditions, window) for window in range(num_windows)]
        # What is known first, whole evaluations before those that broke off (which may only have
        # so few misses because of these), then what has to be asked.
        trials = [*trials[1:], *trials[:1]]
        trials.sort(key=self._is_known)
        for trial in trials:
            found = self._enough(trial, left)
            left = [may - missed for may, missed in zip(left, found.misses, strict=True)]
            if min(left) < 0:
                return False
        return True

    def _is_known(self, trial: Trial) -> int:
        """0: wholly, 1: until the promise was lost, 2: not at all."""
        found = self._journal.find(trial)
        return 2 if found is None else 0 if found.complete else 1

    def _enough(self, trial: Trial, left: Sequence[int]) -> Evaluation:
        """An evaluation that is complete, or has more misses than are left."""
        found = self._journal.find(trial)
        if found is not None and (
            found.complete or any(a > b for a, b in zip(found.misses, left, strict=True))
        ):
            return found
        return self._run(trial, left)

    def _run(self, trial: Trial, left: Sequence[int] | None) -> Evaluation:
        found = self._evaluate(trial, left)
        self.num_asked += 1
        self._journal.keep(trial, found)
        self._told(trial, found)
        return found
