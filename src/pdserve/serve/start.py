"""What a worker process is told on its standard input, once: who it is and what it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from pdserve.core.errors import ConfigError
from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.request import Role
from pdserve.cost.step_times import StepTimes
from pdserve.policy.registry import DEFAULT_BATCHING
from pdserve.transport.tls import TlsFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStart:
    """All that a worker needs to begin.

    ``gateway_address`` is where it says hello, ``address`` where it takes links of other workers of
    this host, ``listen`` (host and port; 0: a free one) where those of others find it; KV comes in
    on the port after that. ``family`` as in `Hello`; ``tls`` for what leaves the host.
    ``launcher_pid`` is the process with which it lives and dies.
    ``threads`` is the number of CPU threads of its engine. ``mixed_chunk_tokens`` and
    ``one_shot_tokens`` are those of `WorkerSettings`; ``batching`` is for `make_batching`;
    ``step_times`` for the engine ``modelled``.
    """

    worker: WorkerId
    epoch: Epoch
    role: Role
    secret: bytes = field(repr=False)
    gateway_address: str
    address: str
    launcher_pid: int
    model_path: str
    engine: str
    device: str
    dtype: str
    numerics: str
    threads: int
    transport: str
    block_size: int
    num_blocks: int
    max_model_tokens: int
    max_step_tokens: int
    record: str | None
    log_format: str
    mixed_chunk_tokens: int = 512
    one_shot_tokens: int = 512
    weight_dtype: str = "auto"
    kv_dtype: str = "auto"
    batching: str = DEFAULT_BATCHING
    step_times: StepTimes | None = None
    listen: tuple[str, int] | None = None
    family: str = ""
    tls: TlsFiles | None = None

    def encode(self) -> bytes:
        """JSON, for the worker's standard input. Holds the cluster secret."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, document: bytes) -> WorkerStart:
        """Raises `ConfigError` for anything but what `encode` gives."""
        try:
            return msgspec.json.decode(document, type=cls)
        except msgspec.MsgspecError as error:
            raise ConfigError(
                f"standard input does not say what worker to be ({error}); workers are started by "
                "pdserve serve"
            ) from error
