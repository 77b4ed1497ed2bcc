"""The size of a model: what its time and its memory are counted from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A dense decoder, in elements; ``weight_bytes`` and ``kv_bytes`` of one of them.

    ``mlp_matrices`` of the feed-forward part: 3 if it is gated (Llama), 2 if not (BLOOM, OPT).
    ``tied``: the projection to logits is the embedding, and lies in memory once.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0
    mlp_matrices: int = 3
    tied: bool = False

    @property
    def layer_weights(self) -> int:
        """Weights of all layers: four projections of attention, and the feed-forward part."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        attention = self.hidden_size * self.head_dim * heads
        feed_forward = self.mlp_matrices * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + feed_forward)

    @property
    def head_weights(self) -> int:
        """Weights of the projection to logits, which only sampled tokens pass."""
        return self.hidden_size * self.vocab_size

    @property
    def memory_bytes(self) -> int:
        """All weights as they lie in memory, the embedding included."""
        embedding = 0 if self.tied else self.head_weights
        return round((self.layer_weights + self.head_weights + embedding) * self.weight_bytes)

    @property
    def token_kv_bytes(self) -> float:
        """KV of one token, in all layers."""
        return 2.0 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_bytes

    @property
    def pair_flops(self) -> float:
        """FLOPs of attention for a query and a key: a product and a sum each for score and value,
        in every head of every layer."""
        return 4.0 * self.num_layers * self.num_heads * self.head_dim
