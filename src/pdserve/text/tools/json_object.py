"""A JSON object that comes character by character (RFC 8259).

`JsonObject` says of every character whether an object can go on with it, and where the values of
its own members begin and end; what is inside of those it checks and forgets. Whoever passes on a
part of the text while the rest is not there yet knows that this part is right.
"""

from __future__ import annotations

import json
import re

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBER_CHARACTERS = frozenset("+-.eE0123456789")
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_SPACE = frozenset(" \t\n\r")
_ESCAPES = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")
_MAX_DEPTH = 128


class JsonObject:
    """``members`` maps each key to the span of its value, the end of which is None while it is
    open; a key that comes twice is an error. ``is_complete`` once the object is closed."""

    def __init__(self) -> None:
        self._characters: list[str] = []
        self.members: dict[str, tuple[int, int | None]] = {}
        self.is_complete = False
        self._open: list[str] = []
        self._expects = self._begin
        self._scalar_start = 0
        self._literal = ""
        self._num_hex = 0
        self._key: str | None = None
        self._in_key = False

    def feed(self, character: str) -> bool:
        """Take one character; False, and nothing is taken, if the object cannot go on with it."""
        if self.is_complete or not self._expects(character):
            return False
        self._characters.append(character)
        return True

    def take_back(self) -> None:
        """Do as if the last character had not been fed. Nothing may be fed after that."""
        self._characters.pop()

    @property
    def length(self) -> int:
        """Characters taken."""
        return len(self._characters)

    def text(self, start: int = 0, end: int | None = None) -> str:
        """The characters taken, or a part of them."""
        return "".join(self._characters[start:end])

    # --- what may come ------------------------------------------------------------------------

    def _begin(self, c: str) -> bool:
        if c != "{":
            return False
        self._open.append(c)
        self._expects = self._first_key
        return True

    def _first_key(self, c: str) -> bool:
        return self._close(c) if c == "}" else self._next_key(c)

    def _next_key(self, c: str) -> bool:
        if c == '"':
            self._in_key = True
            self._begin_string()
            return True
        return c in _SPACE

    def _colon(self, c: str) -> bool:
        if c == ":":
            self._expects = self._value
            return True
        return c in _SPACE

    def _first_item(self, c: str) -> bool:
        return self._close(c) if c == "]" else self._value(c)

    def _value(self, c: str) -> bool:
        if c in _SPACE:
            return True
        if len(self._open) == 1:
            assert self._key is not None
            if self._key in self.members:
                return False
            self.members[self._key] = (self.length, None)
        if c in "{[":
            self._open.append(c)
            self._expects = self._first_key if c == "{" else self._first_item
            return len(self._open) <= _MAX_DEPTH
        if c == '"':
            self._begin_string()
        elif c in _LITERALS:
            self._literal = _LITERALS[c][1:]
            self._expects = self._in_literal
        elif c == "-" or "0" <= c <= "9":
            self._scalar_start = self.length
            self._expects = self._in_number
        else:
            return False
        return True

    def _after_value(self, c: str) -> bool:
        if c == ",":
            self._expects = self._next_key if self._open[-1] == "{" else self._value
            return True
        if c in "}]":
            return self._close(c)
        return c in _SPACE

    # --- inside of scalars --------------------------------------------------------------------

    def _begin_string(self) -> None:
        self._scalar_start = self.length
        self._expects = self._in_string

    def _in_string(self, c: str) -> bool:
        if c == '"':
            if self._in_key:
                self._in_key = False
                if len(self._open) == 1:
                    self._key = json.loads(self.text(self._scalar_start) + c)
                self._expects = self._colon
            else:
                self._end_value(self.length + 1)
            return True
        if c == "\\":
            self._expects = self._in_escape
            return True
        return c >= " "

    def _in_escape(self, c: str) -> bool:
        if c == "u":
            self._num_hex = 0
            self._expects = self._in_code
            return True
        self._expects = self._in_string
        return c in _ESCAPES

    def _in_code(self, c: str) -> bool:
        self._num_hex += 1
        if self._num_hex == 4:
            self._expects = self._in_string
        return c in _HEX

    def _in_literal(self, c: str) -> bool:
        if c != self._literal[0]:
            return False
        self._literal = self._literal[1:]
        if not self._literal:
            self._end_value(self.length + 1)
        return True

    def _in_number(self, c: str) -> bool:
        if c in _NUMBER_CHARACTERS:
            return True
        if _NUMBER.fullmatch(self.text(self._scalar_start)) is None:
            return False
        self._end_value(self.length)
        return self._after_value(c)

    # --- ends ---------------------------------------------------------------------------------

    def _end_value(self, end: int) -> None:
        if len(self._open) == 1 and self._key is not None:
            self.members[self._key] = (self.members[self._key][0], end)
        self._expects = self._after_value

    def _close(self, c: str) -> bool:
        if self._open[-1] != ("{" if c == "}" else "["):
            return False
        self._open.pop()
        if self._open:
            self._end_value(self.length + 1)
        else:
            self.is_complete = True
        return True
