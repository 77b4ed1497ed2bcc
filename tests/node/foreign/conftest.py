"""Makes the small cluster importable as ``foreign_cluster``, with pytest's rewritten asserts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("foreign_cluster")
sys.path.insert(0, str(Path(__file__).parent))
