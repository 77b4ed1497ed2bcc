"""Compiled products: right against fp64, and a row's bits the same however it is batched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.errors import ConfigError
from pdserve.engine.native import library
from pdserve.engine.torch.linear import LibraryLinear, swiglu
from pdserve.engine.torch.linear_registry import LinearKind, choose_linear
from pdserve.engine.torch.native_linear import NativeLinear, pack, quantize

LEVELS = library.levels()
WEIGHTS = ("bf16", "fp32", "int8")
SHAPES = ((96, 64), (100, 66), (50, 37), (1, 1), (49, 5), (192, 200), (60, 602))
MOST_ROWS = 41

per_level = pytest.mark.parametrize("level", LEVELS)
per_weight = pytest.mark.parametrize("weights", WEIGHTS)


@pytest.fixture(autouse=True)
def two_threads() -> None:
    """Put back by the fixture that guards all tests here."""
    torch.set_num_threads(2)


def dtype_of(weights: str) -> torch.dtype:
    return torch.float32 if weights == "fp32" else torch.bfloat16


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(level: str, weights: str, num_out: int, num_in: int, **options: object) -> NativeLinear:
    dtype = dtype_of(weights)
    weight = random(num_out, num_in, seed=1, dtype=dtype)
    bias = random(num_out, seed=2, dtype=dtype)
    return NativeLinear(weight, bias, level=level, int8=weights == "int8", **options)  # type: ignore[arg-type]


def exact(rows: torch.Tensor, weights: str, num_out: int, num_in: int) -> torch.Tensor:
    """What `make` of the same shape should give, in fp64."""
    dtype = dtype_of(weights)
    weight = random(num_out, num_in, seed=1, dtype=dtype)
    wide = weight.double()
    if weights == "int8":
        integers, scale = quantize(weight)
        wide = integers.double() * scale.double()[:, None]
    return rows.to(dtype).double() @ wide.T + random(num_out, seed=2, dtype=dtype).double()


@per_level
@per_weight
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_fp64(level: str, weights: str, shape: tuple[int, int]) -> None:
    linear = make(level, weights, *shape, out_dtype=torch.float32)
    rows = random(MOST_ROWS, shape[1], seed=3)
    product = linear(rows)
    expected = exact(rows, weights, *shape)
    assert product.dtype == torch.float32
    # Sums of at most 602 products of size 1, each addition rounded to 24 bits.
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)
    narrow = make(level, weights, *shape)(rows)
    assert torch.equal(narrow, product.to(narrow.dtype))


@per_level
@per_weight
def test_residual_and_gate_are_fused_without_further_rounding(level: str, weights: str) -> None:
    num_out, num_in = 2 * 75, 44
    dtype = dtype_of(weights)
    rows = random(MOST_ROWS, num_in, seed=3, dtype=dtype)
    expected = exact(rows, weights, num_out, num_in)
    gated = make(level, weights, num_out, num_in, gated=True, out_dtype=torch.float32)(rows)
    torch.testing.assert_close(gated, swiglu(expected.float()), rtol=1e-4, atol=1e-4)

    plain = make(level, weights, num_out, num_in)
    wide = make(level, weights, num_out, num_in, out_dtype=torch.float32)(rows)
    residual = random(MOST_ROWS, num_out, seed=4, dtype=dtype)
    summed = residual.clone()
    plain.add_to(summed, rows)
    assert torch.equal(summed, (residual.float() + wide).to(dtype))


@per_level
@per_weight
@settings(max_examples=40)
@given(data=st.data())
def test_a_row_has_the_same_bits_in_any_batch(
    level: str, weights: str, data: st.DataObject
) -> None:
    num_out = data.draw(st.integers(1, 150))
    num_in = data.draw(st.integers(1, 90) | st.sampled_from((256, 260, 700)))
    linear = make(level, weights, num_out, num_in, out_dtype=torch.float32)
    rows = random(MOST_ROWS, num_in, seed=data.draw(st.integers(0, 99)), dtype=linear.dtype)
    torch.set_num_threads(1)
    alone = torch.cat([linear(row[None]) for row in rows])
    picked = data.draw(st.lists(st.integers(0, MOST_ROWS - 1), min_size=1, max_size=100))
    torch.set_num_threads(data.draw(st.sampled_from((1, 2, 3))))
    assert torch.equal(linear(rows[picked]), alone[picked])
    residual = random(len(picked), num_out, seed=5)
    summed = residual.clone()
    linear.add_to(summed, rows[picked])
    assert torch.equal(summed, residual + alone[picked])


@per_level
def test_rows_beyond_one_cache_block_are_the_same(level: str) -> None:
    num_in = 4096  # 50 rows fill a block
    linear = make(level, "bf16", 60, num_in, gated=True)
    rows = random(123, num_in, seed=6, dtype=torch.bfloat16)
    assert torch.equal(linear(rows), torch.cat([linear(part) for part in rows.split(7)]))


@per_level
def test_numbers_that_are_none_stay_so(level: str) -> None:
    linear = make(level, "bf16", 50, 32)
    rows = torch.ones(3, 32, dtype=torch.bfloat16)
    rows[1, 5] = float("nan")
    rows[2, 5] = float("inf")
    product = linear(rows)
    assert product[0].isfinite().all()
    assert product[1].isnan().all()
    assert product[2].isinf().all()
    large = make(level, "bf16", 96, 32, gated=True)(rows * 1e4)
    assert large[0].isfinite().all()


@per_level
def test_fp32_rows_are_rounded_like_torch_does(level: str) -> None:
    linear = make(level, "bf16", 50, 32)
    rows = random(9, 32, seed=7)
    assert torch.equal(linear(rows), linear(rows.bfloat16()))


def test_a_step_without_rows_is_nothing() -> None:
    for level in LEVELS:
        assert make(level, "bf16", 50, 32)(torch.empty(0, 32)).shape == (0, 50)


def test_int8_is_off_by_half_a_step_at_most() -> None:
    weight = random(64, 300, seed=8)
    weight[3] = 0.0
    integers, scale = quantize(weight)
    error = (integers.float() * scale[:, None] - weight).abs()
    assert (error <= 0.5001 * scale[:, None]).all()
    assert integers.abs().max() == 127
    assert (integers[3] == 0).all()


def test_packing_is_a_permutation() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.int8):
        columns = torch.arange(96 * 8).remainder(251).sub(125).view(96, 8).to(dtype)
        assert torch.equal(pack(columns).sort().values, columns.flatten().sort().values)


def test_the_registry_takes_compiled_kernels_where_they_can_be_had() -> None:
    level = LEVELS[-1] if LEVELS else "plain"
    assert choose_linear("cpu", "bf16", "auto", level).name == f"linear1.{level}"
    assert choose_linear("cpu", "bf16", "int8", level).name == f"linear1.{level}-wint8"
    weight, bias = random(96, 32, seed=1), random(96, seed=2)
    rows = random(5, 32, seed=3)
    products = [
        kind.make(weight, bias, gated=True)(rows)
        for kind in (LinearKind("torch"), choose_linear("cpu", "fp32", "auto", level))
    ]
    torch.testing.assert_close(*products)


def test_without_them_torch_computes_and_int8_is_refused() -> None:
    kind = choose_linear("cpu", "bf16", "auto", None)
    assert isinstance(kind.make(random(8, 8, seed=1), None), LibraryLinear)
    with pytest.raises(ConfigError, match="need the compiled kernels"):
        choose_linear("cpu", "bf16", "int8", None)
    with pytest.raises(ConfigError, match="go with --dtype bf16"):
        choose_linear("cpu", "fp32", "int8", "avx2")
    with pytest.raises(ConfigError, match="'int4' is unknown: choose one of auto, int8"):
        choose_linear("cpu", "bf16", "int4", "avx2")
