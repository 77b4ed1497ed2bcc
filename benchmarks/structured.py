"""What it costs to hold answers to a form.

Three parts, each by its name, or all of them:

``steps``    decode steps of the engine with none, one, half and all of its rows held to a form, in
             turn: time of the step, CPU of the engine's thread and of the process (with the thread
             that computes masks), each against the step without forms of the same round.
``compile``  CPU of compiling forms of growing size; and what the server's check makes of a hostile
             one. With ``--unbounded`` that is also compiled without bounds: half a minute and
             2.6 GB.
``server``   one worker or ``--split`` over two: time per output token of ``--streams`` streams,
             all of them held to a form against none; time to first token of one request with no
             form, one that is known, and one that is new; and the worker's first one ever.

    python benchmarks/structured.py [steps] [compile] [server] [--rows 8] [--split] ...
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import resource
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import torch
from llguidance import LLMatcher
from server import serving

from pdserve.api.constraint_check import ConstraintCheck
from pdserve.api.gateway import ModelCard
from pdserve.core.errors import RequestError
from pdserve.core.ids import AttemptId, BlockId, Epoch, RequestId, StepId
from pdserve.core.request import Constraint, ConstraintKind, SamplingParams
from pdserve.core.step import SampleSpec, StepPlan, StepRow
from pdserve.engine.torch.runner import TorchRunner
from pdserve.text.structured.grammar import grammar_of
from pdserve.text.structured.masks import TokenMasks
from pdserve.text.structured.vocabulary import make_vocabulary
from pdserve.text.tokenizer import Tokenizer
from pdserve.text.tools.forced import Tool, free_calls
from pdserve.text.tools.registry import HERMES
from pdserve.weights.folder import ModelFolder
from pdserve.weights.pull import resolve

BLOCK_SIZE = 16
CONTEXT = 256
PROMPT = "Write about a town by the sea and the people who live in it, as JSON. " * 4
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "pattern": "^[a-z]+@[a-z]+\\.[a-z]{2,3}$"},
        "colour": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "email", "colour", "tags"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": PERSON, "minItems": 10_000}
"""No answer of the length asked for completes it."""


def json_form(schema: Any) -> Constraint:
    return Constraint(ConstraintKind.JSON, json.dumps(schema))


FORMS = {
    "schema": json_form(ENDLESS),
    "any JSON": json_form({"type": "array", "minItems": 10_000}),
    "regex": Constraint(ConstraintKind.REGEX, r"([a-z]+ ){10000}"),
    "strict tools": free_calls(
        [Tool("person", PERSON, strict=True)], HERMES, only_one=False, is_special=lambda text: False
    ),
}

HOSTILE = {
    "allOf": [
        {
            "anyOf": [
                {"type": "string", "pattern": f".*{c}.{{20}}.*"},
                {"type": "object", "properties": {f"k{c}": {"type": "string"}}},
            ]
        }
        for c in "abcdefghijklmnopqrst"
    ]
}


# --- steps of the engine -------------------------------------------------------------------------


class Rows:
    """A batch that decodes for ever: each row goes on with what it has drawn."""

    def __init__(self, number: int, num_constrained: int, form: Constraint, eos: int) -> None:
        self._forms = [form if i < num_constrained else None for i in range(number)]
        self._eos = eos
        self._outputs: list[tuple[int, ...]] = [()] * number
        self._epochs = [1] * number

    def plan(self) -> StepPlan:
        return StepPlan(step_id=StepId(1), rows=tuple(map(self._row, range(len(self._forms)))))

    def take(self, tokens: list[int]) -> None:
        for row, token in enumerate(tokens):
            if token == self._eos:
                self._outputs[row] = ()
                self._epochs[row] += 1
            else:
                self._outputs[row] += (token,)

    def _row(self, row: int) -> StepRow:
        output, form = self._outputs[row], self._forms[row]
        each = CONTEXT // BLOCK_SIZE
        params = SamplingParams(
            max_tokens=4096, seed=row, eos_token_ids=(self._eos,), constraint=form
        )
        return StepRow(
            attempt=AttemptId(RequestId(f"{form is None}-{row}"), Epoch(self._epochs[row])),
            token_ids=(output[-1] if output else 100,),
            start=CONTEXT - 1,
            block_ids=tuple(map(BlockId, range(row * each, (row + 1) * each))),
            sample=SampleSpec(
                params=params,
                choices=(0,),
                index=len(output),
                history=None if form is None else output,
            ),
        )


def clocks() -> tuple[float, float, float]:
    return time.perf_counter(), time.thread_time(), time.process_time()


def steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of steps by form and number of constrained rows."""
    torch.set_num_threads(1)
    folder = ModelFolder.open(resolve(arguments.model, progress=False))
    runner, eos = a_runner(folder), folder.config.eos_token_ids[0]
    num_blocks = arguments.rows * CONTEXT // BLOCK_SIZE
    memory = bytearray(runner.info.layout.pool_bytes(num_blocks))
    runner.attach_pool(memoryview(memory), num_blocks)
    counts = sorted({1, max(1, arguments.rows // 2), arguments.rows})
    report = {}
    for name, form in FORMS.items():
        batches = {k: Rows(arguments.rows, k, form, eos) for k in (0, *counts)}
        taken: dict[int, list[tuple[float, ...]]] = {k: [] for k in batches}
        for number in range(arguments.steps + 5):
            for k, rows in batches.items():
                plan, before = rows.plan(), clocks()
                result = runner.execute(plan)
                spent = tuple(b - a for a, b in zip(before, clocks(), strict=True))
                assert not result.failures, result.failures
                rows.take([tokens[0].token_id for tokens in result.tokens])
                if number >= 5:
                    taken[k].append(spent)
        report[name] = {k: _against(taken[k], taken[0]) for k in batches}
    runner.close()
    return report


def a_runner(folder: ModelFolder) -> TorchRunner:
    config, path = folder.config, folder.path
    return TorchRunner(
        config,
        folder.load_tensors(dtype="bf16"),
        weights_digest="benchmark",
        device="cpu",
        dtype="bf16",
        block_size=BLOCK_SIZE,
        num_threads=1,
        masks=TokenMasks(
            lambda: make_vocabulary(
                Tokenizer.from_folder(path), config.vocab_size, config.eos_token_ids
            ),
            config.vocab_size,
        ),
    )


def _against(taken: list[tuple[float, ...]], base: list[tuple[float, ...]]) -> dict[str, float]:
    report = {}
    for place, clock in enumerate(("step", "engine_cpu", "process_cpu")):
        mine = [spent[place] for spent in taken]
        ratios = [a[place] / b[place] for a, b in zip(taken, base, strict=True)]
        report[f"{clock}_ms"] = statistics.median(mine) * 1e3
        report[f"{clock}_p99_ms"] = sorted(mine)[int(0.99 * len(mine))] * 1e3
        report[f"{clock}_ratio"] = statistics.median(ratios)
    return report


def print_steps(report: dict[str, Any]) -> None:
    print(f"{'form':13}{'rows held':>11}{'step ms':>9}{'P99':>8}{'ratio':>7}", end="")
    print(f"{'engine CPU':>12}{'ratio':>7}{'process CPU':>13}{'ratio':>7}")
    for name, of_form in report.items():
        for k, cost in of_form.items():
            print(
                f"{name:13}{k:11}{cost['step_ms']:7.2f}{cost['step_p99_ms']:8.2f}"
                f"{cost['step_ratio']:7.3f}{cost['engine_cpu_ms']:12.2f}"
                f"{cost['engine_cpu_ratio']:7.3f}{cost['process_cpu_ms']:13.2f}"
                f"{cost['process_cpu_ratio']:7.3f}"
            )


# --- compiling -----------------------------------------------------------------------------------


def of_size() -> Iterator[tuple[str, Any]]:
    yield "five properties", PERSON
    for n in (30, 300, 1000, 3000):
        types = ("string", "integer", "array")
        properties = {f"property {i}": {"type": types[i % 3]} for i in range(n)}
        yield (
            f"{n} properties",
            {"type": "object", "properties": properties, "required": list(properties)},
        )
    for n in (100, 10_000):
        yield f"one of {n} texts", {"enum": [f"value number {i}" for i in range(n)]}
    nested: Any = PERSON
    for _ in range(20):
        nested = {"type": "object", "properties": {"it": nested}, "required": ["it"]}
    yield "20 levels deep", nested


def compiling(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU in milliseconds. Each form is new: nothing of it is remembered."""
    folder = ModelFolder.open(resolve(arguments.model, progress=False))
    config = folder.config
    started = time.process_time()
    tokenizer = Tokenizer.from_folder(folder.path)
    words = make_vocabulary(tokenizer, config.vocab_size, config.eos_token_ids)
    report: dict[str, Any] = {"vocabulary_ms": (time.process_time() - started) * 1e3, "forms": {}}
    for name, schema in of_size():
        form = json_form(schema)
        times = []
        for _ in range(3):
            started = time.process_time()
            matcher = LLMatcher(words, grammar_of(form), log_level=0)
            compiled = time.process_time()
            assert not matcher.is_error(), matcher.get_error()
            matcher.compute_bitmask()
            times.append((compiled - started, time.process_time() - compiled))
        compile_s, mask_s = map(statistics.median, zip(*times, strict=True))
        report["forms"][name] = {
            "chars": len(form.text),
            "compile_ms": compile_s * 1e3,
            "first_mask_ms": mask_s * 1e3,
        }
    report["hostile_chars"] = len(json.dumps(HOSTILE))
    report["check"] = asyncio.run(refusal(tokenizer, config))
    if arguments.unbounded:
        started = time.process_time()
        LLMatcher(words, grammar_of(json_form(HOSTILE)), log_level=0).compute_bitmask()
        report["unbounded_s"] = time.process_time() - started
        report["unbounded_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return report


async def refusal(tokenizer: Tokenizer, config: Any) -> dict[str, Any]:
    """What the gateway's check does about the hostile form, in wall time."""
    card = ModelCard(
        name="benchmark",
        vocab_size=config.vocab_size,
        max_model_tokens=config.max_model_tokens,
        created=0,
        eos_token_ids=config.eos_token_ids,
    )
    check = ConstraintCheck(tokenizer, card)
    await check(json_form(PERSON), "warm")
    started = time.perf_counter()
    try:
        await check(json_form(HOSTILE), "response_format")
    except RequestError as error:
        return {"s": time.perf_counter() - started, "said": str(error)}
    return {"s": time.perf_counter() - started, "said": None}


def print_compiling(report: dict[str, Any]) -> None:
    print(f"the model's words: {report['vocabulary_ms']:.0f} ms, once a worker")
    print(f"{'form':20}{'characters':>12}{'compile ms':>12}{'first mask ms':>15}")
    for name, cost in report["forms"].items():
        print(f"{name:20}{cost['chars']:12}{cost['compile_ms']:12.2f}{cost['first_mask_ms']:15.2f}")
    check = report["check"]
    print(
        f"hostile ({report['hostile_chars']} characters): after {check['s']:.2f} s {check['said']}"
    )
    if "unbounded_s" in report:
        print(f"  without bounds {report['unbounded_s']:.0f} s, {report['unbounded_gb']:.1f} GB")


# --- the whole server ----------------------------------------------------------------------------


def token_times(url: str, **fields: Any) -> list[float]:
    """When each piece of a streamed answer came, in seconds from the request."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port)
    body = {"prompt": PROMPT, "stream": True, "ignore_eos": True, **fields}
    started = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(answer.read().decode())
    times = [
        time.perf_counter() - started
        for line in answer
        if line.startswith(b"data: {") and b'"text":""' not in line
    ]
    connection.close()
    return times


def tpot_ms(url: str, arguments: argparse.Namespace, **fields: Any) -> list[float]:
    def one(seed: int) -> float:
        fields_of = {"seed": seed, "max_tokens": arguments.tokens, "return_token_ids": True}
        times = token_times(url, **fields_of, **fields)
        return (times[-1] - times[0]) / (arguments.tokens - 1) * 1e3

    with ThreadPoolExecutor(arguments.streams) as threads:
        return list(threads.map(one, range(arguments.streams)))


def server(arguments: argparse.Namespace) -> dict[str, Any]:
    flags = ["--model", arguments.model, "--threads", "1", "--prefill"]
    flags += ["1", "--decode", "1"] if arguments.split else ["0", "--decode", "0", "--mixed", "1"]
    held = {"structured_outputs": {"json": ENDLESS}}
    pace: dict[str, list[float]] = {"free": [], "held": []}
    first: dict[str, list[float]] = {"no form": [], "known form": [], "new form": []}
    with serving(flags) as running:

        def ask(**fields: Any) -> float:
            return token_times(running.url, max_tokens=1, **fields)[0] * 1e3

        ask()
        ever = ask(**held)
        for number in range(arguments.first_tokens):
            schema = {**PERSON, "title": f"number {number}"}
            first["no form"].append(ask())
            first["known form"].append(ask(**held))
            first["new form"].append(ask(structured_outputs={"json": schema}))
        tpot_ms(running.url, arguments, **held)
        for _ in range(arguments.rounds):
            pace["free"].append(statistics.median(tpot_ms(running.url, arguments)))
            pace["held"].append(statistics.median(tpot_ms(running.url, arguments, **held)))
    ratios = [a / b for a, b in zip(pace["held"], pace["free"], strict=True)]
    return {
        "ttft_ms": {name: statistics.median(times) for name, times in first.items()},
        "first_ever_ms": ever,
        "tpot_ms": {name: statistics.median(times) for name, times in pace.items()},
        "tpot_ratio": statistics.median(ratios),
        "tpot_ratio_range": (min(ratios), max(ratios)),
    }


def print_server(report: dict[str, Any]) -> None:
    for name, value in {**report["ttft_ms"], "first ever": report["first_ever_ms"]}.items():
        print(f"TTFT, {name:14}{value:9.1f} ms")
    for name, value in report["tpot_ms"].items():
        print(f"TPOT, {name:14}{value:9.2f} ms")
    low, high = report["tpot_ratio_range"]
    print(f"held / free      {report['tpot_ratio']:8.3f}  ({low:.3f} to {high:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=("steps", "compile", "server", []))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--unbounded", action="store_true")
    parser.add_argument("--split", action="store_true", help="one prefill and one decode worker")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-tokens", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    wanted = arguments.parts or ["steps", "compile", "server"]
    parts = {"steps": steps, "compile": compiling, "server": server}
    report = {name: parts[name](arguments) for name in wanted}
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    printers = {"steps": print_steps, "compile": print_compiling, "server": print_server}
    for name, figures in report.items():
        printers[name](figures)


if __name__ == "__main__":
    main()
