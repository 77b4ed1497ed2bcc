"""Attention over the paged pool, behind a seam: `prepare` once per step, `attend` in every layer.

`TiledAttention` is the reference, and what computes without compiled kernels. It is written so that
a query's result depends on its own vector and on the keys and values before it, bit by bit, and on
nothing else of the step:

1. Keys and values are gathered into fp32 tiles of `KV_TILE` positions, counted from position 0. The
   tail of the last tile is masked, and its values are zeroed, so stale bytes cannot matter.
2. Scores are one product per kv head, summed over head_dim only; the query heads of one kv head lie
   below each other as its rows, padded to the granule.
3. The softmax subtracts the maximum over all tiles, which is exact in any order, so no rescaling
   takes place. Each tile's sum and weighted values are made for themselves and then added tile by
   tile, from the first on, beginning at +0. A tile that is wholly masked adds +0, which changes no
   bit: rows of different length can share a group.

`SdpaAttention` calls torch's fused kernels and promises no such thing. `native_attention` has our
own kernels, which promise it too, and `attention_registry` chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from pdserve.engine.torch import kv_int8
from pdserve.engine.torch.batch import RowSpan, StepBatch
from pdserve.engine.torch.numerics import Numerics

KV_TILE = 64
QUERY_TILE = 64
MAX_GROUP_POSITIONS = 8192
"""Gathered positions of one group of decode rows at most: bounds the working memory."""


class Attention(ABC):
    """Causal grouped-query attention of a step. Made for one model; no state between steps."""

    @abstractmethod
    def prepare(self, batch: StepBatch, device: torch.device) -> object:
        """What `attend` needs of this step in every layer: tables, indexes, masks."""

    @abstractmethod
    def attend(self, queries: torch.Tensor, kv: torch.Tensor, prepared: object) -> torch.Tensor:
        """Attention of each token over its sequence up to itself.

        ``queries [padded tokens, head, head_dim]`` fp32, rotated, not scaled; ``kv [block, 2, kv
        head, position in block, head_dim]`` one layer of the pool, this step's KV already written.
        A pool of int8 is ``[block, 2, kv head, bytes of a run]`` instead (`kv_int8`).
        Returns ``[padded tokens, head, head_dim]``, fp32 or of the model's dtype, zero for padding;
        it may be memory that the next layer's call writes to.
        """


@dataclass(frozen=True, slots=True)
class QueryTile:
    """As many queries of each of a group's rows, and the KV tiles that they can see."""

    tokens: torch.Tensor | slice  # of the step's tokens: [rows * queries], int64, if not adjacent
    num_queries: int
    num_kv_tiles: int
    first_masked: int
    """Every query sees all positions before this one, a multiple of `KV_TILE`."""
    masked: torch.Tensor  # [row, 1, query row, position - first_masked], bool


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Rows whose keys and values are gathered together, padded to the same number of tiles."""

    num_rows: int
    runs: torch.Tensor  # [2 * row * kv head * block], int64: see `TiledAttention._runs`
    tail: torch.Tensor  # [n], int64: (row, kv head, position) past a row's end, flattened
    query_tiles: tuple[QueryTile, ...]


class TiledAttention(Attention):
    """The reference. ``block_size`` divides `KV_TILE` or is a multiple of it."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, numerics: Numerics
    ) -> None:
        self._kv_heads = num_kv_heads
        self._group = num_heads // num_kv_heads
        self._head_dim = head_dim
        self._block_size = block_size
        self._numerics = numerics

    def prepare(self, batch: StepBatch, device: torch.device) -> tuple[KvGroup, ...]:
        decodes = [row for row in batch.rows if row.num_tokens == 1]
        groups = [self._kv_group([row], device) for row in batch.rows if row.num_tokens > 1]
        groups += [self._kv_group(rows, device) for rows in _grouped_by_length(decodes)]
        return tuple(groups)

    def _kv_group(self, rows: Sequence[RowSpan], device: torch.device) -> KvGroup:
        """``rows`` is one row of any length, or several of one token each."""
        num_blocks = -(-max(_tiles(row.end) for row in rows) * KV_TILE // self._block_size)
        width = num_blocks * self._block_size
        ends = torch.tensor([row.end for row in rows])
        past_end = (torch.arange(width) >= ends[:, None])[:, None].expand(-1, self._kv_heads, -1)
        num_tokens = rows[0].num_tokens
        return KvGroup(
            num_rows=len(rows),
            runs=self._runs(rows, num_blocks).to(device),
            tail=past_end.flatten().nonzero()[:, 0].to(device),
            query_tiles=tuple(
                self._query_tile(rows, first, min(QUERY_TILE, num_tokens - first), device)
                for first in range(0, num_tokens, QUERY_TILE)
            ),
        )

    def _runs(self, rows: Sequence[RowSpan], num_blocks: int) -> torch.Tensor:
        """Which (block, key/value, kv head) runs of a layer to gather, in the order of use.

        First all keys, then all values, each by row, kv head and block, so that what is gathered
        is ``[2, row, kv head, position, head_dim]``. A gather never leaves a row's own table: what
        it lacks is its first block, masked.
        """
        tables = [(row.block_ids + row.block_ids[:1] * num_blocks)[:num_blocks] for row in rows]
        blocks = torch.tensor(tables, dtype=torch.int64).view(1, len(rows), 1, num_blocks)
        kinds = torch.arange(2).view(2, 1, 1, 1)
        heads = torch.arange(self._kv_heads).view(1, 1, self._kv_heads, 1)
        return ((blocks * 2 + kinds) * self._kv_heads + heads).flatten()

    def _query_tile(
        self, rows: Sequence[RowSpan], first: int, count: int, device: torch.device
    ) -> QueryTile:
        """Queries ``first`` to ``first + count`` of each row."""
        starts = torch.tensor([row.start + first for row in rows])
        firsts = torch.tensor([row.first + first for row in rows])
        steps = torch.arange(count)
        positions = (starts[:, None] + steps).repeat_interleave(self._group, dim=1)
        padding = self._numerics.padded(positions.shape[1]) - positions.shape[1]
        positions = functional.pad(positions, (0, padding))  # padding sees position 0 only
        num_tiles = max(_tiles(row.start + first + count) for row in rows)
        first_masked = min((row.start + first) // KV_TILE for row in rows) * KV_TILE
        keys = torch.arange(first_masked, num_tiles * KV_TILE)
        alone = slice(int(firsts[0]), int(firsts[0]) + count)
        return QueryTile(
            tokens=alone if len(rows) == 1 else (firsts[:, None] + steps).flatten().to(device),
            num_queries=count,
            num_kv_tiles=num_tiles,
            first_masked=first_masked,
            masked=(keys > positions[:, None, :, None]).to(device),
        )

    def attend(self, queries: torch.Tensor, kv: torch.Tensor, prepared: object) -> torch.Tensor:
        assert isinstance(prepared, tuple)
        scaled = queries * self._head_dim**-0.5
        out = torch.zeros_like(queries)
        runs = kv.view(-1, kv.stride(2))
        for group in prepared:
            gathered = self._widened(runs.index_select(0, group.runs))
            keys, values = gathered.view(2, group.num_rows * self._kv_heads, -1, self._head_dim)
            values.view(-1, self._head_dim).index_fill_(0, group.tail, 0.0)
            for tile in group.query_tiles:
                out[tile.tokens] = self._attend_tile(
                    scaled[tile.tokens], keys, values, group.num_rows, tile
                )
        return out

    def _widened(self, runs: torch.Tensor) -> torch.Tensor:
        """Runs in fp32, the first half of them keys: ``[run, position in block, head_dim]``."""
        if runs.dtype != torch.int8:
            return runs.float()
        keys, values = runs.chunk(2)
        return torch.cat(
            (
                kv_int8.read_keys(keys, self._head_dim),
                kv_int8.read_values(values, self._head_dim),
            )
        )

    def _attend_tile(
        self,
        queries: torch.Tensor,  # [row * query, head, head_dim], scaled
        keys: torch.Tensor,  # [row * kv head, position, head_dim]
        values: torch.Tensor,  # [row * kv head, position, head_dim]
        num_rows: int,
        tile: QueryTile,
    ) -> torch.Tensor:
        """Attention of one query tile: ``[row * query, head, head_dim]``."""
        width = tile.num_kv_tiles * KV_TILE
        stacked = self._stack(queries, num_rows, tile.num_queries)
        heads, depth, _ = stacked.shape
        scores = score_product(stacked, keys[:, :width])
        by_row = scores.view(num_rows, self._kv_heads, depth, width)
        by_row[..., tile.first_masked :].masked_fill_(tile.masked, float("-inf"))
        scores -= scores.amax(dim=-1, keepdim=True)
        weights = scores.exp_().view(heads, depth, tile.num_kv_tiles, KV_TILE)
        sums = weights.sum(dim=-1).cumsum(dim=-1)[..., -1:]  # of the tiles, added in order
        attended = torch.zeros_like(stacked)
        parts = torch.split(values[:, :width], KV_TILE, dim=1)
        for weight, value in zip(weights.unbind(2), parts, strict=True):
            attended += value_product(weight, value)
        return self._unstack(attended.div_(sums), num_rows, tile.num_queries)

    def _stack(self, queries: torch.Tensor, num_rows: int, num_queries: int) -> torch.Tensor:
        """``[row * kv head, query row, head_dim]``: the query heads of one kv head below each
        other, query by query, padded to the granule."""
        picked = queries.view(num_rows, num_queries, self._kv_heads, -1, self._head_dim)
        stacked = picked.transpose(1, 2).reshape(num_rows * self._kv_heads, -1, self._head_dim)
        depth = stacked.shape[1]
        return functional.pad(stacked, (0, 0, 0, self._numerics.padded(depth) - depth))

    def _unstack(self, stacked: torch.Tensor, num_rows: int, num_queries: int) -> torch.Tensor:
        """The way back from `_stack`."""
        picked = stacked[:, : num_queries * self._group].reshape(
            num_rows, self._kv_heads, num_queries, self._group, self._head_dim
        )
        return picked.transpose(1, 2).reshape(num_rows * num_queries, -1, self._head_dim)


class SdpaAttention(Attention):
    """torch's fused kernels, row by row. For ``--numerics fast``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def prepare(
        self, batch: StepBatch, device: torch.device
    ) -> tuple[tuple[RowSpan, torch.Tensor, torch.Tensor | None], ...]:
        prepared = []
        for row in batch.rows:
            table = torch.tensor(row.block_ids, dtype=torch.int64, device=device)
            visible = None
            if row.start and row.num_tokens > 1:
                positions = torch.arange(row.start, row.end, device=device)
                visible = torch.arange(row.end, device=device) <= positions[:, None]
            prepared.append((row, table, visible))
        return tuple(prepared)

    def attend(self, queries: torch.Tensor, kv: torch.Tensor, prepared: object) -> torch.Tensor:
        assert isinstance(prepared, tuple)
        out = torch.zeros_like(queries)
        for row, table, visible in prepared:
            blocks = self._widened(kv.index_select(0, table), queries.shape[-1])
            keys, values = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : row.end]
            span = slice(row.first, row.first + row.num_tokens)
            attended = functional.scaled_dot_product_attention(
                queries[span].transpose(0, 1)[None].to(self._dtype),
                keys[None],
                values[None],
                attn_mask=visible,
                is_causal=visible is None and row.num_tokens > 1,
                enable_gqa=True,
            )
            out[span] = attended[0].transpose(0, 1).to(out.dtype)
        return out

    def _widened(self, blocks: torch.Tensor, head_dim: int) -> torch.Tensor:
        """``[block, 2, kv head, position in block, head_dim]`` of the model's dtype."""
        if blocks.dtype != torch.int8:
            return blocks
        keys, values = (blocks[:, kind].flatten(0, 1) for kind in range(2))
        read = (kv_int8.read_keys(keys, head_dim), kv_int8.read_values(values, head_dim))
        shape = (*blocks.shape[:1], -1, *read[0].shape[1:])
        return torch.stack([part.to(self._dtype).view(shape) for part in read], dim=1)


def score_product(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``[batch, query, dim]`` by ``[batch, position, dim]`` -> ``[batch, query, position]``."""
    return torch.bmm(queries, keys.transpose(1, 2))


def value_product(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``[batch, query, position]`` by ``[batch, position, dim]`` -> ``[batch, query, dim]``."""
    return torch.bmm(weights, values)


def _tiles(num_positions: int) -> int:
    return -(-num_positions // KV_TILE)


def _grouped_by_length(rows: Sequence[RowSpan]) -> list[list[RowSpan]]:
    """Rows that are padded to a common length: none to more than twice its own."""
    groups: list[list[RowSpan]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: -row.end):
        if (
            not groups
            or 2 * _tiles(row.end) < longest
            or (len(groups[-1]) + 1) * longest * KV_TILE > MAX_GROUP_POSITIONS
        ):
            groups.append([])
            longest = _tiles(row.end)
        groups[-1].append(row)
    return groups
