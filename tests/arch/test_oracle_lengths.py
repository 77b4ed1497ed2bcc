"""Nobody knows how long an answer will be, but a policy that imitates one that does."""

from __future__ import annotations

from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "src" / "pdserve"
NAME = "oracle_output_tokens"
MAY_HOLD = {
    "core/request.py",  # where it is written
    "node/dispatch.py",  # who hands it to the policy
    "policy/cluster.py",
    "sim/clients.py",  # who sets it
}
MAY_READ = {"policy/splitwisesim.py"}


def test_oracle_lengths_are_read_by_one_policy_only():
    found = {
        str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.py") if NAME in path.read_text()
    }
    assert found == MAY_HOLD | MAY_READ
    for name in MAY_HOLD:  # they pass it on, and decide nothing by it
        lines = [line for line in (SOURCES / name).read_text().splitlines() if NAME in line]
        for line in lines:
            assert not line.lstrip().startswith(("if ", "while ", "return ", "elif ")), (name, line)
