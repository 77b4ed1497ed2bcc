"""The served answers against transformers' on the real model, through the whole split server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

MAX_TOKENS = 8
MAX_LOGIT_GAP = 0.35
CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "reference_prompts.json").read_text()
)


class Reference:
    """transformers' model in fp32. A prompt is read once, whatever answers follow it.

    On one thread: two would wait for each other in a loop where a server is at work beside them.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._read: dict[tuple[int, ...], tuple[torch.Tensor, Any]] = {}

    def logits(self, prompt_ids: list[int], output_ids: list[int]) -> torch.Tensor:
        """``[output token, vocab]``: from which each output token is chosen, teacher-forced."""
        with torch.inference_mode():
            first, cache = self.read(prompt_ids)
            if len(output_ids) == 1:
                return first
            later = torch.tensor([output_ids[:-1]])
            made = self._model(later, past_key_values=cache, use_cache=True)
            cache.crop(1 - len(output_ids))  # back to the prompt
            return torch.cat((first, made.logits[0]))

    def read(self, prompt_ids: list[int]) -> tuple[torch.Tensor, Any]:
        """Logits after the prompt, ``[1, vocab]``, and transformers' KV of it."""
        key = tuple(prompt_ids)
        if key not in self._read:
            with torch.inference_mode():
                made = self._model(torch.tensor([prompt_ids]), logits_to_keep=1, use_cache=True)
            self._read[key] = (made.logits[0], made.past_key_values)
        return self._read[key]


@pytest.fixture(scope="module")
def reference(smollm_path: Path) -> Iterator[Reference]:
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(smollm_path, dtype=torch.float32)
    yield Reference(model.eval())
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reference_tokenizer(smollm_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm_path)


def served(server: Any, model: str) -> list[tuple[list[int], list[int]]]:
    """(prompt token ids, output token ids) of every case."""
    asked = {
        "model": model,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "extra_body": {"return_token_ids": True},
    }
    answers = []
    with server.client() as client:
        for case in CASES:
            if "messages" in case:
                answer = client.chat.completions.create(**asked, messages=case["messages"])
                prompt_ids = answer.model_extra["prompt_token_ids"]
            else:
                prompt = case["prompt"] * case.get("repeat", 1)
                answer = client.completions.create(**asked, prompt=prompt)
                prompt_ids = answer.choices[0].model_extra["prompt_token_ids"]
            answers.append((prompt_ids, answer.choices[0].model_extra["token_ids"]))
    return answers


def case_ids(tokenizer: Any, case: dict[str, Any]) -> list[int]:
    """The prompt's token ids as transformers makes them."""
    if "messages" in case:
        text = tokenizer.apply_chat_template(
            case["messages"], tokenize=False, add_generation_prompt=True
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(case["prompt"] * case.get("repeat", 1))["input_ids"]


def test_greedy_in_fp32_equals_transformers(
    start_server: Any, reference: Reference, reference_tokenizer: Any
) -> None:
    """Each token is the best one given those before it, hence the whole answer is the same."""
    server = start_server("--dtype", "fp32", "--prefill", "1", "--decode", "1", "--threads", "1")
    with ThreadPoolExecutor(1) as beside:
        answers = beside.submit(served, server, "smollm2-135m")
        for case in CASES:
            reference.read(case_ids(reference_tokenizer, case))
    lengths = []
    for case, (prompt_ids, output_ids) in zip(CASES, answers.result(), strict=True):
        assert prompt_ids == case_ids(reference_tokenizer, case)
        lengths.append(len(prompt_ids))
        expected = reference.logits(prompt_ids, output_ids).argmax(dim=1).tolist()
        assert output_ids == expected, case
        assert len(output_ids) == MAX_TOKENS or output_ids[-1] == reference_tokenizer.eos_token_id
    assert len(CASES) >= 40
    assert min(lengths) == 1
    assert max(lengths) > 2000


def test_bf16_stays_close_to_fp32(start_server: Any, reference: Reference) -> None:
    server = start_server("--dtype", "bf16", "--prefill", "1", "--decode", "1", "--threads", "1")
    worst = 0.0
    for prompt_ids, output_ids in served(server, "smollm2-135m"):
        logits = reference.logits(prompt_ids, output_ids)
        chosen = logits.gather(1, torch.tensor(output_ids)[:, None])[:, 0]
        worst = max(worst, float((logits.amax(dim=1) - chosen).max()))
    assert worst <= MAX_LOGIT_GAP
