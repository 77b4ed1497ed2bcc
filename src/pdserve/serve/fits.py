"""What earlier servers have learned of costs, kept beside the models in the user's cache.

One small file per fit (``fits/`` in ``weights.cache.cache_root``), named by what it belongs to, so
servers on one machine do not overwrite each other's but where they measure the same thing. They are
read once, at start, into the router's settings, where a recording finds them too; they are written
every minute and at the end. None of it is needed: a file that is broken or foreign is named in one
log line and ignored, a folder that cannot be written costs one line as well.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from pdserve.core.layout import DTYPE_BYTES
from pdserve.cost.shape import ModelShape
from pdserve.cost.store import KnownCosts, SavedLink, SavedSteps, from_text, to_text
from pdserve.serve.deployment import Deployment
from pdserve.weights.cache import cache_root, write_atomically

log = logging.getLogger(__name__)

MAX_FITS = 32
"""The latest so many files are read; more than one server's worth of models."""
SAVE_INTERVAL_S = 60.0

Saved = SavedSteps | SavedLink


class FitFiles:
    """The folder of saved fits."""

    def __init__(self, cache_dir: Path | str | None = None) -> None:
        """``cache_dir`` as in `cache_root`."""
        self._folder = cache_root(cache_dir) / "fits"
        self._complained = False

    def load(self) -> list[Saved]:
        """All that can be used, the latest first."""
        found = []
        for path in self._latest():
            try:
                found.append(from_text(path.read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                log.warning("ignoring saved fit %s: %s", path, error)
        return found

    def save(self, fits: Iterable[Saved]) -> None:
        """Keep these; what else is there stays."""
        try:
            for saved in fits:
                write_atomically(self._folder / _file_name(saved), to_text(saved).encode())
        except OSError as error:
            if not self._complained:
                log.warning("cannot save what was learned of costs: %s", error)
            self._complained = True

    async def keep_saving(
        self, fits: Callable[[], Iterable[Saved]], interval_s: float = SAVE_INTERVAL_S
    ) -> None:
        """Save what ``fits`` gives, again and again until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            self.save(fits())

    def _latest(self) -> list[Path]:
        try:
            files = [(path.stat().st_mtime, path) for path in self._folder.glob("*.json")]
        except OSError:
            return []
        return [path for _, path in sorted(files, reverse=True)[:MAX_FITS]]


def known_costs(deployment: Deployment, files: FitFiles) -> KnownCosts:
    """What the router of this deployment is told of costs."""
    saved = files.load()
    transport = deployment.config.transport
    links = [fit for fit in saved if isinstance(fit, SavedLink) and fit.transport == transport]
    return KnownCosts(
        shape=_shape(deployment),
        num_cores=deployment.threads,
        transport=transport,
        steps=tuple(fit for fit in saved if isinstance(fit, SavedSteps)),
        link=links[0] if links else None,
    )


def _shape(deployment: Deployment) -> ModelShape:
    model, config = deployment.model, deployment.config
    element_bytes = DTYPE_BYTES[config.dtype]
    return ModelShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        weight_bytes=1.0 if config.weight_dtype == "int8" else element_bytes,
        kv_bytes=element_bytes,
    )


def _file_name(saved: Saved) -> str:
    """The same for what belongs to the same things."""
    if isinstance(saved, SavedLink):
        parts = ["link", saved.transport]
    else:
        key = saved.key
        parts = ["steps", key.weights_digest, key.engine, key.device, key.numerics]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest() + ".json"
