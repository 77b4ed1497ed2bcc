"""Commands that wait for the router's answer. One event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from pdserve.core.commands import Answer, Command, Refused
from pdserve.core.errors import ConflictError, NotFoundError, UnavailableError


class Commands:
    """``feed`` gives the router its input; `answered` takes what comes back."""

    def __init__(self, feed: Callable[[Command], None]) -> None:
        self._feed = feed
        self._number = 0
        self._waiting: dict[int, asyncio.Future[str]] = {}

    async def ask(self, asked: Command) -> str:
        """As `Gateway.command`."""
        self._number += 1
        number = self._number
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._feed(replace(asked, command=number))
            return await answer
        finally:
            del self._waiting[number]

    def answered(self, answer: Answer) -> None:
        waiting = self._waiting.get(answer.command)
        if waiting is None or waiting.done():
            return  # nobody waits for it any more
        if answer.refused is None:
            waiting.set_result(answer.detail)
        elif answer.refused == Refused.UNKNOWN_WORKER:
            waiting.set_exception(
                NotFoundError(f"{answer.detail}; /cluster lists the workers", "worker")
            )
        else:
            waiting.set_exception(ConflictError(answer.detail))

    def fail_all(self, detail: str) -> None:
        """The router takes no more commands."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(UnavailableError(detail))
