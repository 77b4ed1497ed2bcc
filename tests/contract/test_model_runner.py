"""What every `ModelRunner` promises, over all of them.

A node, a transport and a server are written against this and nothing more: one-step plans that are
complete in themselves, KV that lies in the pool as `KvLayout` says, layers announced in order, and
the same tokens whatever way the KV got where it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pdserve.core.ids import AttemptId, BlockId, Epoch, RequestId, StepId
from pdserve.core.request import SamplingParams
from pdserve.core.step import SampleSpec, StepPlan, StepResult, StepRow
from pdserve.engine.base import ModelRunner
from pdserve.engine.registry import create_runner
from pdserve.weights.folder import ModelFolder

NUM_BLOCKS = 24
BLOCK_SIZE = 16
ATTEMPT = AttemptId(RequestId("r"), Epoch(1))
GREEDY = SamplingParams(max_tokens=9, seed=3, temperature=0.0)
SEEDED = SamplingParams(max_tokens=9, seed=3, temperature=1.0)
PROMPT = tuple(random.Random(1).randrange(256) for _ in range(70))

FAKES = {
    "fake": ("fake", {}),
    "fake, staged": ("fake", {"staged": True}),
    "fake, int8": ("fake", {"dtype": "int8"}),
    "modelled": ("modelled", {}),
    "modelled, int8": ("modelled", {"dtype": "int8"}),
}
TORCH = {
    "torch fp32": {"device": "cpu", "dtype": "fp32"},
    "torch bf16": {"device": "cpu", "dtype": "bf16"},
    "torch int8 KV": {"device": "cpu", "dtype": "bf16", "kv_dtype": "int8"},
    "torch cuda": {"device": "cuda", "dtype": "fp32"},
}


@dataclass
class Worker:
    """A runner with its attached memory, driven by hand as an engine thread would drive it."""

    runner: ModelRunner
    memory: bytearray = field(init=False)
    steps: int = 0

    def __post_init__(self) -> None:
        self.memory = bytearray(self.runner.info.layout.pool_bytes(NUM_BLOCKS))
        self.runner.attach_pool(memoryview(self.memory), NUM_BLOCKS)

    def plan(self, *rows: StepRow, copies: Sequence[tuple[int, int]] = ()) -> StepPlan:
        self.steps += 1
        pairs = tuple((BlockId(source), BlockId(target)) for source, target in copies)
        return StepPlan(step_id=StepId(self.steps), rows=rows, copies=pairs)

    def run(self, *rows: StepRow, copies: Sequence[tuple[int, int]] = ()) -> list[list[int]]:
        result = self.runner.execute(self.plan(*rows, copies=copies))
        return [[sampled.token_id for sampled in tokens] for tokens in result.tokens]

    def decode(self, token: int, start: int, table: Sequence[int], count: int) -> list[int]:
        """``count`` more tokens after ``token``, which stands at position ``start``."""
        tokens = [token]
        for position in range(start, start + count):
            (((next_token,),)) = self.run(row(tokens[-1:], position, table))
            tokens.append(next_token)
        return tokens[1:]

    def block(self, layer: int, block: int) -> slice:
        """Where a block of a layer lies in the attached memory."""
        size = self.runner.info.layout.block_bytes
        start = (layer * NUM_BLOCKS + block) * size
        return slice(start, start + size)

    @property
    def layers(self) -> range:
        return range(self.runner.info.layout.num_layers)


def row(
    token_ids: Sequence[int],
    start: int,
    table: Sequence[int],
    params: SamplingParams | None = GREEDY,
    choices: tuple[int, ...] = (0,),
    index: int = 0,
) -> StepRow:
    sample = None if params is None else SampleSpec(params=params, choices=choices, index=index)
    return StepRow(
        attempt=ATTEMPT,
        token_ids=tuple(token_ids),
        start=start,
        block_ids=tuple(BlockId(block) for block in table),
        sample=sample,
    )


@pytest.fixture(
    params=[
        *FAKES,
        *(pytest.param(name, marks=[pytest.mark.gpu] if "cuda" in name else []) for name in TORCH),
    ]
)
def make_worker(
    request: pytest.FixtureRequest, tiny_model_path: Path
) -> Iterator[Callable[[], Worker]]:
    """Makes workers of one kind, as many as a test needs."""
    made: list[Worker] = []

    def make() -> Worker:
        if request.param in FAKES:
            name, options = FAKES[request.param]
            runner = create_runner(name, block_size=BLOCK_SIZE, **options)
        else:
            folder = ModelFolder.open(tiny_model_path)
            options = TORCH[request.param]
            runner = create_runner(
                "torch",
                folder.config,
                folder.load_tensors(dtype=options["dtype"]),
                weights_digest="tiny",
                block_size=BLOCK_SIZE,
                num_threads=1,
                **options,
            )
        made.append(Worker(runner))
        return made[-1]

    yield make
    for worker in made:
        worker.runner.close()


@pytest.fixture
def worker(make_worker: Callable[[], Worker]) -> Worker:
    return make_worker()


class Listener:
    """A layer sink that keeps what each layer's blocks held when the layer was announced."""

    def __init__(self, worker: Worker, table: Sequence[int]) -> None:
        self.heard: list[tuple[int, int]] = []
        self.bytes: list[bytes] = []
        self._worker = worker
        self._table = table

    def layer_done(self, step_id: StepId, layer: int) -> None:
        self.heard.append((step_id, layer))
        self._worker.runner.read_kv(layer, [BlockId(block) for block in self._table])
        self.bytes.append(
            b"".join(self._worker.memory[self._worker.block(layer, b)] for b in self._table)
        )


