"""Repetition, frequency and presence penalties, from the token ids of a row's history.

The repetition penalty (Keskar et al. 2019, arXiv:1909.05858, section 4.1, with the sign rule of
transformers and vLLM) divides a positive logit and multiplies a negative one, for every token of
prompt or output. Frequency and presence penalties (OpenAI API reference) are subtracted, per
occurrence and once, for tokens of the output. Only touched logits are read and written.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pdserve.core.step import SampleSpec


def apply_penalties(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """A copy of ``logits [row, vocab]`` with the penalties of each row's spec applied."""
    rows: list[np.ndarray] = []
    tokens: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for row, spec in enumerate(specs):
        if not spec.params.has_penalties:
            continue
        assert spec.history is not None, "the planner gives history to rows with penalties"
        history = np.asarray(spec.history, dtype=np.int64)
        output = history[spec.num_prompt_tokens :]
        seen = np.unique(history[(history >= 0) & (history < logits.shape[1])])
        rows.append(np.full(len(seen), row))
        tokens.append(seen)
        counts.append(np.searchsorted(np.sort(output), seen, side="right"))
        counts[-1] -= np.searchsorted(np.sort(output), seen, side="left")
    row_index = torch.from_numpy(np.concatenate(rows)).to(logits.device)
    token_index = torch.from_numpy(np.concatenate(tokens)).to(logits.device)
    count = torch.from_numpy(np.concatenate(counts)).to(logits.device, torch.float32)

    def per_entry(name: str) -> torch.Tensor:
        values = [getattr(spec.params, name) for spec in specs]
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[row_index]

    value = logits[row_index, token_index]
    repetition = per_entry("repetition_penalty")
    value = torch.where(value > 0, value / repetition, value * repetition)
    value = value - per_entry("frequency_penalty") * count
    value = value - per_entry("presence_penalty") * (count > 0)
    penalised = logits.clone()
    penalised[row_index, token_index] = value
    return penalised
