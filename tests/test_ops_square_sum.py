"""Sums of squares: the reference here, the kernel in the interpreter, both against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bayesian_lora_kernels import ops

IMPLS = [
    pytest.param("reference", id="reference"),
    pytest.param("triton", marks=pytest.mark.interpret, id="triton"),
]


def inputs(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor | None]]:
    """Wide and narrow, ragged, masked, transposed, stride 0, empty, one row."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    xs = [normal(33, 300), normal(200, 8), normal(64, 16).T, normal(1, 5).expand(7, 5), normal(0, 9), normal(1, 1)]
    masks: list[Tensor | None] = [
        torch.rand(33, generator=generator) < 0.5,
        None,
        None,
        None,
        None,
        torch.tensor([True]),
    ]
    xs[0][~masks[0]] = float("nan")  # what does not count may hold anything
    xs.append(normal(2, 40)[:0])
    masks.append(torch.zeros(0, dtype=torch.bool))
    xs.append(normal(5, 3))
    masks.append(torch.zeros(5, dtype=torch.bool))
    return xs, masks


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_against_float64(dtype, impl):
    xs, masks = inputs(dtype)
    truth = [
        float((x.double() if mask is None else x.double()[mask]).square().sum())
        for x, mask in zip(xs, masks, strict=True)
    ]
    found = ops.grouped_square_sum(xs, masks=masks, impl=impl)
    assert found.dtype == torch.float64
    assert found.shape == (len(xs),)
    assert found.tolist() == pytest.approx(truth, rel=1e-6)


def test_other_dtypes():
    xs, masks = inputs(torch.float64)
    found = ops.grouped_square_sum(xs, masks=masks)
    truth = [(x if mask is None else x[mask]).square().sum() for x, mask in zip(xs, masks, strict=True)]
    assert found.tolist() == pytest.approx([float(one) for one in truth], rel=1e-13)
    x = torch.full((3, 5), 3.0, dtype=torch.bfloat16)
    assert ops.grouped_square_sum([x]).tolist() == pytest.approx([135.0], rel=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_counted_numbers_that_are_not_finite_show(bad, impl):
    xs = [torch.ones(40, 20), torch.ones(40, 20)]
    xs[1][17, 13] = bad
    finite = torch.isfinite(ops.grouped_square_sum(xs, impl=impl))
    assert finite.tolist() == [True, False]


def test_bad_calls():
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match="xs to be a list of at least one tensor, got list"):
        ops.grouped_square_sum([])
    with pytest.raises(ValueError, match=r"entry 1: x: expected shape \[M, d\], got float32\[4\]"):
        ops.grouped_square_sum([x, x[:, 0]])
    with pytest.raises(TypeError, match=r"entry 0: x: expected dtype .*, got int64"):
        ops.grouped_square_sum([x.long()])
    with pytest.raises(ValueError, match=r"entry 0: mask: expected shape \[4\], got bool\[3\]"):
        ops.grouped_square_sum([x], masks=[torch.ones(3, dtype=torch.bool)])
    with pytest.raises(ValueError, match="masks: expected 1 entries, got 2"):
        ops.grouped_square_sum([x], masks=[None, None])
    with pytest.raises(ValueError, match="impl to be one of"):
        ops.grouped_square_sum([x], impl="cuda")
