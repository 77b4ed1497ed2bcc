"""A step plan as tensors: made once per step, read by every layer.

The tokens of all rows lie one after another, padded up to the granule of the numerics with tokens
that no one looks at: they write no KV, see no attention, and are never sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pdserve.core.step import StepPlan
from pdserve.engine.torch.numerics import Numerics


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Where a row's tokens lie in the step, and its place in the sequence."""

    first: int
    """Index of the row's first token among the step's tokens."""
    num_tokens: int
    start: int
    """Position of the first token in its sequence."""
    block_ids: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class StepBatch:
    """``num_tokens`` real tokens; tensors marked *padded* are longer."""

    num_tokens: int
    token_ids: torch.Tensor  # [padded], int64
    sampled: torch.Tensor  # [padded sampling rows], int64: index of each row's last token
    num_sampled: int
    rows: tuple[RowSpan, ...]
    block_size: int

    def positions(self) -> torch.Tensor:
        """``[padded]``, int64."""
        positions = torch.zeros_like(self.token_ids)
        for row in self.rows:
            end = row.first + row.num_tokens
            torch.arange(row.start, row.end, out=positions[row.first : end])
        return positions

    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Block of each token, and its position in that; both ``[num_tokens]``, int64."""
        device = self.token_ids.device
        positions = self.positions()[: self.num_tokens]
        places = positions // self.block_size
        blocks = torch.empty_like(places)
        for row in self.rows:
            tokens = slice(row.first, row.first + row.num_tokens)
            blocks[tokens] = torch.tensor(row.block_ids, device=device)[places[tokens]]
        return blocks, positions % self.block_size


@dataclass(frozen=True, slots=True)
class Bounds:
    """Sizes of the tables that a plan's ids are indexes into."""

    vocab_size: int
    max_model_tokens: int
    num_blocks: int
    block_size: int


def build_batch(
    plan: StepPlan, bounds: Bounds, numerics: Numerics, device: torch.device
) -> StepBatch:
    """Turn a plan into tensors on ``device``.

    Raises `IndexError` if an id or a position lies outside its table. That is a bug of the planner;
    on CUDA it would otherwise kill the whole process.
    """
    token_ids: list[int] = []
    sampled: list[int] = []
    rows: list[RowSpan] = []
    for row in plan.rows:
        assert row.token_ids, "a row of a step has at least one token"
        table = row.block_ids
        if row.end > min(len(table) * bounds.block_size, bounds.max_model_tokens):
            raise IndexError(f"row of {row.attempt} ends at {row.end}, outside its table or model")
        _check(table, bounds.num_blocks, "block")
        rows.append(RowSpan(len(token_ids), len(row.token_ids), row.start, table))
        token_ids.extend(row.token_ids)
        if row.sample is not None:
            sampled.append(len(token_ids) - 1)
    _check(token_ids, bounds.vocab_size, "token")
    for pair in plan.copies:
        _check(pair, bounds.num_blocks, "block")
    return StepBatch(
        num_tokens=len(token_ids),
        token_ids=padded_indexes(token_ids, numerics, device),
        sampled=padded_indexes(sampled, numerics, device),
        num_sampled=len(sampled),
        rows=tuple(rows),
        block_size=bounds.block_size,
    )


def _check(ids: tuple[int, ...] | list[int], size: int, what: str) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < size:
        raise IndexError(f"the plan names {what} ids outside 0..{size - 1}")


def padded_indexes(values: list[int], numerics: Numerics, device: torch.device) -> torch.Tensor:
    """``[padded]`` int64, filled up with zeros to the granule of the numerics."""
    missing = numerics.padded(len(values)) - len(values)
    return torch.tensor(values + [0] * missing, dtype=torch.int64, device=device)
