"""Weights of a model, taken over from a checkpoint.

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
from pdserve.engine.torch.rows import HeadNorms
from pdserve.weights.config import ModelConfig
from pdserve.weights.folder import EMBEDDING, HEAD_NORMS, OUTPUT_HEAD, projections

MLP_ROWS = 128
"""Tokens that pass the feed-forward part together: keeps what is between in the cache."""


# A checkpoint has the first of them, or the others.
_QKV = ("self_attn.qkv_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_up_proj", "mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One transformer block."""

    attention_norm: torch.Tensor  # [hidden]
    qkv: Linear  # out: query heads, key heads, value heads, times head_dim
    head_norms: HeadNorms | None
    attention_out: Linear
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: Linear  # gated: out is silu(gate) * up
    down: Linear


@dataclass(frozen=True, slots=True)
class TransformerWeights:
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
) -> TransformerWeights:
    """Take over a checkpoint: copy, convert and pack its tensors.

    Everything is copied, so the source may be a mapped file that goes away, and every matrix is
    aligned as the allocator does it. Raises `ModelError` if a tensor is missing or misshapen.
    """
    take = _Checkpoint(tensors, device, dtype, linear)
    hidden = config.hidden_size
    known = projections(config)

    def layer(index: int) -> LayerWeights:
        prefix = f"model.layers.{index}"

        def product(*names: str, gated: bool = False) -> Linear:
            here = {f"{prefix}.{name}": known[name] for name in names if name in known}
            return take.linear(here, gated=gated)

        def norm(name: str, width: int = hidden) -> torch.Tensor:
            return take.tensor(f"{prefix}.{name}.weight", (width,))

        head_norms = (norm(name, config.head_dim) for name in HEAD_NORMS)
        return LayerWeights(
            attention_norm=norm("input_layernorm"),
            qkv=product(*_QKV),
            head_norms=HeadNorms(*head_norms) if config.qk_norm else None,
            attention_out=product("self_attn.o_proj"),
            mlp_norm=norm("post_attention_layernorm"),
            gate_up=product(*_GATE_UP, gated=True),
            down=product("mlp.down_proj"),
        )

    vocabulary = (config.vocab_size, hidden)
    embedding = take.tensor(EMBEDDING, vocabulary)
    tied = config.tie_word_embeddings
    output = embedding if tied else take.tensor(OUTPUT_HEAD, vocabulary)
    return TransformerWeights(
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

    def linear(self, parts: Mapping[str, tuple[int, int, bool]], gated: bool = False) -> Linear:
        """Projections of one input, stacked: names (without suffix) to outputs, inputs, bias."""
        weights = [(f"{name}.weight", (n, num_in)) for name, (n, num_in, _) in parts.items()]
        biases = [(f"{name}.bias", (n,)) for name, (n, _, has_bias) in parts.items() if has_bias]
        bias = self._concatenated(biases) if biases else None
        return self._linear.make(self._concatenated(weights), bias, gated=gated)

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
