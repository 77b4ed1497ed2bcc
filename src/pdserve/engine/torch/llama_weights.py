"""Weights of a Llama-family model, taken over from a checkpoint.

A checkpoint is a mapping of Hugging Face's names to tensors, usually views of a mapped file. The
projections that read the same input are stacked into one matrix, so a layer is four products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pdserve.core.errors import ModelError
from pdserve.engine.torch.linear import Linear
from pdserve.engine.torch.linear_registry import LinearKind
from pdserve.weights.config import ModelConfig

MLP_ROWS = 128
"""Tokens that pass the feed-forward part together: keeps what is between in the cache."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One transformer block."""

    attention_norm: torch.Tensor  # [hidden]
    qkv: Linear  # out: query heads, key heads, value heads, times head_dim
    attention_out: Linear
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: Linear  # gated: out is silu(gate) * up
    down: Linear


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """All of a model."""

    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    output: Linear  # out: vocab, fp32


def pack_weights(
    config: ModelConfig,
    tensors: Mapping[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    linear: LinearKind,
) -> LlamaWeights:
    """Take over a checkpoint: copy, convert and pack its tensors.

    Everything is copied, so the source may be a mapped file that goes away, and every matrix is
    aligned as the allocator does it. Raises `ModelError` if a tensor is missing or misshapen.
    """
    take = _Checkpoint(tensors, device, dtype, linear)
    hidden, head_dim = config.hidden_size, config.head_dim
    query, key = config.num_heads * head_dim, config.num_kv_heads * head_dim

    def layer(index: int) -> LayerWeights:
        prefix = f"model.layers.{index}"
        attention, mlp, inner = f"{prefix}.self_attn", f"{prefix}.mlp", config.intermediate_size
        gates = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
        return LayerWeights(
            attention_norm=take.tensor(f"{prefix}.input_layernorm.weight", (hidden,)),
            qkv=take.linear(
                {
                    f"{attention}.q_proj": query,
                    f"{attention}.k_proj": key,
                    f"{attention}.v_proj": key,
                },
                hidden,
                config.attention_bias,
            ),
            attention_out=take.linear(
                {f"{attention}.o_proj": hidden}, query, config.attention_bias
            ),
            mlp_norm=take.tensor(f"{prefix}.post_attention_layernorm.weight", (hidden,)),
            gate_up=take.linear(dict.fromkeys(gates, inner), hidden, config.mlp_bias, gated=True),
            down=take.linear({f"{mlp}.down_proj": hidden}, inner, config.mlp_bias),
        )

    vocabulary = (config.vocab_size, hidden)
    embedding = take.tensor("model.embed_tokens.weight", vocabulary)
    tied = config.tie_word_embeddings
    output = embedding if tied else take.tensor("lm_head.weight", vocabulary)
    return LlamaWeights(
        embedding=embedding,
        layers=tuple(layer(index) for index in range(config.num_layers)),
        norm=take.tensor("model.norm.weight", (hidden,)),
        output=linear.make(output, None, logits=True),
    )


class _Checkpoint:
    """Takes tensors out of a checkpoint by name, checked, converted and on the device."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
        linear: LinearKind,
    ) -> None:
        self._tensors = tensors
        self._device = device
        self._dtype = dtype
        self._linear = linear

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._concatenated([(name, shape)])

    def linear(
        self, outs: Mapping[str, int], num_in: int, has_bias: bool, gated: bool = False
    ) -> Linear:
        """Projections of one input, stacked: names (without suffix) to their output widths."""
        weight = self._concatenated([(f"{name}.weight", (n, num_in)) for name, n in outs.items()])
        biases = [(f"{name}.bias", (n,)) for name, n in outs.items()] if has_bias else []
        bias = self._concatenated(biases) if has_bias else None
        return self._linear.make(weight, bias, gated=gated)

    def _concatenated(self, parts: Sequence[tuple[str, tuple[int, ...]]]) -> torch.Tensor:
        rows = sum(shape[0] for _, shape in parts)
        packed = torch.empty((rows, *parts[0][1][1:]), dtype=self._dtype, device=self._device)
        first = 0
        for name, shape in parts:
            source = self._tensors.get(name)
            if source is None:
                raise ModelError(f"the checkpoint has no tensor {name!r}: fetch the model again")
            if tuple(source.shape) != shape:
                raise ModelError(
                    f"tensor {name!r} is {list(source.shape)}, but config.json makes it "
                    f"{list(shape)}: the folder mixes files of different models"
                )
            packed[first : first + shape[0]].copy_(source)
            first += shape[0]
        return packed
