"""The main job: one process reads the prompt, another writes the answer, the client sees one."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Flags = tuple[str, ...]
FLAGS: Flags = (
    *("--dtype", "fp32", "--kv-blocks", "512", "--threads", "1"),
    *("--policy", "shortest_queue"),  # for a model this small no prediction favours a hand-off
)


def test_a_stream_is_prefilled_here_and_decoded_there_and_nothing_is_left_behind(
    start_server: Callable[..., Any],
    tiny_model_path: Path,
    wait_for_exit: Callable[[list[int]], None],
) -> None:
    server = start_server(
        "--model", str(tiny_model_path), *FLAGS, "--prefill", "1", "--decode", "1"
    )
    prompt = "the cat sat on the mat " * 40
    with server.client() as client:
        (model,) = client.models.list().data
        asked = {"model": model.id, "prompt": prompt, "max_tokens": 40, "temperature": 0}
        whole = client.completions.create(**asked)
        stream = client.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].text
    assert len(pieces) > 10
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 40)
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    assert usage.prompt_tokens_details.cached_tokens == (usage.prompt_tokens - 1) // 16 * 16
    assert whole.usage.completion_tokens == 40

    workers = server.workers()
    while workers["decode-0"]["load"]["num_steps"] < 2 * 39:  # the last report is on its way
        workers = server.workers()
    assert {name: worker["role"] for name, worker in workers.items()} == {
        "prefill-0": "prefill",
        "decode-0": "decode",
    }
    assert workers["prefill-0"]["load"]["transfer_bytes"] > 0
    assert workers["prefill-0"]["load"]["num_steps"] <= 4
    timeline = server.get(f"/v1/requests/{whole.id}/timeline")
    (attempt,) = timeline["attempts"]
    assert attempt["route"] == "split"
    assert (attempt["prefill_worker"], attempt["decode_worker"]) == ("prefill-0", "decode-0")

    pids = server.pids()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0, server.log
    wait_for_exit(pids)


def test_a_pool_of_int8_moves_fewer_bytes_and_split_answers_like_local(
    start_server: Callable[..., Any], tiny_model_path: Path
) -> None:
    prompt = "a tortoise that had nowhere to be " * 30
    answers, scored, sent_bytes = [], [], []
    for counts in (("--prefill", "1", "--decode", "1"), ("--mixed", "1")):
        server = start_server(
            "--model", str(tiny_model_path), *FLAGS, *counts, "--kv-dtype", "int8"
        )
        with server.client() as client:
            answers.append(
                client.completions.create(
                    model=tiny_model_path.name, prompt=prompt, max_tokens=30, seed=4, logprobs=1
                )
            )
            for extra in ({}, {"prompt_logprobs": 1}):
                answer = client.completions.create(
                    model=tiny_model_path.name, prompt=prompt, max_tokens=2, extra_body=extra
                )
                scored.append(answer)
        loads = [worker["load"] for worker in server.workers().values()]
        sent_bytes.append(sum(load["transfer_bytes"] for load in loads))
        server.close()
    split, local = (answer.choices[0] for answer in answers)
    assert split.text == local.text
    assert split.logprobs == local.logprobs
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (*answers, *scored)]
    num_full = (answers[0].usage.prompt_tokens - 1) // 16 * 16
    assert cached == [0, 0, num_full, 0, num_full, 0]
    scores = [answer.choices[0].model_extra["prompt_logprobs"] for answer in scored[1::2]]
    assert scores[0] == scores[1]
    assert len(scores[0]) == answers[0].usage.prompt_tokens
    num_blocks = -(-answers[0].usage.prompt_tokens // 16)
    assert sent_bytes[1] == 0
    # 2 layers, keys and values, 2 heads of 16 bytes and a scale, 16 tokens.
    # The second and third request send only what the first has not left there.
    assert 0 < sent_bytes[0] <= (num_blocks + 3) * 2 * 2 * 2 * 16 * (16 + 4)


@pytest.mark.parametrize("counts", [("--mixed", "1"), ("--prefill", "1"), ("--decode", "1")])
def test_any_single_worker_can_serve(
    start_server: Callable[..., Any], tiny_model_path: Path, paced: Flags, counts: Flags
) -> None:
    server = start_server("--model", str(tiny_model_path), *paced, *counts)
    with server.client() as client:
        answer = client.completions.create(
            model=tiny_model_path.name, prompt="hello", max_tokens=5, temperature=0
        )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
