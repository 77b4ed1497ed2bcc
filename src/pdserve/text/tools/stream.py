"""Finding calls in an answer while it is being written.

Text goes in as it is decoded, in pieces of any length, and comes out as content or as calls. A call
is told in parts: that it has begun, with its tool, and then the text of its arguments as it comes.
What is decided is decided by characters, so the pieces do not matter.

What looks like a call and is none (no JSON, a tool that was not offered, an end in its middle) is
content, with all its markers. If that shows only after the call was told of, the call is told to
be broken, and all its text follows as content.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from pdserve.text.tools.call import CallReader
from pdserve.text.tools.syntax import ToolSyntax

_SPACE = " \t\r\n"


@dataclass(slots=True)
class CallPart:
    """News of call ``index`` of an answer. ``call_id`` and ``name`` come with the first part.

    ``is_complete``: this was the last of it. ``is_broken``: what was told of this call is to be
    forgotten.
    """

    index: int
    call_id: str | None = None
    name: str | None = None
    arguments: str = ""
    is_complete: bool = False
    is_broken: bool = False


@dataclass(slots=True)
class News:
    """What a piece of text has brought."""

    content: str = ""
    parts: list[CallPart] = field(default_factory=list)


def whole_calls(parts: Sequence[CallPart]) -> list[CallPart]:
    """The calls of an answer, from all that was told of them."""
    calls: dict[int, CallPart] = {}
    for part in parts:
        if part.is_broken:
            calls.pop(part.index, None)
        elif part.call_id is not None:
            calls[part.index] = replace(part)
        else:
            calls[part.index].arguments += part.arguments
            calls[part.index].is_complete = part.is_complete
    return list(calls.values())


def new_call_id() -> str:
    """A name for a call that nobody else has."""
    return f"call_{secrets.token_hex(12)}"


class CallStream:
    """The calls of one answer. With ``only_one``, what follows the first is not looked at."""

    def __init__(
        self,
        syntax: ToolSyntax,
        tools: Collection[str],
        *,
        only_one: bool = False,
        make_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._syntax = syntax
        self._tools = frozenset(tools)
        self._only_one = only_one
        self._make_id = make_id
        self._held = ""
        self._lead = ""
        self._call: CallReader | None = None
        self._follows_call = False
        self._is_closed = False
        self._has_content = False
        self._num_told = 0
        self._is_told = False
        self.num_complete = 0

    def feed(self, text: str) -> News:
        """Take the next piece."""
        news = News()
        for character in text:
            self._take(character, news)
        self._tell_arguments(news)
        return news

    def finish(self) -> News:
        """The answer is over: what was held back."""
        news = News()
        if self._call is not None:
            self._break(news)
        blank = _SPACE + self._syntax.separators
        if not (self._follows_call and not self._held.strip(blank)):
            self._say(self._held, news)
        self._held = ""
        return news

    # --- one character ------------------------------------------------------------------------

    def _take(self, character: str, news: News) -> None:
        if self._call is None:
            self._held += character
            self._look(news)
            return
        call = self._call
        if not call.has_text and character in _SPACE:
            self._lead += character
        elif not call.feed(character):
            self._break(news)
            self._take(character, news)
        elif call.is_complete:
            self._tell_arguments(news)
            self._tell_complete(news)
            self._call, self._lead = None, ""
            self._follows_call, self._is_closed = True, not self._syntax.closer
            self.num_complete += 1
        else:
            self._tell_begin(news)

    def _look(self, news: News) -> None:
        """What of the text held is content, and whether a call begins at its end."""
        syntax = self._syntax
        if self._only_one and self.num_complete:
            # Of one that asked for a single call: the rest is neither content nor a call.
            self._held = ""
            return
        if self._follows_call:
            rest = self._held.lstrip(_SPACE + syntax.separators)
            if not rest:
                return
            if not self._is_closed and syntax.closer.startswith(rest):
                if rest == syntax.closer:
                    self._held, self._is_closed = "", True
                return
        if syntax.bare and not self._has_content and self._held.strip(self._blank) == "{":
            self._open(self._held[:-1])
            self._take("{", news)
            return
        if self._held.endswith(syntax.opener):
            before = self._held[: -len(syntax.opener)]
            text = before.rstrip(self._blank if self._follows_call else _SPACE)
            self._say(text, news)
            self._open(before[len(text) :] + syntax.opener)
            return
        kept = self._num_kept()
        if kept < len(self._held):
            self._say(self._held[: len(self._held) - kept], news)
            self._held = self._held[len(self._held) - kept :]

    @property
    def _blank(self) -> str:
        return _SPACE + (self._syntax.separators if self._follows_call else "")

    def _num_kept(self) -> int:
        """Length of the end of the text held that may still belong to a call."""
        held, opener = self._held, self._syntax.opener
        begun = next(
            (
                n
                for n in range(min(len(held), len(opener) - 1), 0, -1)
                if opener.startswith(held[-n:])
            ),
            0,
        )
        before = held[: len(held) - begun]
        return len(held) - len(before.rstrip(_SPACE))

    # --- the call -----------------------------------------------------------------------------

    def _open(self, lead: str) -> None:
        self._call, self._lead, self._held = CallReader(self._tools), lead, ""
        self._is_told = False

    def _tell_begin(self, news: News) -> None:
        call = self._call
        if call is not None and call.has_begun and not self._is_told:
            self._is_told = True
            news.parts.append(CallPart(self._num_told, self._make_id(), call.name))
            self._num_told += 1

    def _tell_arguments(self, news: News) -> None:
        self._tell_begin(news)
        call = self._call
        if call is None or not self._is_told:
            return
        arguments = call.take_arguments()
        if not arguments:
            return
        if news.parts and news.parts[-1].index == self._num_told - 1:
            news.parts[-1].arguments += arguments
        else:
            news.parts.append(CallPart(self._num_told - 1, arguments=arguments))

    def _tell_complete(self, news: News) -> None:
        if not (news.parts and news.parts[-1].index == self._num_told - 1):
            news.parts.append(CallPart(self._num_told - 1))
        news.parts[-1].is_complete = True

    def _break(self, news: News) -> None:
        """It was no call: all its text is content."""
        call = self._call
        assert call is not None
        self._call = None
        if self._is_told:
            news.parts.append(CallPart(self._num_told - 1, is_broken=True))
        self._say(self._lead + call.text, news)
        self._lead = ""

    def _say(self, text: str, news: News) -> None:
        if text:
            news.content += text
            self._has_content = True
            self._follows_call = False
