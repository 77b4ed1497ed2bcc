"""Model runners by name, imported when asked for.

torch takes seconds to import and a gateway never needs it; so the table holds strings.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pdserve.core.errors import ConfigError
from pdserve.engine.base import ModelRunner

RUNNERS = {
    "torch": "pdserve.engine.torch.runner:TorchRunner",
    "fake": "pdserve.engine.fake:FakeRunner",
    "modelled": "pdserve.engine.modelled:ModelledRunner",
}
"""Name -> ``module:class``. The class says which arguments it takes."""


def create_runner(name: str, *args: Any, **options: Any) -> ModelRunner:
    """Make the runner called ``name`` with its own arguments.

    Raises `ConfigError` for a name that is not in `RUNNERS`, and whatever the class raises.
    """
    try:
        module, attribute = RUNNERS[name].split(":")
    except KeyError:
        known = ", ".join(sorted(RUNNERS))
        raise ConfigError(f"engine {name!r} is unknown: choose one of {known}") from None
    runner: ModelRunner = getattr(import_module(module), attribute)(*args, **options)
    return runner
