"""From what a worker is told to the `ModelRunner` that it computes with."""

from __future__ import annotations

from pdserve.engine.base import ModelRunner
from pdserve.serve.start import WorkerStart
from pdserve.weights.folder import ModelFolder


def build_runner(start: WorkerStart) -> ModelRunner:
    """Load the model and make the runner; takes seconds. Runs on the engine thread.

    Raises `ModelError` or `ConfigError` if this cannot be had here.
    """
    from pdserve.engine.torch.runner import TorchRunner

    folder = ModelFolder.open(start.model_path)
    return TorchRunner(
        folder.config,
        folder.load_tensors(dtype=start.dtype),
        weights_digest=folder.weights_digest(),
        device=start.device,
        dtype=start.dtype,
        block_size=start.block_size,
        num_threads=start.threads,
        numerics=start.numerics,
    )
