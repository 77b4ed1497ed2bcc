"""The items of a response: messages and calls of tools, as they grow.

What a choice says goes in piece by piece; out come the events of OpenAI's reference ("Streaming
events" of Responses), by name and fields. Text and calls follow each other in the order in which
they are written: a call ends the message before it.

A call is told of while it is written if it cannot turn out to be none, which is so where the answer
is held to a form. Otherwise it is told of once it is complete: there is no event that takes a call
back. A call that is cut in its middle is ``incomplete``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from pdserve.api.openai.choice import LoggedToken, Piece
from pdserve.api.openai.logprobs import LogprobWriter
from pdserve.text.tools.stream import CallPart

Event = tuple[str, dict[str, Any]]
IN_PROGRESS, COMPLETED, INCOMPLETE = "in_progress", "completed", "incomplete"


class _Item(ABC):
    """One item. ``place`` is its index in the output."""

    def __init__(self, item_id: str, place: int) -> None:
        self.place = {"item_id": item_id, "output_index": place}
        self.status = IN_PROGRESS

    @abstractmethod
    def document(self) -> dict[str, Any]:
        """As it stands in the response."""

    @abstractmethod
    def ending(self) -> list[Event]:
        """Events that come before the item is done."""

    def added(self) -> Event:
        return self._event("response.output_item.added")

    def done(self, status: str) -> list[Event]:
        self.status = status
        return [*self.ending(), self._event("response.output_item.done")]

    def _event(self, name: str) -> Event:
        return name, {"output_index": self.place["output_index"], "item": self.document()}


class Message(_Item):
    """A message with one text."""

    def __init__(self, item_id: str, place: int, *, has_logprobs: bool) -> None:
        super().__init__(item_id, place)
        self.text = ""
        self._logprobs: list[dict[str, Any]] | None = [] if has_logprobs else None

    def document(self) -> dict[str, Any]:
        return {
            "id": self.place["item_id"],
            "type": "message",
            "role": "assistant",
            "status": self.status,
            "content": [] if self.status == IN_PROGRESS else [self._part()],
        }

    def begin(self) -> list[Event]:
        return [self.added(), self._of_text("response.content_part.added", part=self._part())]

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> list[Event]:
        self.text += text
        if self._logprobs is not None:
            self._logprobs += logprobs
        return [self._of_text("response.output_text.delta", delta=text, logprobs=logprobs)]

    def ending(self) -> list[Event]:
        logprobs = list(self._logprobs or ())
        return [
            self._of_text("response.output_text.done", text=self.text, logprobs=logprobs),
            self._of_text("response.content_part.done", part=self._part()),
        ]

    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = {"type": "output_text", "text": self.text, "annotations": []}
        return part if self._logprobs is None else {**part, "logprobs": list(self._logprobs)}

    def _of_text(self, name: str, **fields: Any) -> Event:
        return name, {**self.place, "content_index": 0, **fields}


class Call(_Item):
    """A call of a tool."""

    def __init__(self, item_id: str, place: int, part: CallPart) -> None:
        super().__init__(item_id, place)
        self._call_id = part.call_id
        self._name = part.name
        self._arguments = ""

    def document(self) -> dict[str, Any]:
        return {
            "id": self.place["item_id"],
            "type": "function_call",
            "call_id": self._call_id,
            "name": self._name,
            "arguments": self._arguments,
            "status": self.status,
        }

    def add(self, arguments: str) -> list[Event]:
        self._arguments += arguments
        name = "response.function_call_arguments.delta"
        return [(name, {**self.place, "delta": arguments})] if arguments else []

    def ending(self) -> list[Event]:
        told = {"name": self._name, "arguments": self._arguments}
        return [("response.function_call_arguments.done", {**self.place, **told})]


class Items:
    """All items of one response. ``response_id`` is the stem of their ids."""

    def __init__(
        self,
        response_id: str,
        writer: LogprobWriter | None,
        *,
        may_call: bool,
        calls_are_certain: bool,
    ) -> None:
        """``writer``: of log-probabilities, if they are wanted. ``may_call``: calls are looked for.
        ``calls_are_certain``: what begins as a call is one."""
        self._stem = response_id.partition("-")[2]
        self._writer = writer
        self._may_call = may_call
        self._is_certain = calls_are_certain
        self._items: list[_Item] = []
        self._message: Message | None = None
        self._call: Call | None = None
        self._held: CallPart | None = None
        self._logged: list[LoggedToken] = []

    def begin(self) -> list[Event]:
        """Where no calls are looked for, the message is there from the start."""
        return [] if self._may_call else self._open_message()

    def take(self, piece: Piece) -> list[Event]:
        """What the next piece brings."""
        self._logged += piece.logged
        # The text of a call that was told of and then cut is not said again.
        is_cut = self._call is not None and any(part.is_broken for part in piece.calls)
        events = [] if is_cut else self._say(piece.text)
        for part in piece.calls:
            events += self._tell(part)
        return events

    def end(self, status: str) -> list[Event]:
        """The answer is over. There is at least one item then."""
        events = [] if self._items else self._open_message()
        return events + self._close_call(INCOMPLETE) + self._close_message(status)

    def output(self) -> list[dict[str, Any]]:
        return [item.document() for item in self._items]

    # --- inside -------------------------------------------------------------------------------

    def _say(self, text: str) -> list[Event]:
        has_news = bool(text) or (self._message is not None and bool(self._logged))
        if not has_news:
            return []
        events = self._open_message()
        logprobs = self._writer.chat(self._logged)["content"] if self._writer is not None else []
        self._logged = []
        assert self._message is not None
        return events + self._message.add(text, logprobs)

    def _tell(self, part: CallPart) -> list[Event]:
        if part.is_broken:
            self._held = None
            return self._close_call(INCOMPLETE)
        self._logged = []
        if not self._is_certain:
            if part.call_id is not None:
                self._held = CallPart(part.index, part.call_id, part.name)
            assert self._held is not None
            self._held.arguments += part.arguments
            if not part.is_complete:
                return []
            self._held.is_complete, part = True, self._held
        events: list[Event] = []
        if part.call_id is not None:
            events += self._close_message(COMPLETED)
            self._call = Call(self._new_id("fc"), len(self._items), part)
            self._items.append(self._call)
            events.append(self._call.added())
        assert self._call is not None
        events += self._call.add(part.arguments)
        return events + (self._close_call(COMPLETED) if part.is_complete else [])

    def _open_message(self) -> list[Event]:
        if self._message is not None:
            return []
        has_logprobs = self._writer is not None
        message = Message(self._new_id("msg"), len(self._items), has_logprobs=has_logprobs)
        self._items.append(message)
        self._message = message
        return message.begin()

    def _close_message(self, status: str) -> list[Event]:
        message, self._message = self._message, None
        return [] if message is None else message.done(status)

    def _close_call(self, status: str) -> list[Event]:
        call, self._call = self._call, None
        return [] if call is None else call.done(status)

    def _new_id(self, kind: str) -> str:
        number = len(self._items)
        return f"{kind}-{self._stem}" + (f"-{number}" if number else "")
