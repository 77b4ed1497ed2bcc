"""Where reports are printed: on a terminal as wide as that, anywhere else as wide as they are."""

from __future__ import annotations

import os
import sys

from rich.console import Console

UNBROKEN = 100_000
"""Columns: no line of a report is as long."""


def page() -> Console:
    """On stdout. In a file or a pipe a sentence is one line, for ``grep``, and a table has all its
    columns; ``COLUMNS`` says otherwise."""
    is_narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if is_narrow else UNBROKEN)
