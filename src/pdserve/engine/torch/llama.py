"""The Llama family, as the paper has it (Touvron et al. 2023, arXiv:2302.13971, section 2.2).

Pre-normalised transformer blocks with RMSNorm (arXiv:1910.07467), rotary position embeddings in the
rotate-half convention (arXiv:2104.09864), grouped-query attention (arXiv:2305.13245) and SwiGLU
(arXiv:2002.05202). Residuals and products have the model's dtype; norms, rotations, softmax and
the activation are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from pdserve.engine.torch.attention import Attention
from pdserve.engine.torch.batch import StepBatch
from pdserve.engine.torch.llama_weights import LayerWeights, LlamaWeights
from pdserve.engine.torch.pool import KvPool
from pdserve.weights.config import ModelConfig

MLP_ROWS = 128
"""Tokens that pass the feed-forward part together: keeps what is between in the cache."""


class Llama:
    """Weights and the forward pass. Holds no state of any sequence: that is in the pool."""

    def __init__(
        self,
        config: ModelConfig,
        weights: LlamaWeights,
        attention: Attention,
    ) -> None:
        self._config = config
        self._weights = weights
        self._attention = attention
        self._cos, self._sin = rope_tables(config, weights.embedding.device)

    def forward(
        self, batch: StepBatch, pool: KvPool, on_layer: Callable[[int], None]
    ) -> torch.Tensor:
        """Last hidden states of the step's tokens, ``[padded tokens, hidden]``, not normalised.

        Writes the tokens' keys and values into ``pool``; calls ``on_layer`` after each layer.
        """
        prepared = self._attention.prepare(batch, batch.token_ids.device)
        cos = self._cos[batch.positions][:, None]  # [padded tokens, 1, head_dim / 2]
        sin = self._sin[batch.positions][:, None]
        hidden = functional.embedding(batch.token_ids, self._weights.embedding)
        for index, layer in enumerate(self._weights.layers):
            normed = self._norm(hidden, layer.attention_norm)
            queries, keys, values = self._qkv(layer, normed)
            queries = rotate(queries, cos, sin)
            keys = rotate(keys, cos, sin).to(values.dtype)
            new = slice(0, batch.num_tokens)
            pool.write(index, batch.slot_blocks, batch.slot_offsets, keys[new], values[new])
            attended = self._attention.attend(queries, pool.layer(index), prepared)
            layer.attention_out.add_to(hidden, attended.flatten(1))
            normed = self._norm(hidden, layer.mlp_norm)
            for first in range(0, len(hidden), MLP_ROWS):
                part = slice(first, first + MLP_ROWS)
                layer.down.add_to(hidden[part], layer.gate_up(normed[part]))
            on_layer(index)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits, ``[padded rows, hidden]`` -> ``[padded rows, vocab]`` fp32."""
        normed = self._norm(hidden, self._weights.norm)
        return self._weights.output(normed)

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, weight, self._config.rms_norm_eps)

    def _qkv(
        self, layer: LayerWeights, normed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each ``[padded tokens, heads, head_dim]``, with the heads of its kind."""
        config = self._config
        heads = layer.qkv(normed).view(normed.shape[0], -1, config.head_dim)
        counts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        queries, keys, values = torch.split(heads, counts, dim=1)
        return queries, keys, values


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Rows over their root mean square, times ``weight``; computed in fp32."""
    wide = rows.float()
    scale = wide.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
    return (wide * scale).to(weight.dtype) * weight


def rope_tables(config: ModelConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position's angles, each ``[position, head_dim / 2]`` fp32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inverse_frequencies = 1.0 / (config.rope_theta**exponents)
    positions = torch.arange(config.max_model_tokens, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies
    return angles.cos().to(device), angles.sin().to(device)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``heads [token, head, head_dim]``, in fp32.

    Dimension i is paired with i + head_dim / 2, as in Hugging Face's checkpoints.
    """
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
