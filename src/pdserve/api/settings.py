"""Limits and keys of the HTTP edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pdserve.core.request import DEFAULT_SERVICE, ServiceClass


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """What the edge accepts. A request beyond a limit is refused with the limit in the message.

    ``max_choices`` bounds the choices of one HTTP request: ``n`` times the number of its prompts.
    ``max_logprobs`` bounds ``logprobs`` and ``top_logprobs``. ``default_max_tokens`` is what a
    completion without ``max_tokens`` gets (a chat gets the rest of the context).
    ``num_remembered_ids`` bounds the names by which timelines can be asked for. ``classes`` are the
    classes of service by name, ``default`` among them; ``class_of_key`` names the class to which a
    key is bound. ``salt_per_key``: no key's requests find cached prefixes of another's.
    ``read_timeout_s`` bounds the time that a body takes to come, ``request_timeout_s`` the time of
    a whole answer. Web pages of ``cors_origins`` may call the API. ``tool_call_parser`` names the
    syntax in which the model calls tools; None: its chat template says.
    """

    api_key: str | None = field(default=None, repr=False)
    api_keys_file: Path | None = None
    salt_per_key: bool = True
    read_timeout_s: float = 30.0
    request_timeout_s: float | None = None
    cors_origins: tuple[str, ...] = ()
    classes: Mapping[str, ServiceClass] = field(
        default_factory=lambda: {DEFAULT_SERVICE.name: DEFAULT_SERVICE}
    )
    class_of_key: Mapping[str, str] = field(default_factory=dict, repr=False)
    max_body_bytes: int = 16 * 2**20
    max_choices: int = 1024
    max_logprobs: int = 20
    max_stops: int = 64
    max_stop_chars: int = 1024
    default_max_tokens: int = 16
    num_remembered_ids: int = 16384
    tool_call_parser: str | None = None
