"""The decoder that all our architectures are (`weights.families`), parameterised by `ModelConfig`.

As Llama's paper has it (Touvron et al. 2023, arXiv:2302.13971, section 2.2): pre-normalised
transformer blocks with RMSNorm (arXiv:1910.07467), rotary position embeddings in the rotate-half
convention (arXiv:2104.09864), grouped-query attention (arXiv:2305.13245) and SwiGLU
(arXiv:2002.05202). Others add biases, or normalise each query and key head (Qwen3,
arXiv:2505.09388), or leave layers or parts of heads unrotated. Residuals and products have the
model's dtype; norms, rotations, softmax and the activation are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from pdserve.engine.torch.attention import Attention
from pdserve.engine.torch.batch import StepBatch
from pdserve.engine.torch.native_layers import NativeLayers
from pdserve.engine.torch.pool import KvPool
from pdserve.engine.torch.rows import Rows
from pdserve.engine.torch.transformer_weights import MLP_ROWS, TransformerWeights
from pdserve.weights.config import ModelConfig


class Transformer:
    """Weights and the forward pass. Holds no state of any sequence: that is in the pool."""

    def __init__(
        self, config: ModelConfig, weights: TransformerWeights, attention: Attention, rows: Rows
    ) -> None:
        self._head_dim = config.head_dim
        self._weights = weights
        self._attention = attention
        self.rows = rows
        self._native = NativeLayers.of(config, weights, attention, rows)

    def forward(
        self, batch: StepBatch, pool: KvPool, on_layer: Callable[[int], None] | None
    ) -> torch.Tensor:
        """Last hidden states of the step's tokens, ``[padded tokens, hidden]``, not normalised.

        Writes the tokens' keys and values into ``pool``; calls ``on_layer`` after each layer, if
        there is one. The result may be memory that the next step writes to.
        """
        if self._native is not None:
            return self._native.forward(batch, pool, on_layer)
        prepared = self._attention.prepare(batch, batch.token_ids.device)
        places = self.rows.prepare(batch)
        hidden = functional.embedding(batch.token_ids, self._weights.embedding)
        residuals = torch.split(hidden, MLP_ROWS)  # views: a residual is added in place
        num_rows = hidden.shape[0]
        for index, layer in enumerate(self._weights.layers):
            normed = self.rows.norm(hidden, layer.attention_norm)
            heads = layer.qkv(normed).view(num_rows, -1, self._head_dim)
            queries = self.rows.place(heads, pool, index, layer.head_norms, places)
            attended = self._attention.attend(queries, pool.layer(index), prepared)
            layer.attention_out.add_to(hidden, attended.flatten(1))
            normed = self.rows.norm(hidden, layer.mlp_norm)
            for residual, part in zip(residuals, torch.split(normed, MLP_ROWS), strict=True):
                layer.down.add_to(residual, layer.gate_up(part))
            if on_layer is not None:
                on_layer(index)
        return hidden

    def logits(self, hidden: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
        """Next-token logits of the tokens ``sampled [padded rows]``, ``[padded rows, vocab]`` fp32.

        ``hidden`` is a result of `forward`. The logits may be memory that the next step writes to.
        """
        if self._native is not None and self._native.holds_logits(len(sampled)):
            return self._native.logits(hidden, sampled)
        return self._weights.output(self.rows.norm(hidden[sampled], self._weights.norm))
