"""One call of a tool, as it is being written."""

from __future__ import annotations

import json
from collections.abc import Collection

from pdserve.text.tools.json_object import JsonObject
from pdserve.text.tools.syntax import ARGUMENTS_KEYS, HARMLESS_KEYS, NAME_KEY

_KEYS = frozenset((NAME_KEY, *ARGUMENTS_KEYS, *HARMLESS_KEYS))
_NO_ARGUMENTS = "{}"


class CallReader:
    """Reads the JSON object of a call of one of ``tools``.

    ``name`` is known once it is read; from then on `take_arguments` gives the text of the arguments
    as it comes. ``is_complete``: the object is closed and is a call.
    """

    def __init__(self, tools: Collection[str]) -> None:
        self._tools = tools
        self._object = JsonObject()
        self._key: str | None = None
        self._num_taken = 0
        self.name: str | None = None
        self.is_complete = False

    @property
    def text(self) -> str:
        """All that has been read."""
        return self._object.text()

    @property
    def has_text(self) -> bool:
        """True once its opening brace is read."""
        return self._object.length > 0

    def feed(self, character: str) -> bool:
        """Take one character; False, and it is not taken, if this is no call of these tools."""
        found = self._object
        if not found.feed(character):
            return False
        if not self._reads_on() or (found.is_complete and self.name is None):
            found.take_back()
            return False
        self.is_complete = found.is_complete
        return True

    def take_arguments(self) -> str:
        """The part of the arguments' text that has not been taken yet."""
        span = self._arguments()
        if span is None:
            news = _NO_ARGUMENTS if self.is_complete and not self._num_taken else ""
        else:
            news = self._object.text(span[0] + self._num_taken, span[1])
        self._num_taken += len(news)
        return news

    @property
    def has_begun(self) -> bool:
        """True once the call cannot turn out to be something else than a call of its tool, unless
        its JSON breaks."""
        return self.name is not None and (self.is_complete or self._arguments() is not None)

    def _arguments(self) -> tuple[int, int | None] | None:
        members = self._object.members
        return next((members[key] for key in ARGUMENTS_KEYS if key in members), None)

    def _reads_on(self) -> bool:
        """Look at a member that has begun or ended with the last character."""
        members = self._object.members
        if len(members) > len(_KEYS) or not members.keys() <= _KEYS:
            return False
        if sum(key in members for key in ARGUMENTS_KEYS) > 1:
            return False
        span = self._arguments()
        if span is not None and self._object.text(span[0], span[0] + 1) != "{":
            return False
        if self.name is None and NAME_KEY in members:
            start, end = members[NAME_KEY]
            if end is not None:
                name = json.loads(self._object.text(start, end))
                if name not in self._tools or not isinstance(name, str):
                    return False
                self.name = name
        return True
