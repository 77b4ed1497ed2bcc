"""The architectures that are computed, and what a ``config.json`` does not say of each.

All are the same pre-normalised decoder with rotary embeddings, grouped-query attention and a gated
feed-forward part; one model file computes them (`engine.torch.transformer`). They differ in where
projections have biases, whether query and key heads are normalised, which layers rotate, how the
tensors are stored, and in the defaults of keys that are missing: those are of transformers'
configuration classes (5.23), so that both read the same file in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture. Defaults are for keys that a ``config.json`` lacks."""

    model_type: str
    kv_heads: int | None = None
    """None: as many as query heads."""
    head_dim: int | None = None
    """None: hidden size over heads."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    tied: bool = False
    window: int | None = None
    """Of ``sliding_window``."""
    window_is_opted_for: bool = False
    """``sliding_window`` counts only if ``use_sliding_window`` is set."""
    late_windows: bool = False
    """Layers before ``max_window_layers`` see everything."""
    reads_attention_bias: bool = False
    """``attention_bias`` gives the four projections of attention biases."""
    reads_mlp_bias: bool = False
    qkv_bias: bool = False
    """Query, key and value projections always have biases, the output projection never."""
    qk_norm: bool = False
    """Each query and key head is normalised before it is rotated."""
    fused: bool = False
    """One tensor holds the query, key and value projections, and one gate and up."""
    rotates_parts: bool = False
    """``partial_rotary_factor`` leaves the end of each head unrotated."""
    skips_rotation: bool = False
    """``no_rope_layers`` rotate nothing."""


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(model_type="llama", reads_attention_bias=True, reads_mlp_bias=True),
    "MistralForCausalLM": Family(model_type="mistral", kv_heads=8, window=4096),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2",
        kv_heads=32,
        window=4096,
        window_is_opted_for=True,
        late_windows=True,
        qkv_bias=True,
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        kv_heads=32,
        head_dim=128,
        window=4096,
        window_is_opted_for=True,
        late_windows=True,
        reads_attention_bias=True,
        qk_norm=True,
    ),
    "SmolLM3ForCausalLM": Family(
        model_type="smollm3",
        kv_heads=4,
        rope_theta=2_000_000.0,
        tied=True,
        window_is_opted_for=True,
        reads_attention_bias=True,
        reads_mlp_bias=True,
        skips_rotation=True,
    ),
    "Phi3ForCausalLM": Family(model_type="phi3", rms_norm_eps=1e-5, fused=True, rotates_parts=True),
}
"""By the name in ``architectures``."""

SUPPORTED = (
    f"pdserve serves {', '.join(FAMILIES)}, with unquantised fp32, bf16 or fp16 weights or from a "
    "GGUF file"
)
