"""The parser of the command line: what was typed wrong is told in a sentence, not in a page.

argparse prints all flags of the command before it says which of them is wrong, and leaves flags
that nobody knows to the program instead of the command that got them. Here both are a
`ConfigError`, as any other mistake of the user's.
"""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from pdserve.core.errors import ConfigError, meant


class CommandParser(argparse.ArgumentParser):
    """Of the whole command line, and so of each command (argparse makes those of the same
    class)."""

    def error(self, message: str) -> NoReturn:
        mark = "" if message.endswith("?") else ";"
        raise ConfigError(f"{message}{mark} see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Knows all of them: a stranger is an error of the command that it was typed for."""
        parsed, strangers = super().parse_known_args(args, namespace)
        if strangers:
            known = [flag for action in self._actions for flag in action.option_strings]
            hint = meant(strangers[0].partition("=")[0], known)
            self.error(f"unknown: {' '.join(strangers)}{hint}")
        return parsed, strangers