def test_a_result_has_an_entry_per_row_and_a_token_per_choice(worker: Worker) -> None:
    plan = worker.plan(
        row(PROMPT[:20], 0, [4, 9], SEEDED, choices=(0, 3, 1)),
        row(PROMPT[:16], 0, [7], None),
        row(PROMPT[:5], 0, [2]),
    )
    result = worker.runner.execute(plan)
    assert isinstance(result, StepResult)
    assert result.step_id == plan.step_id
    assert result.error is None
    assert [len(tokens) for tokens in result.tokens] == [3, 0, 1]
    vocab_size = worker.runner.info.vocab_size
    assert all(0 <= token.token_id < vocab_size for row in result.tokens for token in row)


def test_an_empty_step_is_a_step(worker: Worker) -> None:
    assert worker.run() == []
    assert worker.run(copies=[(0, 1)]) == []


def test_layers_are_announced_in_order_and_finished(worker: Worker) -> None:
    table = [5, 0, 3]
    listener = Listener(worker, table)
    plan = worker.plan(row(PROMPT[:40], 0, table, None), row(PROMPT[:3], 0, [8]))
    worker.runner.execute(plan, listener)
    assert listener.heard == [(plan.step_id, layer) for layer in worker.layers]
    for layer in worker.layers:
        worker.runner.read_kv(layer, [BlockId(block) for block in table])
        kept = b"".join(worker.memory[worker.block(layer, b)] for b in table)
        assert listener.bytes[layer] == kept
        assert any(kept)
    assert len(set(listener.bytes)) == len(worker.layers)


@pytest.mark.parametrize("borders", [[1], [16, 48], [64], [69], [7, 23, 24, 65]])
def test_chunks_give_the_tokens_of_the_whole(worker: Worker, borders: list[int]) -> None:
    whole = [11, 3, 20, 1, 6]
    ((expected,),) = worker.run(row(PROMPT, 0, whole))
    chunked = [2, 9, 4, 17, 8]
    start = 0
    for border in borders:
        worker.run(row(PROMPT[start:border], start, chunked, None), row(PROMPT[:9], 0, [0]))
        start = border
    assert worker.run(row(PROMPT[start:], start, chunked)) == [[expected]]
    assert worker.decode(expected, 70, chunked, 6) == worker.decode(expected, 70, whole, 6)


