"""The torch runner on a CUDA device: the same answers, and KV that can be read while it computes.

`tests/contract/test_model_runner.py` runs its whole suite on CUDA as well.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from pdserve.core.ids import AttemptId, BlockId, Epoch, RequestId, StepId
from pdserve.core.request import SamplingParams
from pdserve.core.step import SampleSpec, StepPlan, StepRow
from pdserve.engine.torch.pool import DevicePool, tensor_over
from pdserve.engine.torch.runner import TorchRunner
from pdserve.weights.folder import ModelFolder

pytestmark = pytest.mark.gpu

NUM_BLOCKS = 64
GREEDY = SamplingParams(max_tokens=9, seed=3, temperature=0.0)


def step(step_id: int, rows: Sequence[tuple[Sequence[int], int, Sequence[int]]]) -> StepPlan:
    """Greedy rows of (token ids, start, blocks)."""
    return StepPlan(
        step_id=StepId(step_id),
        rows=tuple(
            StepRow(
                attempt=AttemptId(RequestId("r"), Epoch(1)),
                token_ids=tuple(token_ids),
                start=start,
                block_ids=tuple(BlockId(block) for block in table),
                sample=SampleSpec(params=GREEDY, choices=(0,), index=0),
            )
            for token_ids, start, table in rows
        ),
    )


@pytest.fixture
def make_runner(tiny_model_path: Path) -> Callable[[str, str, str], tuple[TorchRunner, bytearray]]:
    def make(device: str, dtype: str, numerics: str) -> tuple[TorchRunner, bytearray]:
        folder = ModelFolder.open(tiny_model_path)
        runner = TorchRunner(
            folder.config,
            folder.load_tensors(dtype=dtype),
            weights_digest="tiny",
            device=device,
            dtype=dtype,
            block_size=16,
            num_threads=1,
            numerics=numerics,
        )
        memory = bytearray(runner.info.layout.pool_bytes(NUM_BLOCKS))
        runner.attach_pool(memoryview(memory), NUM_BLOCKS)
        return runner, memory

    return make


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-2), ("bf16", 0.5)])
def test_logits_are_near_those_of_the_cpu(
    dtype: str,
    tolerance: float,
    numerics: str,
    make_runner: Callable[..., tuple[TorchRunner, bytearray]],
) -> None:
    """fp32 may use TF32 products if the user's torch is set so; the bound allows for it."""
    rng = random.Random(2)
    rows = [
        ([rng.randrange(384) for _ in range(n)], 0, range(8 * i, 8 * i + 8))
        for i, n in enumerate((1, 40, 100))
    ]
    on_gpu, _ = make_runner("cuda", dtype, numerics)
    on_cpu, _ = make_runner("cpu", "fp32", "exact")
    actual = on_gpu.logits(step(1, rows)).cpu()
    torch.testing.assert_close(actual, on_cpu.logits(step(1, rows)), rtol=0, atol=tolerance)
    assert on_gpu.info.layout.numerics.startswith(f"cuda-{dtype}-torch")


def test_a_layer_is_readable_from_another_thread_when_it_is_announced(
    make_runner: Callable[..., tuple[TorchRunner, bytearray]],
) -> None:
    """What the pusher copies while later layers compute is what the pool holds in the end."""
    runner, memory = make_runner("cuda", "fp32", "exact")
    staging = tensor_over(memoryview(memory), runner.info.layout, NUM_BLOCKS)
    table = [BlockId(block) for block in (9, 2, 40, 17, 5)]
    copies: dict[int, torch.Tensor] = {}

    class Pusher:
        def layer_done(self, step_id: StepId, layer: int) -> None:
            def push() -> None:
                runner.read_kv(layer, table)
                copies[layer] = staging[layer, list(table)].clone()

            thread = threading.Thread(target=push)
            thread.start()
            thread.join()

    tokens = [random.Random(3).randrange(384) for _ in range(80)]
    runner.execute(step(1, [(tokens, 0, table)]), Pusher())
    torch.cuda.synchronize()
    pool = runner._attached()
    assert isinstance(pool, DevicePool)
    for layer, copied in copies.items():
        assert torch.equal(copied, pool.layer(layer)[list(table)].cpu())
        assert copied.count_nonzero() > 0
    assert len(copies) == runner.info.layout.num_layers


def test_bytes_from_a_cpu_worker_go_on_here(
    make_runner: Callable[..., tuple[TorchRunner, bytearray]],
) -> None:
    """A CPU worker's KV, absorbed by a CUDA worker: the next token's logits are the CPU's."""
    here, memory = make_runner("cpu", "fp32", "exact")
    there, landing = make_runner("cuda", "fp32", "exact")
    tokens = [random.Random(4).randrange(384) for _ in range(60)]
    table = [3, 1, 4, 15]
    here.execute(step(1, [(tokens[:59], 0, table)]))
    landing[:] = memory
    there.write_kv([BlockId(block) for block in table])
    last = step(2, [(tokens[59:], 59, table)])
    torch.testing.assert_close(there.logits(last).cpu(), here.logits(last), rtol=0, atol=1e-2)
