"""A diagonal of the same equality on the real model: split, mixed, chunked, cached and resumed.

The prompts are text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bitwise import Ask, Heard, Lab, Reference, Shape, ask_of

from pdserve.core.events import LifeName
from pdserve.engine.torch.runner import TorchRunner
from pdserve.text.tokenizer import Tokenizer
from pdserve.weights.folder import ModelFolder

pytestmark = pytest.mark.model

SPLIT = Shape("split", prefill=1, decode=1, max_step_tokens=48, one_shot_tokens=64, num_blocks=128)
MIXED = Shape("mixed", mixed=1, max_step_tokens=96, mixed_chunk_tokens=32, num_blocks=128)
TEXT = (
    "The tide had gone out by the time she reached the harbour, and the boats lay on their sides "
    "in the mud like tired cattle. Nobody was about. She counted the masts, as her father had "
    "taught her: one for each day that the storm had lasted, and two more that did not belong to "
    "the village at all. "
)
CELLS = (
    (1, "seeded"),
    (16, "greedy"),
    (17, "three"),
    (31, "stops-first"),
    (33, "penalties"),
    (48, "one-token"),
    (64, "top_p"),
    (65, "two"),
    (97, "greedy-penalties"),
)
NUM_TOKENS = 5


class RealModel:
    """One dtype: the runners, the reference, and what is asked."""

    def __init__(self, model: Path, dtype: str) -> None:
        self.dtype = dtype
        self._model = model
        folder = ModelFolder.open(model)
        self._config, self._digest = folder.config, folder.weights_digest()
        self._tensors = folder.load_tensors(dtype=dtype)
        self.reference = Reference(self._load())
        words = Tokenizer.from_folder(model).encode(TEXT * 2)
        made = (ask_of(kind, tuple(words[:length]), self.reference) for length, kind in CELLS)
        self.asks = [self._shortened(ask) for ask in made]

    def lab(self, shape: Shape) -> Lab:
        start = shape.start(self._model, self.dtype)
        return Lab(shape, start, self.reference, lambda start: self._load())

    def salted(self, salt: str) -> list[Ask]:
        """All that is asked; prompts begin alike, so those of one salt share blocks."""
        return [replace(ask, salt=salt) for ask in self.asks]

    def _load(self) -> TorchRunner:
        """A runner of its own for each worker: one may be used from one thread only."""
        start = SPLIT.start(self._model, self.dtype)
        return TorchRunner(
            self._config,
            self._tensors,
            weights_digest=self._digest,
            device=start.device,
            dtype=start.dtype,
            block_size=start.block_size,
            num_threads=start.threads,
            numerics=start.numerics,
        )

    def _shortened(self, ask: Ask) -> Ask:
        num_tokens = min(ask.params.max_tokens, NUM_TOKENS)
        return replace(ask, params=replace(ask.params, max_tokens=num_tokens))


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def real(request: pytest.FixtureRequest, smollm_path: Path) -> Iterator[RealModel]:
    real = RealModel(smollm_path, request.param)
    yield real
    real.reference.close()


@pytest.fixture(scope="module")
def split_lab(real: RealModel) -> Iterator[Lab]:
    lab = real.lab(SPLIT)
    yield lab
    try:
        lab.assert_clean()
    finally:
        lab.close()


def test_split_cold_and_from_both_caches(real: RealModel, split_lab: Lab) -> None:
    """All at once, then again: now both sides have the prompts."""
    split_lab.answer_all(real.salted("twice"), waves=2)
    split_lab.assert_clean()
    again = split_lab.answer_all(real.salted("twice"))
    granted = [split_lab.details(one, LifeName.HANDOFF_GRANTED) for one in again]
    assert sum(int(detail["reused_blocks"]) for details in granted for detail in details) > 10


def test_each_alone(real: RealModel, split_lab: Lab) -> None:
    split_lab.answer_each(replace(ask, salt=ask.name) for ask in real.asks[::2])


def test_decode_worker_dies_in_mid_answer(real: RealModel, split_lab: Lab) -> None:
    """The worker that read the prompts writes the rest."""
    asked = [ask for ask in real.salted("dies") if ask.may_hand_off]
    split_lab.prepare(asked)

    async def scenario() -> list[Heard]:
        started = [split_lab.ask(ask) for ask in asked]
        heard = [one for one, _ in started]
        await split_lab.until(lambda: max(one.most for one in heard) >= 2)
        split_lab.kill("decode-0")
        await asyncio.gather(*(task for _, task in started))
        await split_lab.restart("decode-0")
        return heard

    heard = split_lab.run(scenario())
    split_lab.compare(asked, heard)
    assert any(split_lab.details(one, LifeName.RESUMED) for one in heard)


def test_mixed(real: RealModel) -> None:
    lab = real.lab(MIXED)
    try:
        lab.answer_all(real.salted(""), waves=3)
        lab.assert_clean()
    finally:
        lab.close()
