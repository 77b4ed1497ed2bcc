"""A workbench for runners of tiny random models: pools, block tables, and steps by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.core.ids import AttemptId, BlockId, Epoch, RequestId, StepId
from pdserve.core.request import SamplingParams
from pdserve.core.step import SampleSpec, StepPlan, StepRow
from pdserve.engine.native.library import KERNELS_VARIABLE
from pdserve.engine.torch.runner import TorchRunner
from pdserve.weights.folder import ModelFolder
from pdserve.weights.random_model import write_random_model

GREEDY = SamplingParams(max_tokens=16, seed=0, temperature=0.0)
ATTEMPT = AttemptId(RequestId("request"), Epoch(1))


def greedy_row(
    token_ids: Sequence[int], start: int, block_ids: Sequence[int], sampled: bool = True
) -> StepRow:
    spec = SampleSpec(params=GREEDY, choices=(0,), index=0) if sampled else None
    return StepRow(
        attempt=ATTEMPT,
        token_ids=tuple(token_ids),
        start=start,
        block_ids=tuple(BlockId(block) for block in block_ids),
        sample=spec,
    )


@dataclass
class Bench:
    """A runner and one pool after another, each full of NaN, as stale bytes may be."""

    runner: TorchRunner
    num_blocks: int
    memory: bytearray = field(init=False)
    steps: int = 0

    def __post_init__(self) -> None:
        self.fresh_pool()

    @property
    def block_size(self) -> int:
        return self.runner.info.layout.block_size

    def fresh_pool(self) -> bytearray:
        """Attach new memory in which every number is NaN; returns it."""
        size = self.runner.info.layout.pool_bytes(self.num_blocks)
        self.memory = bytearray(b"\xff" * size)
        self.attach(self.memory)
        return self.memory

    def attach(self, memory: bytearray) -> None:
        self.runner.attach_pool(memoryview(memory), self.num_blocks)

    def plan(self, rows: Sequence[StepRow], copies: Sequence[tuple[int, int]] = ()) -> StepPlan:
        self.steps += 1
        pairs = tuple((BlockId(source), BlockId(target)) for source, target in copies)
        return StepPlan(step_id=StepId(self.steps), rows=tuple(rows), copies=pairs)

    def logits(
        self, rows: Sequence[StepRow], copies: Sequence[tuple[int, int]] = ()
    ) -> torch.Tensor:
        return self.runner.logits(self.plan(rows, copies))

    def logits_of(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Of the last token, the sequence computed whole and alone in a fresh pool: ``[vocab]``."""
        kept = self.memory
        self.fresh_pool()
        table = range(-(-len(token_ids) // self.block_size))
        logits = self.logits([greedy_row(token_ids, 0, table)])[0]
        self.memory = kept
        self.attach(kept)
        return logits


@cache
def _model_folder(root: Path, seed: int, overrides: tuple[tuple[str, Any], ...]) -> ModelFolder:
    path = root / str(abs(hash((seed, overrides))))
    write_random_model(path, seed=seed, **dict(overrides))
    return ModelFolder.open(path)


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelFolder]:
    """Folder of a tiny random model; keyword arguments are fields of its `ModelConfig`."""
    root = tmp_path_factory.mktemp("engine-models")

    def make(seed: int = 0, **overrides: Any) -> ModelFolder:
        return _model_folder(root, seed, tuple(sorted(overrides.items())))

    return make


@pytest.fixture(scope="session")
def make_bench(make_folder: Callable[..., ModelFolder]) -> Callable[..., Bench]:
    """Bench over a tiny random model, made once per combination of arguments.

    ``kernels`` forces a level of the compiled ones, or torch.
    """

    @cache
    def make(
        dtype: str = "fp32",
        numerics: str = "exact",
        weight_dtype: str = "auto",
        kv_dtype: str = "auto",
        kernels: str = "",
        num_threads: int = 1,
        block_size: int = 16,
        num_blocks: int = 64,
        **overrides: Any,
    ) -> Bench:
        folder = make_folder(**overrides)
        with pytest.MonkeyPatch.context() as monkeypatch:
            if kernels:
                monkeypatch.setenv(KERNELS_VARIABLE, kernels)
            runner = TorchRunner(
                folder.config,
                folder.load_tensors(dtype=dtype),
                weights_digest="tiny",
                device="cpu",
                dtype=dtype,
                block_size=block_size,
                num_threads=num_threads,
                numerics=numerics,
                weight_dtype=weight_dtype,
                kv_dtype=kv_dtype,
            )
        return Bench(runner, num_blocks)

    return make


@pytest.fixture(autouse=True)
def same_thread_count() -> Iterator[None]:
    """torch's thread count belongs to the process: put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(20240607)


@pytest.fixture(scope="session")
def row() -> Callable[..., StepRow]:
    """`greedy_row`: (token ids, start, block ids, sampled=True)."""
    return greedy_row
