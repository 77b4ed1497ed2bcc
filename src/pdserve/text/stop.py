"""Stop strings that never leak, however the text is cut into pieces.

Text goes in as it is decoded and comes out as soon as it cannot be part of a stop string any more.
The match that ends first wins; of those that end at the same character, the longest, so that no
part of any stop string is ever emitted. Both rules look at characters and not at pieces, so the
result is the same for every chunking, and it is known at the earliest possible character.

Each stop string has a Knuth-Morris-Pratt automaton (SIAM J. Comput. 6(2), 1977): its state is the
number of its characters that the text now ends in, which is also how much must be held back.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.core.errors import RequestError


class StopStrings:
    """Watches the text of one choice. ``matched`` is the stop string that ended it, or None."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """``include``: emit the stop string itself too. Raises `RequestError` for an empty one."""
        if any(not stop for stop in stops):
            raise RequestError("a stop string must not be empty", param="stop")
        # Longest first: of several that end at one character, the first one found wins.
        self._stops = sorted(dict.fromkeys(stops), key=len, reverse=True)
        self._fallbacks = [_fallback_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str, *, armed: bool = True) -> str:
        """Take the next piece, give the text that is safe to emit; nothing after a match.

        While not ``armed`` (before ``min_tokens``) nothing matches, but a stop string may begin
        there and end later.
        """
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        start = len(self._held) - len(text)
        for end, character in enumerate(text, start + 1):
            stop = self._advance(character)
            if stop is not None and armed:
                self.matched = stop
                emitted = self._held[: end if self._include else end - len(stop)]
                self._held = ""
                return emitted
        keep_from = len(self._held) - max(self._states)
        emitted, self._held = self._held[:keep_from], self._held[keep_from:]
        return emitted

    def finish(self) -> str:
        """The choice ended otherwise: the text that was held back."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Move every automaton by one character; the longest stop string that ends here."""
        ended = None
        for index, stop in enumerate(self._stops):
            fallback = self._fallbacks[index]
            state = self._states[index]
            while state and stop[state] != character:
                state = fallback[state]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                ended = ended or stop
                state = fallback[state]
            self._states[index] = state
        return ended


def _fallback_table(stop: str) -> list[int]:
    """``table[n]``: length of the longest proper suffix of ``stop[:n]`` that is a prefix too."""
    table = [0, 0]
    state = 0
    for character in stop[1:]:
        while state and stop[state] != character:
            state = table[state]
        if stop[state] == character:
            state += 1
        table.append(state)
    return table
