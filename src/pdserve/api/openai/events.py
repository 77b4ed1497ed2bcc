"""Server-sent events (WHATWG HTML, section 9.2) whose data is JSON."""

from __future__ import annotations

from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"
"""How OpenAI's streams of choices end."""


def event(document: dict[str, Any], name: str | None = None) -> bytes:
    """One event, of this type if it has a name."""
    data = msgspec.json.encode(document)
    if not data.isascii():
        data = _escape_line_ends(data)
    if name is None:
        return b"data: %b\n\n" % data
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


def _escape_line_ends(data: bytes) -> bytes:
    """Escape what only Unicode takes for a line end: some clients split events there.

    They can only stand inside JSON strings, where an escape means the same.
    """
    return (
        data.replace(b"\xc2\x85", b"\\u0085")
        .replace(b"\xe2\x80\xa8", b"\\u2028")
        .replace(b"\xe2\x80\xa9", b"\\u2029")
    )
