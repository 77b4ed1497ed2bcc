"""Libraries that speak OpenAI's API, unmodified. Run with `make test-clients`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.clients


def test_langchain(client_venv: Callable[..., Any], server: Any, tiny_model_path: Path) -> None:
    venv = client_venv("langchain", "langchain-openai")
    told = venv.script("langchain_chat", server.url, tiny_model_path.name)
    assert told["whole"] == told["streamed"] != ""
    assert told["usage"] == told["logprobs"] == 12
    assert len(told["batch"]) == 2


def test_litellm(client_venv: Callable[..., Any], server: Any, tiny_model_path: Path) -> None:
    venv = client_venv("litellm", "litellm")
    told = venv.script("litellm_chat", server.url, tiny_model_path.name)
    assert told["whole"] == told["streamed"] != ""
    assert told["usage"] == 12
    assert "maximum context length" in told["refused"]
