"""What a model folder is, in one line that two hosts can compare."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pdserve.core.errors import ModelError
from pdserve.weights.folder import ModelFolder


def served_digest(path: Path | str) -> str:
    """Names the weights in the folder; without weights, which only engines that compute nothing do
    without, its configuration. Reads all of the files when it is first asked. Raises `ModelError`.
    """
    config = Path(path) / "config.json"
    try:
        folder = ModelFolder.open(path)
    except ModelError:
        try:
            return "config-" + hashlib.sha256(config.read_bytes()).hexdigest()[:32]
        except OSError:
            pass
        raise
    return folder.weights_digest()
