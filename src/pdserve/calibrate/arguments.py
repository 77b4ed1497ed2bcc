"""The flags of ``pdserve calibrate``: its own, and those of ``serve`` that matter."""

from __future__ import annotations

import argparse
from pathlib import Path

from pdserve.config import EDGE_OPTIONS, OPTIONS
from pdserve.options import flag_of

SECONDS = 240.0
QUICK_SECONDS = 30.0
OWN_FLAGS = {
    *("host", "port", "api_key", "record", "log_format", "queue_timeout", "drain_timeout"),
    *("roles", "admission", "classes", "served_model_name", "allow_faults"),
    *EDGE_OPTIONS,
}
"""Flags of ``serve`` that a calibration sets itself, or that change nothing that it measures."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its own flags, and those of ``serve`` that matter."""
    own = parser.add_argument_group("the calibration")
    own.add_argument("--out", metavar="FILE", default="profile.json", help="default: profile.json")
    own.add_argument(
        "--name", default="calibrated", help="of the machine in --cluster (calibrated)"
    )
    own.add_argument(
        "--seconds", type=float, metavar="S", help=f"about how long to ask (default: {SECONDS:g})"
    )
    own.add_argument(
        "--quick", action="store_true", help=f"one round, about {QUICK_SECONDS:g} seconds"
    )
    own.add_argument("--seed", type=int, default=0, help="of lengths and prompts")
    own.add_argument("--recording", type=Path, metavar="DIR", help="keep the recordings there")
    own.add_argument("--json", action="store_true", help="print the profile and nothing else")
    served = parser.add_argument_group("the server, as serve has them")
    served.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with a [serve] table"
    )
    for name, option in OPTIONS.items():
        if name in OWN_FLAGS:
            continue
        default = "" if option.default is None else f" (default: {option.default})"
        served.add_argument(
            flag_of(name),
            metavar=name.rsplit("_", 1)[-1].upper(),
            help=option.metadata["help"].replace("%", "%%") + default,
        )
