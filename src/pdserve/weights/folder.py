"""A model folder in Hugging Face layout, opened and checked.

`ModelFolder.open` reads the configs and the headers of the weight files and compares them: every
tensor that the model needs is there with its shape, and none that it would not compute with. After
that, `load_tensors` cannot meet a surprise. Opening is cheap and imports no torch, so the gateway
opens the folder as well as the workers do. Tensors are mapped, not read: workers on one host that
ask for the stored dtype share one copy in the page cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pdserve.core.errors import ModelError
from pdserve.weights.config import ModelConfig
from pdserve.weights.digest import weights_digest
from pdserve.weights.progress import Report, silent
from pdserve.weights.tensor_files import TensorEntry, find_tensors

if TYPE_CHECKING:
    import torch

EMBEDDING = "model.embed_tokens.weight"
OUTPUT_HEAD = "lm_head.weight"
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

# Written by old versions of transformers; a function of the config.
_DERIVED_SUFFIX = "rotary_emb.inv_freq"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name (Hugging Face's) and shape of each tensor that the model computes with.

    Weights of linear layers are ``[output, input]``. With tied embeddings there is no output head:
    the embedding serves as one.
    """
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        for name, (outputs, inputs, has_bias) in projections(config).items():
            shapes[f"{prefix}.{name}.weight"] = (outputs, inputs)
            if has_bias:
                shapes[f"{prefix}.{name}.bias"] = (outputs,)
        if config.qk_norm:
            for name in HEAD_NORMS:
                shapes[f"{prefix}.{name}.weight"] = (config.head_dim,)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[OUTPUT_HEAD] = (config.vocab_size, hidden)
    return shapes


def projections(config: ModelConfig) -> dict[str, tuple[int, int, bool]]:
    """Outputs, inputs and whether there is a bias of each linear layer of a block, by its name.

    Those of one input stand side by side, in the order in which a fused one holds them.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention_out = {"self_attn.o_proj": (hidden, query, config.attention_out_bias)}
    down = {"mlp.down_proj": (hidden, inner, config.mlp_bias)}
    if config.fused:
        return {
            "self_attn.qkv_proj": (query + 2 * key, hidden, config.qkv_bias),
            **attention_out,
            "mlp.gate_up_proj": (2 * inner, hidden, config.mlp_bias),
            **down,
        }
    return {
        "self_attn.q_proj": (query, hidden, config.qkv_bias),
        "self_attn.k_proj": (key, hidden, config.qkv_bias),
        "self_attn.v_proj": (key, hidden, config.qkv_bias),
        **attention_out,
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        **down,
    }


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """``tensors`` maps each name of `expected_shapes` to where its bytes lie.

    ``duplicate_head`` is an output head that is stored although the embeddings are tied.
    """

    path: Path
    config: ModelConfig
    tensors: dict[str, TensorEntry]
    duplicate_head: TensorEntry | None

    @classmethod
    def open(cls, path: Path | str) -> ModelFolder:
        """Check a folder. Raises `ModelError` that names the file and the remedy."""
        path = Path(path)
        if not path.is_dir():
            raise ModelError(f"{path} is no folder; give a model folder in Hugging Face layout")
        config = ModelConfig.from_folder(path)
        if not (path / "tokenizer.json").is_file():
            raise ModelError(
                f"{path} has no tokenizer.json; load the tokenizer with transformers' "
                "AutoTokenizer and save_pretrained it there"
            )
        found = {
            name: entry
            for name, entry in find_tensors(path).items()
            if not name.endswith(_DERIVED_SUFFIX)
        }
        duplicate_head = None
        if config.tie_word_embeddings and OUTPUT_HEAD in found:
            head = found.pop(OUTPUT_HEAD)
            if EMBEDDING in found:
                duplicate_head = head
            else:
                found[EMBEDDING] = head
        _check_tensors(path, found, expected_shapes(config))
        return cls(path, config, found, duplicate_head)

    @property
    def stored_dtype(self) -> str:
        """``fp32``, ``bf16`` or ``fp16``: what most of the weights' bytes are."""
        num_bytes: dict[str, int] = {}
        for entry in self.tensors.values():
            num_bytes[entry.dtype] = num_bytes.get(entry.dtype, 0) + entry.num_bytes
        return max(sorted(num_bytes), key=num_bytes.__getitem__)

    def load_tensors(
        self, *, dtype: str | None = None, report: Report = silent
    ) -> dict[str, torch.Tensor]:
        """Every tensor of `expected_shapes` on the CPU, as ``fp32`` or ``bf16`` (None: as stored).

        A tensor that has that dtype already is a read-only mapping of the file: do not write to
        it. Raises `ModelError` if a file has changed or tied embeddings turn out not to be tied.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        wanted = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        entries = dict(self.tensors)
        if self.duplicate_head is not None:
            entries[OUTPUT_HEAD] = self.duplicate_head
        total_bytes = sum(entry.num_bytes for entry in entries.values())
        done_bytes = 0
        loaded: dict[str, torch.Tensor] = {}
        for file in sorted({entry.file for entry in entries.values()}):
            try:
                with safe_open(file, framework="pt", device="cpu") as opened:
                    for name, entry in entries.items():
                        if entry.file != file:
                            continue
                        tensor: torch.Tensor = opened.get_tensor(entry.name)
                        loaded[name] = tensor if wanted is None else tensor.to(wanted)
                        done_bytes += entry.num_bytes
                        report("loading weights", done_bytes, total_bytes)
            except (OSError, SafetensorError) as error:
                raise ModelError(f"cannot load {file}: {error}; copy it again") from error
        head = loaded.pop(OUTPUT_HEAD) if self.duplicate_head is not None else None
        if head is not None and not torch.equal(head, loaded[EMBEDDING]):
            raise ModelError(
                f"{self.path}: config.json ties the embeddings, but {OUTPUT_HEAD} is stored and "
                "differs; set tie_word_embeddings to false if the stored head is right"
            )
        return loaded

    def weights_digest(
        self, *, cache_dir: Path | str | None = None, report: Report = silent
    ) -> str:
        """32 hex digits that name these weights (see ``weights.digest``). Raises `ModelError`."""
        try:
            return weights_digest(self.tensors, self.config, cache_dir=cache_dir, report=report)
        except OSError as error:
            raise ModelError(f"cannot read the weights in {self.path}: {error}") from error


def _check_tensors(
    path: Path, found: dict[str, TensorEntry], expected: dict[str, tuple[int, ...]]
) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        raise ModelError(f"{path} lacks {_some(missing)}; copy the model again")
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        raise ModelError(
            f"{path} has {_some(unexpected)}, which a model with this config.json does not compute "
            "with; the config is wrong or the model is of another architecture"
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ModelError(
                f"tensor {name} in {path} has shape {list(found[name].shape)} where config.json "
                f"asks for {list(shape)}; config and weights are of different models"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
