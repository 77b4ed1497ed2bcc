"""How a family of models writes a call of a tool: the seam, as a value.

A call is a JSON object with the tool's name and its arguments. It stands between an opener and a
closer, or where the answer begins.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSyntax:
    """``opener`` may stand anywhere in the answer; a call follows it. ``closer`` may follow the
    call; empty: there is none. ``bare``: a call may also begin the answer, or follow another call,
    without an opener. ``separators`` are characters between two calls, white space apart.

    ``before``, ``between`` and ``after`` are what is written around calls when calls are all that
    may be written, the opener and the closer included; ``arguments_key`` names the arguments then.
    A reader takes any of `ARGUMENTS_KEYS`.
    """

    name: str
    opener: str
    closer: str = ""
    bare: bool = False
    separators: str = ""
    before: str
    between: str
    after: str
    arguments_key: str

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that the client must not see, and the reader must, even if they are tokens that
        are left out of answers."""
        return tuple(filter(None, (self.opener, self.closer)))


NAME_KEY = "name"
ARGUMENTS_KEYS = ("arguments", "parameters")
HARMLESS_KEYS = ("type", "id")
"""Members of a call that some models write and nobody needs."""
