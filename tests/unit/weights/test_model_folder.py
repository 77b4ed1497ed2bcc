"""Folders in Hugging Face layout: whole, sharded, tied, broken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdserve.core.errors import ModelError
from pdserve.text.tokenizer import Tokenizer
from pdserve.weights.folder import ModelFolder, expected_shapes
from pdserve.weights.random_model import write_random_model


@pytest.fixture
def folder(tmp_path: Path, tiny_model_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_model_path, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")


def split_into_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_loads_what_was_written(folder: Path) -> None:
    opened = ModelFolder.open(folder)
    stored = load_file(folder / "model.safetensors")
    loaded = opened.load_tensors()
    assert loaded.keys() == stored.keys() == expected_shapes(opened.config).keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)
    assert opened.stored_dtype == "fp32"


def test_converts_on_request(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    reports: list[tuple[str, int, int]] = []
    loaded = ModelFolder.open(folder).load_tensors(
        dtype="bf16", report=lambda *step: reports.append(step)
    )
    assert all(torch.equal(loaded[name], stored[name].bfloat16()) for name in stored)
    assert reports[-1][1] == reports[-1][2] == sum(t.nbytes for t in stored.values())


def test_shards_hold_the_same_model(folder: Path, tmp_path: Path) -> None:
    whole = ModelFolder.open(folder)
    digest = whole.weights_digest(cache_dir=tmp_path)
    weights = {name: tensor.clone() for name, tensor in whole.load_tensors().items()}
    split_into_shards(folder)
    sharded = ModelFolder.open(folder)
    assert all(torch.equal(sharded.load_tensors()[name], weights[name]) for name in weights)
    assert sharded.weights_digest(cache_dir=tmp_path) == digest


def test_tied_embeddings_need_no_head(tmp_path: Path) -> None:
    config = write_random_model(tmp_path / "tied", tie_word_embeddings=True, dtype="bf16")
    opened = ModelFolder.open(tmp_path / "tied")
    assert "lm_head.weight" not in opened.load_tensors()
    assert opened.config == config
    assert opened.stored_dtype == "bf16"


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    write_random_model(folder, tie_word_embeddings=True)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in ModelFolder.open(folder).load_tensors()
    rewrite(folder, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        ModelFolder.open(folder).load_tensors()


def test_a_tied_model_may_store_only_the_head(tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    write_random_model(folder, tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    loaded = ModelFolder.open(folder).load_tensors()
    assert torch.equal(loaded["model.embed_tokens.weight"], embedding)


def test_biases_are_expected_if_the_config_says_so(tmp_path: Path) -> None:
    write_random_model(tmp_path / "m", qkv_bias=True, attention_out_bias=True, mlp_bias=True)
    loaded = ModelFolder.open(tmp_path / "m").load_tensors()
    assert loaded["model.layers.0.self_attn.k_proj.bias"].shape == (32,)
    assert loaded["model.layers.1.mlp.down_proj.bias"].shape == (64,)
    edit_config(tmp_path / "m", mlp_bias=False)
    with pytest.raises(ModelError, match=r"mlp\.gate_proj\.bias.*does not compute"):
        ModelFolder.open(tmp_path / "m")


def test_derived_tensors_are_ignored(folder: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    rewrite(folder, lambda t: t.update(extra))
    assert not extra.keys() & ModelFolder.open(folder).load_tensors().keys()


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda f: shutil.rmtree(f), "is no folder"),
        (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
        (lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer\.json.*save_pretrained"),
        (lambda f: (f / "model.safetensors").unlink(), r"no \*\.safetensors.*save_pretrained"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"found pytorch_model\.bin",
        ),
        (lambda f: os.truncate(f / "model.safetensors", 5), "cut off"),
        (lambda f: os.truncate(f / "model.safetensors", 60_000), "cut off.*copy it again"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 4096), "no safetensors file"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"nonsense"),
            "cannot read",
        ),
        (lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), r"lacks model\.norm\.weight"),
        (lambda f: rewrite(f, lambda t: t.update(extra=torch.ones(2))), "has extra, which"),
        (
            lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.ones(65)})),
            r"model\.norm\.weight.*\[65\].*\[64\]",
        ),
        (
            lambda f: rewrite(
                f, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})
            ),
            "dtype I8.*unquantised",
        ),
        (lambda f: edit_config(f, num_hidden_layers=3), r"lacks model\.layers\.2"),
        (lambda f: edit_config(f, num_hidden_layers=1), "more tensors, which"),
    ],
)
def test_a_broken_folder_is_refused_with_the_reason(
    folder: Path, break_it: Callable[[Path], object], named: str
) -> None:
    break_it(folder)
    with pytest.raises(ModelError, match=named):
        ModelFolder.open(folder)


def test_broken_shards_are_named(folder: Path) -> None:
    split_into_shards(folder)
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    (folder / "b.safetensors").rename(folder / "elsewhere")
    with pytest.raises(ModelError, match=r"lacks b\.safetensors \(1 of 2"):
        ModelFolder.open(folder)
    (folder / "elsewhere").rename(folder / "b.safetensors")
    index.unlink()
    with pytest.raises(ModelError, match="copy that too"):
        ModelFolder.open(folder)
    index.write_text(good.replace("b.safetensors", "../b.safetensors"))
    with pytest.raises(ModelError, match="outside its folder"):
        ModelFolder.open(folder)
    index.write_text("{}")
    with pytest.raises(ModelError, match="weight_map"):
        ModelFolder.open(folder)
    index.write_text(good)
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(ModelError, match=r"is in a\.safetensors and b\.safetensors"):
        ModelFolder.open(folder)


def test_the_digest_names_the_content(folder: Path, tmp_path: Path) -> None:
    def digest() -> str:
        return ModelFolder.open(folder).weights_digest(cache_dir=tmp_path / "cache")

    original = digest()
    assert len(original) == 32
    assert int(original, 16) >= 0
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert ModelFolder.open(moved).weights_digest(cache_dir=tmp_path / "cache") == original
    edit_config(folder, eos_token_id=[1])
    (folder / "generation_config.json").unlink()
    assert digest() == original, "the end token changes no KV"
    edit_config(folder, rope_theta=12_345.0)
    assert digest() != original
    edit_config(folder, rope_theta=10_000.0)
    rewrite(folder, lambda t: t["model.norm.weight"].mul_(1 + 2**-20))
    assert digest() != original


def test_a_cached_digest_holds_until_the_file_changes(folder: Path, tmp_path: Path) -> None:
    def digest() -> tuple[str, bool]:
        """The digest, and whether the weights had to be read for it."""
        reports: list[str] = []
        opened = ModelFolder.open(folder)
        value = opened.weights_digest(
            cache_dir=tmp_path / "cache", report=lambda what, *_: reports.append(what)
        )
        return value, bool(reports)

    original, read = digest()
    assert read
    assert digest() == (original, False)
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    changed, read = digest()
    assert read
    assert changed != original
    (cached,) = (tmp_path / "cache" / "digests").iterdir()
    cached.write_text("{broken")
    assert digest() == (changed, True)
    assert digest() == (changed, False)


def test_a_digest_needs_no_writable_cache(folder: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    opened = ModelFolder.open(folder)
    assert opened.weights_digest(cache_dir=blocked) == opened.weights_digest(cache_dir=tmp_path)


def test_opening_and_hashing_import_no_torch(folder: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pdserve.weights.folder import ModelFolder;"
        "from pdserve.weights.pull import resolve;"
        f"f = ModelFolder.open(resolve({str(folder)!r}));"
        f"f.weights_digest(cache_dir={str(tmp_path)!r});"
        "assert not {'torch', 'transformers', 'gguf', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_json_that_is_too_deep_names_its_file(folder: Path, name: str) -> None:
    deep = b"[" * 200_000
    is_weights = name.endswith(".safetensors")
    (folder / name).write_bytes((len(deep).to_bytes(8, "little") if is_weights else b"") + deep)
    read = Tokenizer.from_folder if name.startswith("tokenizer") else ModelFolder.open
    with pytest.raises(ModelError, match=f"cannot read .*{name}"):
        read(folder)
