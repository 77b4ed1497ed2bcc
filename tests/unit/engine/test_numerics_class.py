"""The granule is measured, the numerics class is named, and what cannot be had is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pdserve.core.errors import ConfigError, ModelError
from pdserve.engine.torch.granule import RowProbe, measure_granule
from pdserve.engine.torch.linear import LibraryLinear
from pdserve.engine.torch.numerics import Numerics, check_choice, numerics_class


def probe(kernel: Callable[[torch.Tensor], torch.Tensor]) -> RowProbe:
    return RowProbe((kernel,), width=8, dtype=torch.float32, max_rows=256)


def other_bits_unless(
    holds: Callable[[int], bool],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A kernel whose last bit depends on the number of rows, where ``holds`` says so."""
    return lambda rows: rows * 3 if holds(len(rows)) else (rows * 3).nextafter(rows * 4)


def test_the_smallest_safe_granule_is_found() -> None:
    assert measure_granule([probe(lambda rows: rows * 3)]) == 4
    assert measure_granule([probe(other_bits_unless(lambda n: n >= 8))]) == 8
    assert measure_granule([probe(other_bits_unless(lambda n: n % 16 == 0))]) == 16
    both = [probe(other_bits_unless(lambda n: n % 32 == 0)), probe(lambda rows: rows)]
    assert measure_granule(both) == 32


def test_kernels_of_one_probe_must_agree() -> None:
    kernels = (lambda rows: rows * 3, other_bits_unless(lambda n: n >= 16))
    assert measure_granule([RowProbe(kernels, 8, torch.float32, 256)]) == 16


def test_a_row_s_place_must_not_matter() -> None:
    def by_place(rows: torch.Tensor) -> torch.Tensor:
        return rows * torch.arange(1, len(rows) + 1)[:, None]

    with pytest.raises(ModelError, match="--numerics fast"):
        measure_granule([probe(by_place)])


def test_padding() -> None:
    assert [Numerics(exact=True, granule=8).padded(n) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_of_many_rows_is_that_of_its_tiles(dtype: torch.dtype, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(24, 16, generator=generator).to(dtype)
    bias = torch.randn(24, generator=generator).to(dtype) if has_bias else None
    rows = torch.randn(41, 16, generator=generator)
    linear = LibraryLinear(weight, bias, max_rows=8)
    product = linear(rows)
    assert product.dtype == dtype
    assert torch.equal(product[32:40], linear(rows[32:40]))
    expected = rows.to(dtype).double() @ weight.double().T + (0 if bias is None else bias.double())
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(product.double(), expected, rtol=1e-2, atol=tolerance)


def test_the_class_names_all_that_changes_bits() -> None:
    classes = {
        numerics_class("cpu", dtype, threads, numerics, products)
        for dtype in ("fp32", "bf16")
        for threads in (1, 2)
        for numerics in ("exact", "fast")
        for products in ("onednn", "linear1.avx2")
    }
    assert len(classes) == 16
    example = numerics_class("cpu", "bf16", 1, "exact", "onednn")
    assert example.startswith(f"cpu-bf16-torch{torch.__version__}-t1-exact")
    assert torch.backends.cpu.get_cpu_capability().lower() in example
    assert " " not in example


@pytest.mark.parametrize(
    ("device", "dtype", "numerics", "message"),
    [
        ("cpu", "fp16", "exact", "dtype 'fp16' is unknown: choose one of bf16, fp32"),
        ("cpu", "bf16", "loose", "numerics 'loose' is unknown: choose one of exact, fast"),
        ("tpu", "bf16", "exact", "device 'tpu' is unknown: choose cpu, cuda"),
        ("cuda:x", "bf16", "exact", "device 'cuda:x' is unknown"),
    ],
)
def test_what_is_unknown_is_refused(device: str, dtype: str, numerics: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_choice(device, dtype, numerics)


def test_a_missing_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no CUDA device; use --device cpu"):
        check_choice("cuda:1", "bf16", "exact")


def test_a_block_size_that_fits_no_tile_is_refused(make_bench: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="block size 48 does not fit"):
        make_bench(block_size=48)


@pytest.mark.parametrize("block_size", [1, 32, 128])
def test_block_sizes_give_the_same_bits(
    block_size: int, make_bench: Callable[..., Any], row: Callable[..., Any]
) -> None:
    expected = make_bench(block_size=16).logits_of(range(3, 150))
    bench = make_bench(block_size=block_size, num_blocks=320)
    assert torch.equal(bench.logits_of(range(3, 150)), expected)
