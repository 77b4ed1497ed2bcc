"""Work that stops the moment its client goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Run ``work`` to its end, or cancel it when the client goes. True if it came to its end.

    The request's body must have been read: all that ``receive`` can still say is that the client is
    gone. When this returns, ``work`` has ended and cleaned up after itself, however that came
    about; its errors are raised here.
    """
    watch = _Watch(receive)
    watching = asyncio.create_task(watch.until_gone())
    try:
        await work
    except asyncio.CancelledError:
        if watch.has_cancelled and watch.task.uncancel() == 0:
            return False
        raise  # somebody else wants the calling task to end
    finally:
        watching.cancel()
    return True


class _Watch:
    """Cancels the task that made it, once, when the client has gone. It is cancelled itself before
    that task does anything else, so that what it cancels is the work and nothing after it."""

    def __init__(self, receive: Receive) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.has_cancelled = False
        self._receive = receive

    async def until_gone(self) -> None:
        # A connection that cannot be read is as good as gone.
        with contextlib.suppress(Exception):
            while (await self._receive())["type"] != "http.disconnect":
                pass
        self.has_cancelled = True
        self.task.cancel()
