"""``pdserve calibrate``: start the server that is to be measured, ask it, fit what it did.

It takes the flags of ``serve``, and measures that deployment on this machine: with one prefill and
one decode worker their steps beside each other, with one mixed worker its mixed steps. What is
measured is in the recordings of the server's machines, so it is what the router and the workers see
in operation, not what an engine does in a loop of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import math
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pdserve.calibrate.arguments import OWN_FLAGS, QUICK_SECONDS, SECONDS
from pdserve.calibrate.design import Design, Limits
from pdserve.calibrate.fit import errors_of, profile_of
from pdserve.calibrate.live import Asked, Asker, ask, serving
from pdserve.config import OPTIONS, resolve
from pdserve.core.errors import ConfigError, why
from pdserve.cost.profile import Host, Profile, to_text
from pdserve.options import flag_of
from pdserve.page import page
from pdserve.serve.deployment import Deployment, deploy
from pdserve.serve.recorded import read_run

ROUNDS = 3
FORCED = ("--admission", "none", "--queue-timeout", "3600", "--drain-timeout", "5")


def run(parsed: argparse.Namespace) -> int:
    """Gives the exit status."""
    deployment, flags = deployment_of(parsed)
    seconds = parsed.seconds or (QUICK_SECONDS if parsed.quick else SECONDS)
    if not 0 < seconds < math.inf:
        raise ConfigError(f"--seconds is {seconds:g}: give a number above 0")
    out = Path(parsed.out)
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}")
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a folder; name a file")
    folder = parsed.recording or Path(tempfile.mkdtemp(prefix="pdserve-calibrate-"))
    try:
        with _Bar(shown=not parsed.json) as bar:
            profile = measure(
                deployment,
                flags,
                folder / "recording",
                name=parsed.name,
                rounds=1 if parsed.quick else ROUNDS,
                seconds=seconds,
                seed=parsed.seed,
                progress=bar.at,
            )
    finally:
        if parsed.recording is None:
            shutil.rmtree(folder, ignore_errors=True)
    text = to_text(profile)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out: cannot write {out}: {why(error)}") from error
    if parsed.json:
        print(json.dumps(json.loads(text)))
    else:
        show(page(), profile, out)
    return 0


def deployment_of(parsed: argparse.Namespace) -> tuple[Deployment, tuple[str, ...]]:
    """What is to be measured, and the flags of ``serve`` for it, of what `add_arguments` knows."""
    typed = {
        name: getattr(parsed, name)
        for name in OPTIONS
        if name not in OWN_FLAGS and getattr(parsed, name) is not None
    }
    deployment = deploy(resolve(typed, os.environ, parsed.config).config)
    flags = tuple(word for name, value in typed.items() for word in (flag_of(name), str(value)))
    if parsed.config is not None:
        flags = ("--config", str(parsed.config), *flags)
    return deployment, flags


def measure(
    deployment: Deployment,
    flags: tuple[str, ...],
    recording: Path,
    *,
    name: str,
    rounds: int,
    seconds: float,
    seed: int,
    progress: Callable[[str, float], None],
) -> Profile:
    """Start, ask, end, read, fit."""
    recording.parent.mkdir(parents=True, exist_ok=True)
    progress("starting the server", 0.0)
    with serving((*flags, *FORCED), recording) as url:
        asker = asker_of(url, deployment, seed)
        asked = asyncio.run(ask(asker, rounds, seconds, progress))
    kept_asked(recording).write_bytes(msgspec.json.encode(asked))
    progress("fitting", 1.0)
    return profile_from(recording, asked, deployment, flags, name)


def kept_asked(recording: Path) -> Path:
    """Where it is kept what was asked (`Asked`, as JSON): beside the recording, which says nothing
    of it. With both a profile can be fitted again."""
    return recording.with_name("asked.json")


def asker_of(url: str, deployment: Deployment, seed: int) -> Asker:
    """Of a server of that deployment."""
    config = deployment.config
    limits = Limits(
        longest_tokens=deployment.card.max_model_tokens,
        pool_tokens=deployment.num_blocks * config.block_size,
        workers=len(config.worker_slots),
    )
    design = Design(limits, seed, splits=config.prefill > 0 and config.decode > 0)
    return Asker(url, design, vocab_size=deployment.card.vocab_size)


def profile_from(
    recording: Path, asked: Asked, deployment: Deployment, flags: tuple[str, ...], name: str
) -> Profile:
    """Read what the server recorded, and fit what was asked."""
    return profile_of(
        read_run(recording),
        asked,
        name=name,
        made=datetime.datetime.now(datetime.UTC).date().isoformat(),
        model=deployment.card.name,
        host=this_host(),
        flags=flags,
        threads=deployment.threads,
    )


def this_host() -> Host:
    """What is known of this machine without asking anybody."""
    cores = sorted(os.sched_getaffinity(0))
    everywhere = len(cores) == (os.cpu_count() or 0)
    pinning = "not pinned" if everywhere else f"cores {','.join(map(str, cores))}"
    return Host(
        cpu=_cpu_name(),
        num_cores=os.cpu_count() or 1,
        pinning=pinning,
        system=f"{platform.system()} {platform.machine()}",
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not every system has it
    return platform.processor() or platform.machine()


def show(console: Console, profile: Profile, out: Path) -> None:
    """The profile for people: how far off each kind of step is, and the times beside them."""
    table = Table(title=f"{profile.model}, {profile.host.cpu}", title_justify="left", box=None)
    for column in ("workers", "steps", "measured", "off, median", "off, P90"):
        table.add_column(column, justify="left" if column in ("workers", "steps") else "right")
    for machine, kind, error in errors_of(profile):
        roles = ", ".join(role.value for role in machine.roles)
        table.add_row(roles, kind, str(error.num_steps), f"{error.median:.1%}", f"{error.p90:.1%}")
    console.print(table)
    times = profile.times
    console.print(
        f"beside the steps: {times.step_gap_s * 1e3:.2f} ms between two, a message "
        f"{times.message_s * 1e3:.2f} ms, the edge {times.edge_in_s * 1e3:.2f} ms in and "
        f"{times.edge_out_s * 1e3:.2f} ms out"
    )
    if profile.link is not None:
        spec = profile.link.spec
        console.print(
            f"the link: {spec.bytes_per_s / 1e9:.2f} GB/s and {spec.fixed_s * 1e3:.2f} ms, off by "
            f"{profile.link.error_s * 1e3:.2f} ms in the median of {profile.link.num_transfers}"
        )
    for machine in profile.machines:
        bounds = machine.measured
        console.print(
            f"measured up to {bounds.prompt_tokens} prompt tokens, {bounds.num_decoding} sequences "
            f"and {bounds.context_tokens} tokens of context in a step"
        )
    for warning in profile.warnings:
        console.print(f"warning: {warning}")
    cluster = ",".join(f"{n}x{profile.name}:{role}" for role, n in profile.workers.items())
    console.print(f"written to {out}; use it as: pdserve sim --profile {out} --cluster {cluster}")


class _Bar:
    """A progress bar on stderr."""

    def __init__(self, *, shown: bool) -> None:
        self._progress = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                console=Console(file=sys.stderr),
                transient=True,
            )
            if shown and sys.stderr.isatty()
            else None
        )
        if self._progress is not None:
            self._task = self._progress.add_task("starting", total=1.0)

    def __enter__(self) -> _Bar:
        (self._progress or nullcontext()).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def at(self, text: str, share: float) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=share, description=text)
