"""From what a worker is told to what computes in it. Runs on the engine thread, takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pdserve.core.layout import pool_dtype
from pdserve.engine.base import ModelRunner
from pdserve.engine.foreign import Engine
from pdserve.engine.registry import RUNNERS, create_runner
from pdserve.serve.backend import Backend
from pdserve.serve.native import NativeBackend
from pdserve.serve.self_batching import SelfBatchingBackend
from pdserve.serve.start import WorkerStart
from pdserve.text.tokenizer import Tokenizer
from pdserve.transport.base import Transport
from pdserve.weights.config import ModelConfig
from pdserve.weights.folder import ModelFolder

if TYPE_CHECKING:
    from pdserve.text.structured.masks import TokenMasks

SELF_BATCHING = {"fake-foreign": "pdserve.engine.fake_foreign:FakeForeignEngine"}
"""Engines that batch for themselves: name -> ``module:class``."""

ENGINES = (*RUNNERS, *SELF_BATCHING)
"""Everything that ``--engine`` can name."""


def build_runner(start: WorkerStart) -> ModelRunner:
    """The model in the runner that the worker is to have; without a pool.

    Raises `ModelError` or `ConfigError` if this cannot be had here.
    """
    if start.engine == "torch":
        folder = ModelFolder.open(start.model_path)
        return create_runner(
            start.engine,
            folder.config,
            folder.load_tensors(dtype=start.dtype),
            weights_digest=folder.weights_digest(),
            device=start.device,
            dtype=start.dtype,
            block_size=start.block_size,
            num_threads=start.threads,
            numerics=start.numerics,
            weight_dtype=start.weight_dtype,
            kv_dtype=start.kv_dtype,
            masks=_token_masks(folder.config, start),
        )
    # A runner without weights has the model's shape, so that pools and limits are as was said.
    config = ModelConfig.from_folder(Path(start.model_path))
    times = {} if start.step_times is None else {"times": start.step_times}
    return create_runner(
        start.engine,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=start.block_size,
        dtype=pool_dtype(start.dtype, start.kv_dtype),
        vocab_size=config.vocab_size,
        max_model_tokens=config.max_model_tokens,
        masks=_token_masks(config, start),
        **times,
    )


def _token_masks(config: ModelConfig, start: WorkerStart) -> TokenMasks:
    """For answers of a given form. Reads the model's tokenizer when the first one is asked for."""
    from pdserve.text.structured.masks import TokenMasks
    from pdserve.text.structured.vocabulary import make_vocabulary

    folder, vocab_size, endings = start.model_path, config.vocab_size, config.eos_token_ids
    return TokenMasks(
        lambda: make_vocabulary(Tokenizer.from_folder(folder), vocab_size, endings), vocab_size
    )


def load_backend(
    start: WorkerStart,
    transport: Transport,
    build: Callable[[WorkerStart], ModelRunner] = build_runner,
) -> Backend:
    """What computes in the worker; ``build`` makes the runner of a native one."""
    if start.engine in SELF_BATCHING:
        return SelfBatchingBackend(start, _build_engine(start))
    return NativeBackend(start, build(start), transport)


def _build_engine(start: WorkerStart) -> Engine:
    config = ModelConfig.from_folder(Path(start.model_path))
    module, attribute = SELF_BATCHING[start.engine].split(":")
    engine = getattr(import_module(module), attribute)(
        capacity_tokens=start.num_blocks * start.block_size,
        max_model_tokens=start.max_model_tokens,
        max_step_tokens=start.max_step_tokens,
        vocab_size=config.vocab_size,
    )
    assert isinstance(engine, Engine)
    return engine
