"""Makes the laboratory importable as ``bitwise``; models, references and labs for its tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("bitwise")
sys.path.insert(0, str(Path(__file__).parent))

from bitwise import Lab, Reference, Shape  # noqa: E402

from pdserve.serve.runners import build_runner  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """The runners of these tests use one thread, and so does the test's own thread meanwhile."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_references(tiny_model_path: Path) -> Iterator[dict[str, Reference]]:
    """By dtype."""
    references = {
        dtype: Reference(build_runner(Shape("alone").start(tiny_model_path, dtype)))
        for dtype in ("fp32", "bf16")
    }
    yield references
    for reference in references.values():
        reference.close()


@pytest.fixture(scope="module")
def tiny_lab(
    request: pytest.FixtureRequest, tiny_model_path: Path, tiny_references: dict[str, Reference]
) -> Iterator[Lab]:
    """A cluster of the tiny model, of the (dtype, shape) that the test names; shared by a module.

    Nothing may leak from any test that it served.
    """
    dtype, shape = request.param
    lab = Lab(shape, shape.start(tiny_model_path, dtype), tiny_references[dtype])
    yield lab
    try:
        lab.assert_clean()
    finally:
        lab.close()
