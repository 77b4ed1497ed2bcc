"""Work that stops the moment its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Run ``work`` to its end, or cancel it when the client goes. True if it came to its end.

    The request's body must have been read: all that ``receive`` can still say is that the client is
    gone. When this returns, ``work`` has ended and cleaned up after itself, however that came
    about; its errors are raised here.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        working.cancel()  # has no effect on a task that is done
        await asyncio.gather(working, watching, return_exceptions=True)
    if working.cancelled():
        return False
    working.result()
    return True


async def _until_gone(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
