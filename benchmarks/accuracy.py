"""What fewer bits cost: perplexity of a fixed text, and the gap to fp32 token by token.

The text (accuracy_text.txt: a public declaration, stories, instructions, a little code) is fed to
the model as it stands, and every position's next-token distribution is compared with that of fp32
on torch alone. Reported for each kind of weights and KV: the perplexity, the mean Kullback-Leibler
divergence from fp32, how often the best token is the same, and the mean and largest change of the
log-probability of the text's own token.

    python benchmarks/accuracy.py [--model smollm2-135m] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

import torch

from pdserve.core.ids import AttemptId, BlockId, Epoch, RequestId, StepId
from pdserve.core.request import SamplingParams
from pdserve.core.step import SampleSpec, StepPlan, StepRow
from pdserve.engine.native.library import KERNELS_VARIABLE
from pdserve.engine.torch.runner import TorchRunner
from pdserve.text.tokenizer import Tokenizer
from pdserve.weights.folder import ModelFolder
from pdserve.weights.pull import resolve

BLOCK_SIZE = 16
STEP_ROWS = 32
KINDS = {  # name -> (dtype, weight dtype, KV dtype, kernels: None is the best level)
    "fp32, torch": ("fp32", "auto", "auto", "torch"),
    "fp32, torch, int8 KV": ("fp32", "auto", "int8", "torch"),
    "bf16, torch": ("bf16", "auto", "auto", "torch"),
    "bf16": ("bf16", "auto", "auto", None),
    "int8 KV": ("bf16", "auto", "int8", None),
    "int8 weights": ("bf16", "int8", "auto", None),
    "int8 weights and KV": ("bf16", "int8", "int8", None),
}


def logprobs_of(folder: ModelFolder, token_ids: list[int], kind: str) -> torch.Tensor:
    """Log-probabilities of every position's next token, ``[tokens - 1, vocab]`` fp32."""
    dtype, weight_dtype, kv_dtype, kernels = KINDS[kind]
    os.environ.pop(KERNELS_VARIABLE, None)
    if kernels is not None:
        os.environ[KERNELS_VARIABLE] = kernels
    runner = TorchRunner(
        folder.config,
        folder.load_tensors(dtype=dtype),
        weights_digest="",
        device="cpu",
        dtype=dtype,
        block_size=BLOCK_SIZE,
        num_threads=1,
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype,
    )
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    memory = bytearray(runner.info.layout.pool_bytes(num_blocks))
    runner.attach_pool(memoryview(memory), num_blocks)
    spec = SampleSpec(params=SamplingParams(max_tokens=1, seed=0), choices=(0,), index=0)
    attempt = AttemptId(RequestId("text"), Epoch(1))
    table = tuple(BlockId(block) for block in range(num_blocks))
    rows = [
        StepRow(
            attempt=attempt,
            token_ids=(token,),
            start=position,
            block_ids=table,
            sample=spec,
        )
        for position, token in enumerate(token_ids[:-1])
    ]
    # A step writes the KV of all its rows before any is attended to: one row for each position.
    steps = [rows[first : first + STEP_ROWS] for first in range(0, len(rows), STEP_ROWS)]
    logprobs = [
        runner.logits(StepPlan(step_id=StepId(number), rows=tuple(step), copies=())).log_softmax(-1)
        for number, step in enumerate(steps)
    ]
    runner.close()
    return torch.cat(logprobs)


def compare(
    actual: torch.Tensor, expected: torch.Tensor, targets: torch.Tensor
) -> dict[str, float]:
    """Figures of one kind against fp32; both are log-probabilities, ``[position, vocab]``."""
    own = actual.gather(1, targets[:, None])[:, 0].double()
    change = own - expected.gather(1, targets[:, None])[:, 0]
    divergence = (expected.exp() * (expected - actual)).sum(-1)
    return {
        "perplexity": math.exp(-float(own.mean())),
        "divergence_nats": float(divergence.mean()),
        "same_best_token": float((actual.argmax(-1) == expected.argmax(-1)).double().mean()),
        "mean_change_nats": float(change.abs().mean()),
        "largest_change_nats": float(change.abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = ModelFolder.open(resolve(options.model))
    text = Path(__file__).with_name("accuracy_text.txt").read_text(encoding="utf-8")
    token_ids = list(Tokenizer.from_folder(folder.path).encode(text))
    targets = torch.tensor(token_ids[1:])
    expected, report = None, {}
    for kind in KINDS:
        actual = logprobs_of(folder, token_ids, kind)
        expected = actual if expected is None else expected
        report[kind] = compare(actual, expected, targets)
        if not options.json:
            print(kind, " ".join(f"{name} {value:.5f}" for name, value in report[kind].items()))
    if options.json:
        print(json.dumps({"tokens": len(token_ids), "kinds": report}))


if __name__ == "__main__":
    main()
