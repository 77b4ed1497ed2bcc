"""What the studies of this folder share: simulated runs that are kept, and searches over rates.

A run that has been made is found again, by all that was asked of it, in ``runs.jsonl`` of the
study's folder: a study that was cut off goes on where it was, and one that is changed makes only
what is new. Each run is kept with the revision of the code that made it; ``--fresh`` forgets them.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pdserve.core.request import ServiceClass
from pdserve.sim.observe import Ended, Observer
from pdserve.sim.settings import SimSettings
from pdserve.sim.simulation import Simulation
from pdserve.workload.outcome import Ending
from pdserve.workload.request import TraceRequest
from pdserve.workload.summary import percentile

NEVER_S = 1e6
"""Longer than any run: for queues that nothing leaves before it is served."""


class EnoughError(Exception):
    """An observer knows all that it wants to know: the run need not go on."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as its client saw it; None: it had no such moment."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    failure: str | None = None

    def meets(self, ttft_s: float, tpot_s: float) -> bool:
        """Answered, within both bounds. An answer of one token has no TPOT and meets any."""
        return (
            self.failure is None
            and self.ttft_s is not None
            and self.ttft_s <= ttft_s
            and (self.tpot_s or 0.0) <= tpot_s
        )


class Clients(Observer):
    """Keeps what every client saw."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def ended(self, at_s: float, request: Ended) -> None:
        assert request.ending is not Ending.CANCELLED, "nobody leaves in these studies"
        self.seen.append(
            Seen(
                request.prompt_tokens,
                request.cached_tokens,
                request.output_tokens,
                request.ttft_s,
                request.tpot_s,
                request.e2e_s,
                request.failure,
            )
        )


class Judge(Observer):
    """Stops a run in which so many requests have missed their bounds that the promise is broken,
    whatever the others do."""

    def __init__(self, ttft_s: float, tpot_s: float, allowed: int) -> None:
        self._bounds = ttft_s, tpot_s
        self._allowed = allowed
        self.num_missed = 0

    def ended(self, at_s: float, request: Ended) -> None:
        seen = Seen(0, 0, 0, request.ttft_s, request.tpot_s, None, request.failure)
        self.num_missed += not seen.meets(*self._bounds)
        if self.num_missed > self._allowed:
            raise EnoughError


def simulate(
    settings: SimSettings, requests: Iterator[TraceRequest], observers: Sequence[Observer]
) -> bool:
    """Runs it. False: an observer had enough of it."""
    try:
        Simulation(settings, requests, observers).run()
    except EnoughError:
        return False
    return True


def patient(settings: SimSettings) -> SimSettings:
    """The same, with a router that lets every request wait for as long as it must."""
    return replace(settings, queue_timeout_s=NEVER_S, max_queued_requests=10**9)


def promised(settings: SimSettings, ttft_s: float, tpot_s: float) -> SimSettings:
    """The same, with these bounds promised to every request: policies and admission know them."""
    service = ServiceClass(name="promised", ttft_s=ttft_s, tpot_s=tpot_s)
    return replace(settings, service=service)


def figures(seen: Sequence[Seen]) -> dict[str, Any]:
    """Means and percentiles in seconds over those that were answered, and what was cached."""
    answered = [each for each in seen if each.failure is None]
    found: dict[str, Any] = {
        "num": len(seen),
        "refused": len(seen) - len(answered),
        "cached_share": sum(each.cached_tokens for each in answered)
        / max(1, sum(each.prompt_tokens for each in answered)),
    }
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        values = sorted(v for each in answered if (v := getattr(each, name)) is not None)
        if values:
            found[name] = {
                "mean": math.fsum(values) / len(values),
                "p50": percentile(values, 50),
                "p90": percentile(values, 90),
                "p99": percentile(values, 99),
            }
    return found


# --- runs that are kept -----------------------------------------------------------------------


class Lab:
    """Runs of one study, in ``folder``."""

    def __init__(self, folder: Path, *, fresh: bool = False, shown: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.num_made = 0
        self.revisions: set[str] = set()
        self._path = folder / "runs.jsonl"
        self._shown = shown
        self._known: dict[str, dict[str, Any]] = {}
        self._revision = revision()
        if fresh:
            self._path.unlink(missing_ok=True)
        if self._path.exists():
            whole, _, cut_off = self._path.read_text().rpartition("\n")
            for line in whole.splitlines():
                kept = json.loads(line)
                self._known[_key(kept["asked"])] = kept
            if cut_off:
                self._path.write_text(whole + "\n" if whole else "")

    def result(self, asked: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``work`` gives; it is done once for all that is ``asked``. Both are plain data."""
        key = _key(asked)
        kept = self._known.get(key)
        if kept is None:
            self._say(f"{_short(asked)} ...")
            begun = time.perf_counter()
            kept = {
                "asked": asked,
                "answer": work(),
                "wall_s": round(time.perf_counter() - begun, 3),
                "revision": self._revision,
            }
            self.num_made += 1
            self._known[key] = kept
            with self._path.open("a") as file:
                file.write(json.dumps(kept) + "\n")
            self._say(f"    {kept['wall_s']:.0f} s: {_short(kept['answer'])}")
        self.revisions.add(kept["revision"])
        answer: dict[str, Any] = kept["answer"]
        return answer

    def _say(self, text: str) -> None:
        if self._shown:
            print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def revision() -> str:
    """Of the code that runs, as git has it; a ``+`` where it was changed since."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def plain(settings: SimSettings) -> dict[str, Any]:
    """Of a simulation, what tells it from others: for `Lab.result`."""
    names = (
        "policy", "batching", "admission", "declared_tokens", "max_step_tokens",
        "mixed_chunk_tokens", "max_running", "prefix_cache", "seed",
    )  # fmt: skip
    return {
        "cluster": str(settings.cluster),
        "machines": [f"{m.name}: {m.model}, {m.source}" for m in settings.machines],
        **{name: getattr(settings, name) for name in names},
        "service": {k: str(v) for k, v in asdict(settings.service).items()},
    }


def _key(asked: dict[str, Any]) -> str:
    return json.dumps(asked, sort_keys=True)


def _short(values: dict[str, Any]) -> str:
    parts = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()]
    return ", ".join(part for part in parts if len(part) < 60)


# --- searches ---------------------------------------------------------------------------------


def highest(passes: Callable[[int], bool], guess: int, most: int = 1 << 20) -> int:
    """The highest whole number that passes, where all below one that passes do as well; 0: none.

    It goes from the guess by 1, 2, 4 and so on, until it has one that passes and one that does not;
    then it halves what is between them.
    """
    low, high = 0, most + 1
    at, step = max(1, min(guess, most)), 1
    while low < high - 1:
        if passes(at):
            low = at
        else:
            high = at
        if low and high <= most:
            at = (low + high) // 2
        elif low:
            at = min(most, low + step)
        else:
            at = max(1, high - step)
        step *= 2
    return low


def lowest(passes: Callable[[int], bool], guess: int, most: int) -> int | None:
    """The lowest one up to ``most`` that passes, where all above one that passes do as well."""
    failing = highest(lambda number: not passes(number), max(1, guess - 1), most)
    return None if failing == most else failing + 1


# --- command lines ----------------------------------------------------------------------------


def parser_of(name: str, doc: str | None) -> argparse.ArgumentParser:
    """With what every study takes."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data(parser)
    out = Path("papers") / name
    parser.add_argument(
        "--out", type=Path, default=out, metavar="DIR", help=f"for what it writes (default: {out})"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small part of it, in a minute or so"
    )
    parser.add_argument("--fresh", action="store_true", help="forget the runs that were made")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    """Where the user's copies of what others have published are."""

    def folder(text: str) -> Path:
        if not Path(text).is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {text}")
        return Path(text)

    parser.add_argument(
        "--data", type=folder, required=True, metavar="DIR", help="of published traces and tables"
    )
