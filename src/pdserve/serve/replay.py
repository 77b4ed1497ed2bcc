"""``pdserve replay``: does every machine of a recording still say the same?

Each file holds one machine process. The machine is made again from the settings in the file's first
record, hears the same inputs at the same ``now``, and each answer is compared with the recorded one
byte by byte. The first difference ends the replay of that file: after it the two are different
machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdserve.core.errors import ConfigError
from pdserve.node.foreign import ForeignWorkerNode
from pdserve.node.router import RouterNode
from pdserve.node.worker import WorkerNode
from pdserve.policy.registry import make_batching, make_policy
from pdserve.serve.driver import Machine
from pdserve.serve.recorder import SUFFIX, Birth, Heard, read
from pdserve.transport.records import decode_record, encode_record


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Replay of one file. ``difference`` is None if every answer was the same."""

    file: str
    node: str
    num_inputs: int
    difference: str | None


def replay(folder: Path) -> list[Outcome]:
    """Replay each recording in the folder. Raises `ConfigError` if there is none."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        raise ConfigError(f"{folder} holds no recording (*{SUFFIX}); make one with --record")
    return [replay_file(file) for file in files]


def replay_file(file: Path) -> Outcome:
    """Replay one machine process."""
    birth, inputs = read(file)
    machine = _born(birth, file)
    num_inputs = 0
    difference = None
    for heard in inputs:
        num_inputs += 1
        difference = _difference(machine, heard)
        if difference is not None:
            difference = f"input {num_inputs} at {heard.now:.6f}: {difference}"
            break
    return Outcome(file=file.name, node=birth.node, num_inputs=num_inputs, difference=difference)


def _born(birth: Birth, file: Path) -> Machine:
    try:
        if birth.worker is not None and birth.worker.foreign is not None:
            return ForeignWorkerNode(birth.worker)
        if birth.worker is not None:
            return WorkerNode(birth.worker, make_batching(birth.policy))
        if birth.router is not None:
            return RouterNode(birth.router, make_policy(birth.policy))
    except ConfigError as error:
        raise ConfigError(
            f"{file} was recorded with policy {birth.policy}, which this build does not have: "
            f"{error}"
        ) from None
    raise ConfigError(f"{file} says neither what worker nor what router it is")


def _difference(machine: Machine, heard: Heard) -> str | None:
    """Let the machine hear the input; say how its answer differs, or None."""
    if heard.effects is None:
        return None  # the process ended over it, so there is no answer to compare
    now_said = [encode_record(effect) for effect in machine.handle(heard.event, heard.now)]
    for number, (was, is_now) in enumerate(zip(heard.effects, now_said, strict=False), 1):
        if was != is_now:
            return (
                f"{heard.event}\n  effect {number} was    {decode_record(was)}"
                f"\n  effect {number} is now {decode_record(is_now)}"
            )
    if len(heard.effects) != len(now_said):
        extra = heard.effects if len(heard.effects) > len(now_said) else now_said
        which = "missing now" if extra is heard.effects else "new"
        first = decode_record(extra[min(len(heard.effects), len(now_said))])
        return (
            f"{heard.event}\n  {len(heard.effects)} effects were recorded and there are "
            f"{len(now_said)} now; {which}: {first}"
        )
    return None