def test_other_rows_do_not_matter(worker: Worker) -> None:
    alone = worker.run(row(PROMPT[:50], 0, [0, 1, 2, 3], SEEDED, (0, 1), 4))[0]
    worker.run(row(PROMPT[:33], 0, [4, 5, 6], None))
    together = worker.run(
        row(PROMPT[33:34], 33, [4, 5, 6]),
        row(PROMPT[:50], 0, [7, 8, 9, 10], SEEDED, (0, 1), 4),
        row(PROMPT[10:], 0, [11, 12, 13, 14], SEEDED),
    )
    assert together[1] == alone


def test_a_prefix_is_read_from_shared_blocks(worker: Worker) -> None:
    """Two sequences with the same first two blocks; the second computes only the rest."""
    worker.run(row(PROMPT[:45], 0, [0, 1, 2]))
    other = (*PROMPT[:32], *PROMPT[50:60])
    expected = worker.run(row(other, 0, [3, 4, 5]))
    assert worker.run(row(other[32:], 32, [0, 1, 6])) == expected


def test_copies_come_first_and_leave_the_source_alone(worker: Worker) -> None:
    """A fork: the last, partly filled block is copied, and both branches go their way."""
    ((token,),) = worker.run(row(PROMPT[:40], 0, [0, 1, 2]))
    expected = worker.decode(token, 40, [0, 1, 2], 5)
    other = (token + 1) % 256
    branch = worker.run(row([other], 40, [0, 1, 7]), copies=[(2, 7)])
    fresh = worker.run(row((*PROMPT[:40], other), 0, [8, 9, 10]))
    assert branch == fresh
    assert worker.decode(token, 40, [0, 1, 2], 5) == expected


def test_kv_moves_to_another_worker(make_worker: Callable[[], Worker]) -> None:
    """The hand-off: bytes of finished layers, other block ids, and the answer goes on the same."""
    here, there = make_worker(), make_worker()
    assert here.runner.info.layout.mismatch(there.runner.info.layout) is None
    table, target = [5, 0, 3, 21, 8], [1, 23, 4, 2, 9]
    ((token,),) = here.run(row(PROMPT, 0, table))
    for layer in here.layers:
        here.runner.read_kv(layer, [BlockId(block) for block in table])
        for source, destination in zip(table, target, strict=True):
            there.memory[there.block(layer, destination)] = here.memory[here.block(layer, source)]
    there.runner.write_kv([BlockId(block) for block in target])
    expected = here.decode(token, 70, table, 6)
    assert there.decode(token, 70, target, 6) == expected
    for layer in there.layers:
        there.runner.read_kv(layer, [BlockId(target[0])])
        assert there.memory[there.block(layer, target[0])] == here.memory[here.block(layer, 5)]


def test_seeds_choices_and_indexes_make_the_draw(worker: Worker) -> None:
    rows = [row(PROMPT[:9], 0, [0], SEEDED, (0, 1, 2, 3, 4, 5), index) for index in (0, 1)]
    first, second = (worker.run(one)[0] for one in rows)
    assert len(set(first)) > 1
    assert first != second
    assert worker.run(rows[0])[0] == first
    alone = [worker.run(row(PROMPT[:9], 0, [0], SEEDED, (choice,)))[0][0] for choice in range(6)]
    assert alone == first


def test_a_failed_step_is_raised_and_the_next_one_works(worker: Worker) -> None:
    expected = worker.run(row(PROMPT[:9], 0, [0]))
    with pytest.raises(IndexError):
        worker.run(row(PROMPT[:40], 0, [1]))
    assert worker.run(row(PROMPT[:9], 0, [0])) == expected
