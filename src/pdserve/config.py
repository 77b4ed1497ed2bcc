"""What the user asked for: one frozen `ServeConfig`, resolved once, before anything starts.

Each option is a field of `ServeConfig`, or of its part `EdgeConfig`, and the field is all there is
to an option: its name gives the flag (``--kv-blocks``), the environment variable
(``PDSERVE_KV_BLOCKS``) and the key in the ``[serve]`` table of the TOML file (``kv_blocks``); its
metadata gives the help text. A flag wins over the environment, the environment over the file, the
file over the default, and `Resolved` remembers which one it was, so that start-up can print it.

What one look at the options can refuse is refused here. What needs the model (a pool that is too
small for ``--max-model-len``) or an import (an engine that is not there) is refused by
``serve.deployment``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from pdserve.core.errors import ConfigError
from pdserve.core.ids import WorkerId
from pdserve.core.layout import DTYPE_BYTES, INT8, KV_DTYPES
from pdserve.core.request import Role
from pdserve.cost.step_times import StepTimes, check_speeds, parse_speeds, parse_step_times
from pdserve.edge_config import EdgeConfig
from pdserve.node.settings import RoleControl
from pdserve.options import flag_of, parse_size
from pdserve.options import option as _option
from pdserve.options import parse_seconds as _seconds
from pdserve.options import parse_switch as _switch
from pdserve.options import parse_text as _text
from pdserve.options import parse_whole as _whole
from pdserve.policy.admission import ADMISSION_POLICIES
from pdserve.policy.registry import (
    BATCH_POLICIES,
    DEFAULT_POLICY,
    ROUTE_POLICIES,
    default_batching,
    make_batching,
    make_policy,
)
from pdserve.service_classes import ONE_CLASS, ServiceClasses, parse_classes
from pdserve.toml_flags import read_table
from pdserve.transport.addresses import check_reachable, split_host_port
from pdserve.transport.registry import is_foreign
from pdserve.transport.tls import TlsFiles, tls_files

ENVIRONMENT_PREFIX = "PDSERVE_"
MAX_WORKERS = 64
WEIGHT_DTYPES = ("auto", "int8")
KV_TILE_TOKENS = 64
"""Attention walks the KV in tiles of this many tokens, and a block must not straddle two."""
INT8_BLOCK_TOKENS = 16
"""A block of int8 is a multiple of this many tokens."""


def _dtype(value: object) -> str:
    """torch's and vLLM's names are understood, too."""
    text = _text(value)
    return {"bfloat16": "bf16", "float32": "fp32"}.get(text, text)


def _host_port(value: object) -> tuple[str, int]:
    return split_host_port(_text(value), "it")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Options of ``pdserve serve``. Raises `ConfigError` if they cannot work together."""

    model: str = _option(
        "smollm2-135m", _text, "known name, folder in Hugging Face layout, GGUF file or hub id"
    )
    served_model_name: str | None = _option(None, _text, "model name that clients use")
    host: str = _option("127.0.0.1", _text, "address to listen on")
    port: int = _option(8000, _whole, "port to listen on; 0 takes a free one")
    api_key: str | None = _option(None, _text, "key that clients must send as bearer token")
    edge: EdgeConfig = field(default=EdgeConfig(), metadata={"part": EdgeConfig})
    prefill: int = _option(
        1, _whole, "prefill workers (if any of the three counts is given, the others are 0)"
    )
    decode: int = _option(1, _whole, "decode workers")
    mixed: int = _option(0, _whole, "mixed workers")
    roles: str = _option(
        "fixed", _text, "who moves workers between the pools: fixed, auto or advise (only says it)"
    )
    engine: str = _option("torch", _text, "compute engine of the workers")
    step_times: StepTimes | None = field(
        default=None,
        metadata={
            "parse": parse_step_times,
            "help": "of engine modelled: a profile, or prompt=0.2ms,decode=10ms,...",
        },
    )
    speeds: Mapping[str, float] | None = _option(
        None, parse_speeds, "of engine modelled, by role or worker: prefill=2,decode-1=0.5"
    )
    device: str = _option(
        "cpu", _text, "device as torch names it; several, comma-separated, are dealt out in turn"
    )
    dtype: str = _option("bf16", _dtype, "bf16 or fp32")
    weight_dtype: str = _option("auto", _text, "weights in products: auto (as --dtype) or int8")
    decode_weight_dtype: str | None = _option(
        None, _text, "the same for decode workers alone (default: as --weight-dtype)"
    )
    kv_dtype: str = _option("auto", _text, "KV in the pool: auto (as --dtype) or int8")
    numerics: str = _option("exact", _text, "exact: equal bit by bit however batched; or fast")
    threads: int | None = _option(None, _whole, "CPU threads per worker (default: cores / workers)")
    transport: str = _option(
        "shm", _text, "how KV moves between workers: shm, tcp, or your own as MODULE:CLASS"
    )
    block_size: int = _option(16, _whole, "tokens per KV block; divides 64")
    kv_blocks: int | None = _option(None, _whole, "KV blocks per worker")
    kv_memory: int | None = _option(
        None, parse_size, "KV pool per worker, such as 512MiB (default: up to 1GiB)"
    )
    max_model_len: int | None = _option(None, _whole, "longest prompt and answer, in tokens")
    policy: str = _option(
        DEFAULT_POLICY,
        _text,
        f"how requests are routed: {', '.join(ROUTE_POLICIES)}; settings go after a colon",
    )
    batching: str | None = _option(
        None,
        _text,
        f"how workers batch: {' or '.join(BATCH_POLICIES)} (default: what belongs to --policy)",
    )
    max_step_tokens: int = _option(2048, _whole, "most tokens in one forward pass")
    mixed_chunk_tokens: int = _option(
        512, _whole, "most prompt tokens in a forward pass that also decodes"
    )
    one_shot_tokens: int = _option(
        512, _whole, "KV of a shorter prompt moves at once after its last layer, not layer by layer"
    )
    classes: ServiceClasses = field(
        default=ONE_CLASS,
        metadata={
            "parse": parse_classes,
            "help": "classes of service: NAME:ttft=MS,tpot=MS,weight=N; ... (docs/overload.md)",
        },
    )
    admission: str = _option(
        "auto", _text, "who is refused early: auto, none, early or predicted (docs/overload.md)"
    )
    queue_timeout: float = _option(30.0, _seconds, "seconds a request may wait before a 429")
    drain_timeout: float = _option(30.0, _seconds, "seconds running requests get on shutdown")
    listen_workers: tuple[str, int] | None = _option(
        None, _host_port, "HOST:PORT by which workers of other hosts find this one (docs/hosts.md)"
    )
    cluster_secret_file: str | None = _option(
        None, _text, "file with the secret of the cluster (or set PDSERVE_CLUSTER_SECRET)"
    )
    cluster_tls_cert: str | None = _option(None, _text, "PEM: this host's certificate, for TLS")
    cluster_tls_key: str | None = _option(None, _text, "PEM: its key")
    cluster_tls_ca: str | None = _option(None, _text, "PEM: the authority of the cluster's hosts")
    allow_faults: bool = field(
        default=False,
        metadata={
            "parse": _switch,
            "switch": True,
            "help": "let clients cut and slow links between workers, to see what follows "
            "(docs/failures.md)",
        },
    )
    record: str | None = _option(None, _text, "folder to record every input of every node in")
    log_format: str = _option("text", _text, "text or json")

    def __post_init__(self) -> None:
        self._check_workers()
        self._check_memory()
        self._check_words()
        check_reachable(self.listen_workers, "--listen-workers")
        if self.mixed_chunk_tokens < self.block_size:
            raise ConfigError(
                f"--mixed-chunk-tokens must be at least one block, {self.block_size} tokens"
            )
        if self.one_shot_tokens < 0:
            raise ConfigError("--one-shot-tokens must not be negative; 0 always moves by layer")
        for name in ("queue_timeout", "drain_timeout"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{flag_of(name)} must be 0 or more seconds")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; ports go from 0 to 65535")
        if self.threads is not None and self.threads < 1:
            raise ConfigError("--threads must be at least 1; leave it out to share the cores")

    def _check_workers(self) -> None:
        for role in Role:
            if getattr(self, role.value) < 0:
                raise ConfigError(f"--{role.value} must not be negative")
        total = self.prefill + self.decode + self.mixed
        if total == 0 and self.listen_workers is None:
            raise ConfigError(
                "no worker would be started, so nobody could serve: give at least one of "
                "--prefill, --decode and --mixed (each kind can do both phases if it must)"
            )
        if total > MAX_WORKERS:
            raise ConfigError(
                f"{total} workers are more than the {MAX_WORKERS} that one gateway links to each "
                "other; start fewer"
            )

    def _check_memory(self) -> None:
        if self.block_size < 1 or KV_TILE_TOKENS % self.block_size:
            raise ConfigError(
                f"--block-size is {self.block_size}; it must divide {KV_TILE_TOKENS}, because "
                f"attention reads the KV in tiles of {KV_TILE_TOKENS} tokens: 8, 16, 32 or 64"
            )
        if self.kv_dtype == INT8 and self.block_size % INT8_BLOCK_TOKENS:
            raise ConfigError(
                f"--block-size is {self.block_size}; with --kv-dtype int8 it is 16, 32 or 64"
            )
        if self.kv_blocks is not None and self.kv_memory is not None:
            raise ConfigError("--kv-blocks and --kv-memory say the same thing; give one of them")
        for name in ("kv_blocks", "kv_memory", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{flag_of(name)} must be at least 1")
        if self.max_step_tokens < self.block_size:
            raise ConfigError(
                f"--max-step-tokens is {self.max_step_tokens}, less than one block of "
                f"{self.block_size} tokens: no prompt could ever be read"
            )

    def _check_words(self) -> None:
        choices: dict[str, tuple[str | None, ...]] = {
            "dtype": tuple(sorted(DTYPE_BYTES)),
            "weight_dtype": WEIGHT_DTYPES,
            "decode_weight_dtype": (None, *WEIGHT_DTYPES),
            "kv_dtype": KV_DTYPES,
            "numerics": ("exact", "fast"),
            "admission": ("auto", *ADMISSION_POLICIES),
            "log_format": ("text", "json"),
            "roles": tuple(RoleControl),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f"{flag_of(name)} is {value!r}; it is one of {', '.join(filter(None, allowed))}"
                )
        if self.dtype != "bf16" and "int8" in (self.weight_dtype, self.decode_weight_dtype):
            raise ConfigError(f"weights in int8 go with --dtype bf16, and it is {self.dtype}")
        if self.transport == "inproc":
            raise ConfigError(
                "--transport inproc moves KV inside one process, and pdserve serve starts a "
                "process per worker; use shm"
            )
        if is_foreign(self.transport) and self.listen_workers is not None:
            raise ConfigError(
                "--transport MODULE:CLASS is for the workers of one host, and --listen-workers "
                "lets others in: KV goes to those over sockets, so use shm or tcp"
            )
        tls_files(self.cluster_tls_cert, self.cluster_tls_key, self.cluster_tls_ca)
        if self.engine != "modelled" and (self.step_times, self.speeds) != (None, None):
            raise ConfigError("--step-times and --speeds are for --engine modelled")
        check_speeds(self.speeds or {}, dict(self.worker_slots))
        make_policy(self.policy)
        make_batching(self.batch_policy)
        if not all(self.devices):
            raise ConfigError(f"--device is {self.device!r}; name a device between the commas")

    @property
    def admission_policy(self) -> str:
        """Name of the policy: with ``auto``, nobody is refused early without bounds to keep."""
        if self.admission != "auto":
            return self.admission
        return "predicted" if self.classes.are_bounded else "none"

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices to deal out to the workers in turn."""
        return tuple(name.strip() for name in self.device.split(","))

    @property
    def cluster_tls(self) -> TlsFiles | None:
        """Files for TLS between hosts; None: none. Raises `ConfigError` if some are missing."""
        return tls_files(self.cluster_tls_cert, self.cluster_tls_key, self.cluster_tls_ca)

    @property
    def batch_policy(self) -> str:
        """How native workers batch."""
        return self.batching or default_batching(self.policy)

    def value_of(self, name: str) -> Any:
        """Of an option, wherever its field is."""
        return getattr(self if name in _OWN else self.edge, name)

    def weight_dtype_of(self, role: Role) -> str:
        """Of the weights in a worker's products, by its home role."""
        special = self.decode_weight_dtype if role is Role.DECODE else None
        return special or self.weight_dtype

    @property
    def worker_slots(self) -> tuple[tuple[WorkerId, Role], ...]:
        """Every worker to start, with its home role: ``prefill-0``, ..., ``decode-0``, ..."""
        return tuple(
            (WorkerId(f"{role.value}-{number}"), role)
            for role in Role
            for number in range(getattr(self, role.value))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A config, and for each of its fields where it came from: flag, environment, file, default."""

    config: ServeConfig
    sources: Mapping[str, str]

    def rows(self) -> list[tuple[str, str, str]]:
        """(option, value, source) of every field, secrets masked, for people to read."""
        shown: list[tuple[str, str, str]] = []
        for name in OPTIONS:
            value = self.config.value_of(name)
            text = "***" if name == "api_key" and value else _shown(value)
            shown.append((name, text, self.sources[name]))
        return shown


def _shown(value: object) -> str:
    if isinstance(value, tuple):  # a host and a port, or several words
        between = ":" if any(isinstance(part, int) for part in value) else ","
        return between.join(map(str, value)) or "-"
    return "-" if value is None else str(value)


_OWN = frozenset(item.name for item in fields(ServeConfig))


def _options() -> Mapping[str, Field[Any]]:
    """Of all parts, in the order of their fields."""
    found: dict[str, Field[Any]] = {}
    for item in fields(ServeConfig):
        part = item.metadata.get("part")
        found.update({each.name: each for each in (fields(part) if part else (item,))})
    return found


OPTIONS = _options()
EDGE_OPTIONS = tuple(item.name for item in fields(EdgeConfig))


def resolve(
    flags: Mapping[str, str | None],
    environment: Mapping[str, str],
    file: Path | None = None,
) -> Resolved:
    """Merge the four sources. ``flags`` maps field names to what was typed (None: not given).

    Raises `ConfigError` naming the option, the place and what it should have been.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(OPTIONS, "default")

    def take(name: str, raw: object, source: str, shown: str) -> None:
        try:
            values[name] = OPTIONS[name].metadata["parse"](raw)
        except ConfigError as error:
            raise ConfigError(f"{shown}: {error}") from None
        except ValueError as error:
            raise ConfigError(f"{shown} is {raw!r}; it must be {error}") from None
        sources[name] = source

    if file is not None:
        for name, raw in read_table(file, "serve", OPTIONS).items():
            take(name, raw, "file", f"{name} in {file}")
    for name in OPTIONS:
        variable = ENVIRONMENT_PREFIX + name.upper()
        if environment.get(variable):
            take(name, environment[variable], "environment", variable)
    for name, typed in flags.items():
        if typed is not None:
            take(name, typed, "flag", flag_of(name))
    counts = [role.value for role in Role]
    if any(name in values for name in counts):
        for name in counts:
            values.setdefault(name, 0)
    edge = EdgeConfig(**{name: values.pop(name) for name in EDGE_OPTIONS if name in values})
    return Resolved(config=ServeConfig(edge=edge, **values), sources=sources)
