"""What a config means on this machine: the model's folder, the size of each pool, the threads.

Everything that can be known without starting a worker is worked out here, once, in the gateway's
process and without torch, so that what cannot work is refused before anything has begun.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pdserve.api.gateway import ModelCard
from pdserve.config import ServeConfig
from pdserve.core.capacity import HOST_POOL, longest_request, pool_blocks, pool_bytes
from pdserve.core.errors import ConfigError
from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.layout import KvLayout, pool_dtype
from pdserve.core.request import Role
from pdserve.cost.step_times import DEFAULT_PROFILE, PROFILES, StepTimes, speed_of
from pdserve.serve.runners import ENGINES, SELF_BATCHING
from pdserve.serve.start import WorkerStart
from pdserve.text.tools.registry import syntax_named
from pdserve.transport.registry import check_servable
from pdserve.weights.config import ModelConfig
from pdserve.weights.pull import resolve as resolve_model

MADE_FOR = "it was made for texts of that length"
MORE_MEMORY = "give more with --kv-memory or --kv-blocks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A config, resolved. ``max_model_tokens`` fits the model and one worker's pool."""

    config: ServeConfig
    model_path: Path
    model: ModelConfig
    card: ModelCard
    num_blocks: int
    block_bytes: int
    threads: int

    @property
    def roles(self) -> Mapping[WorkerId, Role]:
        """Home role of each worker slot."""
        return dict(self.config.worker_slots)

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) of what was worked out, for people to read."""
        pool_mib = self.num_blocks * self.block_bytes / 2**20
        tokens = self.num_blocks * self.config.block_size
        return [
            ("model folder", str(self.model_path)),
            ("longest request", self._longest_request()),
            (
                "KV pool",
                f"{self.num_blocks} blocks = {tokens} tokens = {pool_mib:.0f} MiB a worker",
            ),
            ("threads", f"{self.threads} a worker"),
            ("workers", ", ".join(self.roles)),
        ]

    def _longest_request(self) -> str:
        tokens = self.card.max_model_tokens
        at_limit = self.model.length_limit and tokens == self.model.max_model_tokens
        return f"{tokens} tokens" + (f" ({self.model.length_limit})" if at_limit else "")

    def worker_start(
        self, worker: WorkerId, epoch: Epoch, *, secret: bytes, gateway_address: str, address: str
    ) -> WorkerStart:
        """What the process of this worker slot is told."""
        config = self.config
        number = list(self.roles).index(worker)
        cluster = config.listen_workers
        return replace(
            self._start(worker, epoch, self.roles[worker]),
            secret=secret,
            gateway_address=gateway_address,
            address=address,
            launcher_pid=os.getpid(),
            model_path=str(self.model_path),
            device=config.devices[number % len(config.devices)],
            threads=self.threads,
            num_blocks=self.num_blocks,
            record=config.record,
            listen=None if cluster is None else (cluster[0], 0),
            tls=config.cluster_tls,
        )

    def guest_start(self, worker: WorkerId, epoch: Epoch, role: Role) -> WorkerStart:
        """What a worker of another host is told of this cluster. Its host knows the rest."""
        return self._start(worker, epoch, role)

    def _start(self, worker: WorkerId, epoch: Epoch, role: Role) -> WorkerStart:
        """What does not depend on the host."""
        config = self.config
        return WorkerStart(
            worker=worker,
            epoch=epoch,
            role=role,
            secret=b"",
            gateway_address="",
            address="",
            launcher_pid=0,
            model_path="",
            engine=config.engine,
            device="",
            dtype=config.dtype,
            kv_dtype=config.kv_dtype,
            weight_dtype=config.weight_dtype_of(role),
            numerics=config.numerics,
            threads=0,
            transport=config.transport,
            block_size=config.block_size,
            num_blocks=0,
            max_model_tokens=self.card.max_model_tokens,
            max_step_tokens=config.max_step_tokens,
            mixed_chunk_tokens=config.mixed_chunk_tokens,
            one_shot_tokens=config.one_shot_tokens,
            batching=config.batch_policy,
            step_times=self._step_times(worker, role),
            record=None,
            log_format=config.log_format,
        )

    def _step_times(self, worker: WorkerId, role: Role) -> StepTimes | None:
        if self.config.engine != "modelled":
            return None
        times = self.config.step_times or PROFILES[DEFAULT_PROFILE]
        return times.at_speed(speed_of(self.config.speeds or {}, worker, role))


def deploy(config: ServeConfig) -> Deployment:
    """Resolve a config, pulling the model if it is a known one that is missing.

    Raises `ConfigError` or `ModelError` with the reason why this cannot be served here.
    """
    check_servable(config.transport)
    if config.engine not in ENGINES:
        raise ConfigError(f"--engine is {config.engine!r}; it is one of {', '.join(ENGINES)}")
    if config.edge.tool_call_parser is not None:
        syntax_named(config.edge.tool_call_parser)
    model_path = resolve_model(config.model).resolve()
    model = ModelConfig.from_folder(model_path)
    num_workers = max(1, len(config.worker_slots))
    dtype = pool_dtype(config.dtype, config.kv_dtype)
    block_bytes = block_bytes_of(model, config.block_size, dtype)
    num_blocks = config.kv_blocks or num_pool_blocks(config.kv_memory, block_bytes, num_workers)
    card = ModelCard(
        name=config.served_model_name or _model_name(config.model),
        max_model_tokens=_max_model_tokens(config, model, num_blocks),
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        created=int(time.time()),
        constrains=config.engine not in SELF_BATCHING,
    )
    return Deployment(
        config=config,
        model_path=model_path,
        model=model,
        card=card,
        num_blocks=num_blocks,
        block_bytes=block_bytes,
        threads=config.threads or max(1, num_cores() // num_workers),
    )


def _max_model_tokens(config: ServeConfig, model: ModelConfig, num_blocks: int) -> int:
    pool_tokens = num_blocks * config.block_size
    if pool_tokens < 2:
        raise ConfigError(f"the KV pool of a worker holds a single token; {MORE_MEMORY}")
    wanted = config.max_model_len
    if wanted is None:
        return longest_request(model.max_model_tokens, num_blocks, config.block_size)
    if wanted > model.max_model_tokens:
        raise ConfigError(
            f"--max-model-len is {wanted}, and the model is served up to "
            f"{model.max_model_tokens} tokens: {model.length_limit or MADE_FOR}"
        )
    if wanted > pool_tokens:
        raise ConfigError(
            f"--max-model-len is {wanted}, and the KV pool of a worker holds {pool_tokens} tokens: "
            f"{MORE_MEMORY}, or lower --max-model-len"
        )
    return wanted


def _model_name(model: str) -> str:
    """A folder serves under its own name, a file under its own without the ending."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.is_file() else model


def block_bytes_of(model: ModelConfig, block_size: int, dtype: str) -> int:
    """Bytes of one block over all layers; ``dtype`` is the pool's."""
    layout = KvLayout(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=block_size,
        dtype=dtype,
        numerics="",
        weights_digest="",
    )
    return layout.pool_bytes(1)


def num_pool_blocks(memory_bytes: int | None, block_bytes: int, num_workers: int) -> int:
    """Blocks of one worker's pool; without a size, what this host can spare."""
    if memory_bytes is None:
        memory_bytes = pool_bytes(HOST_POOL, free_memory_bytes(), num_workers=num_workers)
    return pool_blocks(memory_bytes, block_bytes, MORE_MEMORY)


def num_cores() -> int:
    """CPU cores that this process may use, by affinity and by the container's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no container, or one that does not say
    return cores


def free_memory_bytes() -> int:
    """Memory that can be had without swapping, by the kernel's account and the container's."""
    free = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        free = min(free, max(0, limit - used))
    except (OSError, ValueError):
        pass  # no container, or one without a limit
    return free
