"""What a user adds to the catalogue: a TOML file, and a model's folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pdserve.core.errors import ConfigError, why
from pdserve.cost.catalogue import CATALOGUE, Catalogue, parse_catalogue
from pdserve.cost.models import model_of_config


def read_catalogue(file: Path | None, model: str = "") -> Catalogue:
    """What is known by name, what ``file`` adds, and ``model`` if that is the folder of one with a
    ``config.json``. Raises `ConfigError` for a file that cannot be used."""
    known = CATALOGUE
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--catalogue: cannot read {file}: {why(error)}") from error
        known = parse_catalogue(text, str(file), known)
    path = Path(model).expanduser() / "config.json"
    if model and model not in known.models and path.is_file():
        numbers = model_of_config(_config(path), str(path))
        known = replace(known, models={**known.models, model: numbers})
    return known


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model: cannot read {path}: {why(error)}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--model: {path} holds no JSON object")
    return config
