"""The flags of ``pdserve worker --join``, and what they mean on this host.

What must be the same everywhere (block size, precision, engine, policies) is the server's word and
no flag here. What only this host knows is here: which model files, which device, how much memory.
"""

from __future__ import annotations

import argparse
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pdserve.core.errors import ConfigError
from pdserve.core.ids import WorkerId
from pdserve.core.request import Role
from pdserve.options import parse_size
from pdserve.serve.cluster_secret import require_secret
from pdserve.transport.addresses import check_reachable, split_host_port, tcp_address
from pdserve.transport.tls import TlsFiles, tls_files
from pdserve.weights.pull import resolve as resolve_model

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinConfig:
    """What a host brings. ``gateway`` is an address; ``listen`` is (host, port) for peers, None:
    the address from which this host reaches the server, and free ports. ``threads`` 0: all cores.
    """

    gateway: str
    secret: bytes = field(repr=False)
    worker: WorkerId
    role: Role
    model_path: Path
    device: str
    threads: int
    kv_blocks: int | None
    kv_memory: int | None
    listen: tuple[str, int] | None
    tls: TlsFiles | None
    drain_timeout_s: float
    log_format: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags. The secret comes from a file or the environment only."""
    texts: dict[str, str] = {
        "--cluster-secret-file": "the secret of the cluster (or set PDSERVE_CLUSTER_SECRET)",
        "--cluster-tls-cert": "PEM: this host's certificate, for TLS",
        "--cluster-tls-key": "PEM: its key",
        "--cluster-tls-ca": "PEM: the authority of the cluster's hosts",
    }
    add = parser.add_argument
    add("--join", metavar="HOST:PORT", help="what the server has as --listen-workers")
    add("--role", choices=[role.value for role in Role], default="mixed", help="default: mixed")
    add("--id", help="name in the cluster; the same after a restart (default: ROLE-HOSTNAME)")
    add("--model", default="smollm2-135m", help="as for serve; the weights must be the server's")
    add("--device", default="cpu", help="device as torch names it (default: cpu)")
    add("--threads", type=int, default=0, help="CPU threads (default: all cores)")
    add("--kv-blocks", type=int, metavar="BLOCKS", help="KV blocks")
    add("--kv-memory", metavar="MEMORY", help="KV pool, such as 512MiB (default: up to 1GiB)")
    add(
        "--listen",
        metavar="HOST:PORT",
        help="where other workers find this one: PORT for messages, PORT + 1 for KV (default: the "
        "address towards the server, free ports)",
    )
    for flag, text in texts.items():
        add(flag, metavar="FILE", help=text)
    add(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="what running requests get on SIGTERM (default: 30)",
    )
    add("--log-format", choices=("text", "json"), default="text", help="default: text")


def resolve_join(parsed: argparse.Namespace, environment: Mapping[str, str]) -> JoinConfig:
    """Check the flags and find the model. Raises `ConfigError` or `ModelError`."""
    if parsed.join is None:
        raise ConfigError(
            "pdserve worker needs --join HOST:PORT, which the server has as --listen-workers; "
            "workers of the server's own host are started by pdserve serve"
        )
    gateway = tcp_address(*split_host_port(parsed.join, "--join"))
    secret = require_secret(parsed.cluster_secret_file, environment, "--join")
    listen = None if parsed.listen is None else split_host_port(parsed.listen, "--listen")
    check_reachable(listen, "--listen")
    worker = parsed.id or f"{parsed.role}-{socket.gethostname().split('.')[0]}"
    if not _ID.fullmatch(worker):
        raise ConfigError(f"--id is {worker!r}; it may have letters, digits, dot, dash, underscore")
    if parsed.kv_blocks is not None and parsed.kv_memory is not None:
        raise ConfigError("--kv-blocks and --kv-memory say the same thing; give one of them")
    if parsed.kv_blocks is not None and parsed.kv_blocks < 1:
        raise ConfigError("--kv-blocks must be at least 1")
    if parsed.threads < 0:
        raise ConfigError("--threads must not be negative; leave it out to use all cores")
    if not 0 <= parsed.drain_timeout < float("inf"):
        raise ConfigError("--drain-timeout must be 0 or more seconds")
    return JoinConfig(
        gateway=gateway,
        secret=secret,
        worker=WorkerId(worker),
        role=Role(parsed.role),
        model_path=resolve_model(parsed.model).resolve(),
        device=parsed.device,
        threads=parsed.threads,
        kv_blocks=parsed.kv_blocks,
        kv_memory=_size(parsed.kv_memory),
        listen=listen,
        tls=tls_files(parsed.cluster_tls_cert, parsed.cluster_tls_key, parsed.cluster_tls_ca),
        drain_timeout_s=parsed.drain_timeout,
        log_format=parsed.log_format,
    )


def _size(typed: str | None) -> int | None:
    try:
        return None if typed is None else parse_size(typed)
    except ValueError as error:
        raise ConfigError(f"--kv-memory is {typed!r}; it must be {error}") from None
