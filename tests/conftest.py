"""Models that tests of several parts share."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdserve.weights.pull import resolve
from pdserve.weights.random_model import write_random_model


@pytest.fixture(scope="session")
def smollm_path() -> Path:
    """The real model, pulled into the user's cache once. Mark tests that use it with `model`."""
    return resolve("smollm2-135m", progress=False)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama model in fp32 with a complete byte-level tokenizer. Do not change it."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_random_model(path, seed=0)
    return path
