"""`outer_product` and its grouped form against float64 mathematics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops.outer_product import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def truth_of(x, mask=None):
    rows = x.double() if mask is None else x.double()[mask]
    return rows.T @ rows


def assert_within_budget(result, x, mask=None, scale=1.0, start=None):
    """At most twice the error of plain PyTorch in the dtype of the result, per element, plus its rounding."""
    rows = x if mask is None else x[mask]
    truth = scale * truth_of(x, mask)
    plain = scale * (rows.to(result.dtype).T @ rows.to(result.dtype))
    size = abs(scale) * (rows.double().abs().T @ rows.double().abs())
    if start is not None:
        truth, plain, size = truth + start.double(), plain + start, size + start.double().abs()
    budget = 2 * (plain.double() - truth).abs() + 4 * torch.finfo(result.dtype).eps * size
    assert ((result.double() - truth).abs() <= budget).all()


def layouts(rows, width, dtype):
    """The same kind of data in every layout that callers hand over."""
    yield "contiguous", torch.randn(rows, width).to(dtype)
    yield "transposed", torch.randn(width, rows).to(dtype).T
    yield "strided", torch.randn(2 * rows, 3 * width).to(dtype)[::2, ::3]
    yield "stride-0 rows", torch.randn(1, width).to(dtype).expand(rows, width)
    yield "stride-0 columns", torch.randn(rows, 1).to(dtype).expand(rows, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(33, 17), (1, 9), (0, 5), (21, 1), (7, 0), (129, 64)])
def test_equals_float64_in_every_layout(rows, width, dtype):
    for name, x in layouts(rows, width, dtype):
        result = ops.outer_product(x)
        assert result.shape == (width, width), name
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        assert torch.equal(result, result.T), name
        assert_within_budget(result, x)


# Next to the smallest number of float32 a scale has no digits to lose.
SCALES = st.just(0.0) | st.floats(1e-30, 3) | st.floats(-3, -1e-30)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.integers(1, 40), SCALES, st.integers(0, 2**31))
def test_any_shape_mask_and_scale(rows, width, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    mask = torch.rand(rows, generator=generator) < 0.6
    assert_within_budget(ops.outer_product(x, mask=mask, scale=scale), x, mask, scale)


def test_masked_rows_may_hold_anything():
    x, mask = torch.randn(20, 6), torch.arange(20) % 3 != 0
    clean = ops.outer_product(x, mask=mask)
    x[~mask] = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(2)
    assert torch.equal(ops.outer_product(x, mask=mask), clean)
    assert torch.equal(ops.outer_product(x, mask=torch.zeros(20, dtype=torch.bool)), torch.zeros(6, 6))


def test_out_is_accumulated_in_place_whatever_its_layout():
    x = torch.randn(40, 12)
    for start in (torch.randn(12, 12), torch.randn(12, 12).T, torch.randn(24, 36)[::2, ::3]):
        out = start.clone(memory_format=torch.preserve_format) if start.is_contiguous() else start
        before = out.clone()
        result = ops.outer_product(x, scale=0.25, out=out)
        assert result is out
        assert_within_budget(out, x, scale=0.25, start=before)
    symmetric = torch.randn(12, 12)
    symmetric = symmetric + symmetric.T
    ops.outer_product(x, out=symmetric)
    assert torch.equal(symmetric, symmetric.T)


@pytest.mark.parametrize("accumulate", [False, True])
def test_blocks_of_a_wide_factor(monkeypatch, accumulate):
    monkeypatch.setattr(reference, "_BLOCK", 8)
    x = torch.randn(50, 37)
    out = torch.full((37, 37), 0.0 if accumulate else float("nan"))  # poisoned: nothing may be left unwritten
    reference.outer_product(out, x, None, 2.0, accumulate)
    assert torch.equal(out, out.T)
    assert_within_budget(out, x, scale=2.0)


def test_grouped_accumulates_below_the_diagonal_and_is_mirrored_once(monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK", 8)
    xs = [torch.randn(50, 37), torch.randn(20, 3)]
    outs = [torch.zeros(37, 37), torch.zeros(3, 3)]
    for _ in range(2):
        ops.grouped_outer_product(xs, outs=outs, lower=True)
    assert not outs[0].triu(20).any()  # what is above was left alone
    for x, out in zip(xs, outs, strict=True):
        ops.mirror_lower(out)
        assert torch.equal(out, out.T)
        assert_within_budget(out, x, scale=2.0)
    with pytest.raises(ValueError, match="grouped_outer_product: lower: expected outs to accumulate into, got None"):
        ops.grouped_outer_product(xs, lower=True)


def test_grouped_equals_float64_for_ragged_widths():
    shapes = [(30, 8), (0, 3), (1, 17), (64, 4), (30, 1)]
    xs = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, (*DTYPES, torch.float32), strict=True)]
    masks = [None, torch.zeros(0, dtype=torch.bool), None, torch.rand(64) < 0.5, torch.rand(30) < 0.5]
    scales = [1.0, 2.0, -0.5, 3.0, 0.0]
    results = ops.grouped_outer_product(xs, masks=masks, scales=scales)
    for x, mask, scale, result in zip(xs, masks, scales, results, strict=True):
        assert_within_budget(result, x, mask, scale)
    outs = [result.clone() for result in results]
    again = ops.grouped_outer_product(xs, masks=masks, scales=scales, outs=outs)
    for x, mask, scale, out, returned, start in zip(xs, masks, scales, outs, again, results, strict=True):
        assert returned is out
        assert_within_budget(out, x, mask, scale, start)
    assert ops.grouped_outer_product([]) == []


def test_records_no_gradient():
    x = torch.randn(5, 3, requires_grad=True)
    assert not ops.outer_product(x).requires_grad


BAD = [
    (
        lambda x: ops.outer_product(x.long()),
        TypeError,
        r"outer_product: x: expected dtype float16.*got int64\[6, 4\] on cpu",
    ),
    (lambda x: ops.outer_product([1.0]), TypeError, r"outer_product: x: expected a tensor \[M, d\], got list"),
    (lambda x: ops.outer_product(x[None]), ValueError, r"x: expected shape \[M, d\], got float32\[1, 6, 4\]"),
    (lambda x: ops.outer_product(x, mask=torch.ones(6)), TypeError, r"mask: expected dtype bool, got float32\[6\]"),
    (lambda x: ops.outer_product(x, mask=torch.ones(5) > 0), ValueError, r"mask: expected shape \[6\], got bool\[5\]"),
    (
        lambda x: ops.outer_product(x, mask=(torch.ones(6) > 0).to("meta")),
        ValueError,
        r"mask: expected a tensor on cpu, got .* on meta",
    ),
    (
        lambda x: ops.outer_product(x, out=torch.zeros(4, 5)),
        ValueError,
        r"out: expected shape \[4, 4\], got float32\[4, 5\]",
    ),
    (
        lambda x: ops.outer_product(x, out=torch.zeros(4, 4).double()),
        TypeError,
        r"out: expected dtype float32, got float64",
    ),
    (
        lambda x: ops.outer_product(x, out=torch.zeros(4, 1).expand(4, 4)),
        ValueError,
        r"out: .* their own memory, got strides of \(1, 0\)",
    ),
    (
        lambda x: ops.outer_product(x, impl="cuda"),
        ValueError,
        r"outer_product: expected impl to be one of .*got 'cuda'",
    ),
    (
        lambda x: ops.grouped_outer_product([x, x[0]]),
        ValueError,
        r"grouped_outer_product: entry 1: x: expected shape \[M, d\]",
    ),
    (
        lambda x: ops.grouped_outer_product([x], masks=[]),
        ValueError,
        r"grouped_outer_product: masks: expected 1 entries, got 0",
    ),
    (
        lambda x: ops.grouped_outer_product([x, x], scales=2.0),
        TypeError,
        r"scales: expected a list of 2 entries, got float",
    ),
    (lambda x: ops.grouped_outer_product(x), TypeError, r"expected xs to be a list of tensors, got Tensor"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(6, 4))
