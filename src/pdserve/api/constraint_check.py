"""Trying a constraint before a request with it is accepted.

What a client writes may be wrong, and it may take minutes and gigabytes to compile. So it is
compiled once in a process of its own (``text.structured.checker``) with a budget of CPU time and
memory, before any worker sees it. That process is started with the first constraint; those that
were found good are remembered.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from pdserve.api.gateway import ModelCard
from pdserve.core.errors import OverloadedError, RequestError, UnavailableError
from pdserve.core.request import Constraint
from pdserve.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

CPU_BUDGET_S = 1.0
MAX_CHARS = 256 * 1024
MAX_WAITING = 64
_REMEMBERED = 256
_RETRY_AFTER_S = 1.0


class ConstraintCheck:
    """Belongs to one event loop at a time; the process ends with this object."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        card: ModelCard,
        *,
        cpu_budget_s: float = CPU_BUDGET_S,
    ) -> None:
        self._tokenizer = tokenizer
        self._card = card
        self._cpu_budget_s = cpu_budget_s
        self._good: OrderedDict[Constraint, None] = OrderedDict()
        self._waiting = 0
        self._thread: ThreadPoolExecutor | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    async def __call__(self, constraint: Constraint, field: str) -> None:
        """Return if the constraint can be used.

        Raises `RequestError`, which names the request's ``field``, if it cannot; `OverloadedError`
        if too many others wait for the same.
        """
        if constraint in self._good:
            self._good.move_to_end(constraint)
            return
        if len(constraint.text) > MAX_CHARS:
            raise RequestError(
                f"{field} has {len(constraint.text)} characters; at most {MAX_CHARS} are served",
                field,
            )
        if not self._card.eos_token_ids:
            raise RequestError(
                f"{field} is not served: the model has no end-of-text token, so an answer of a "
                "given form could not end",
                field,
            )
        if self._waiting >= MAX_WAITING:
            raise OverloadedError(
                f"{MAX_WAITING} other requests wait for their {field} to be read", _RETRY_AFTER_S
            )
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "constraints")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            error = await loop.run_in_executor(self._thread, self._ask, constraint)
        finally:
            self._waiting -= 1
        if error is not None:
            raise RequestError(f"{field} cannot be used: {error}", field)
        self._good[constraint] = None
        if len(self._good) > _REMEMBERED:
            self._good.popitem(last=False)

    # --- on the thread ------------------------------------------------------------------------

    def _ask(self, constraint: Constraint) -> str | None:
        """What is wrong with the constraint."""
        from pdserve.text.structured.checker import Verdict, framed, read_message

        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(framed(msgspec.msgpack.encode(constraint)))
            process.stdin.flush()
            answer = read_message(process.stdout)
        except OSError:
            answer = None
        if answer is not None:
            return msgspec.msgpack.decode(answer, type=Verdict).error
        status = process.wait()
        self._end()
        self._process = None
        if status == -signal.SIGPROF:
            return f"it takes more than {self._cpu_budget_s:g} s to compile; make it simpler"
        if status < 0:
            return "it takes too much memory to compile; make it simpler"
        log.error("the process that reads constraints ended with status %d", status)
        raise UnavailableError("answers of a given form cannot be had now; see the server's log")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            from pdserve.text.structured.checker import Vocabulary, framed

            process = subprocess.Popen(
                [sys.executable, "-m", "pdserve.text.structured.checker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._process = process
            self._end = weakref.finalize(self, _end, process)
            card = self._card
            words = Vocabulary(
                self._tokenizer.to_json(), card.vocab_size, card.eos_token_ids, self._cpu_budget_s
            )
            assert process.stdin is not None
            process.stdin.write(framed(msgspec.msgpack.encode(words)))
        return self._process


def _end(process: subprocess.Popen[bytes]) -> None:
    """It has nothing to lose."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                log.debug("a constraint was on its way to a process that has ended")
