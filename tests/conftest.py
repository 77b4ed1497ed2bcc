"""Models that tests of several parts share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from pdserve.weights.pull import resolve
from pdserve.weights.random_model import write_random_model

# An example may take as long as a busy machine lets it; pytest's own timeout bounds a test. The
# examples are the same in every run: what fails, fails again.
settings.register_profile("busy", deadline=None, derandomize=True)
settings.load_profile("busy")


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


@pytest.fixture(scope="session")
def user_data() -> Path | None:
    """A folder with the user's copies of published traces and measurements, which are not ours to
    ship: ``PDSERVE_DATA``, or ``../shared/data`` beside the checkout. None: there is none."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PDSERVE_DATA", beside))
    return folder if folder.is_dir() else None
