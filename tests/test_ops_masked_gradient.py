"""Whether tokens that a mask leaves out have a gradient: the reference here, the kernel in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bayesian_lora_kernels import ops

IMPLS = [
    pytest.param("reference", id="reference"),
    pytest.param("triton", marks=pytest.mark.interpret, id="triton"),
]
SIZES = [(2, 30, 300, 8), (2, 30, 8, 300), (1, 1, 1, 1), (3, 70, 20, 33)]


def problem(dtype: torch.dtype, transposed: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients that are zero, but for rounding, where the mask says no."""
    generator = torch.Generator().manual_seed(0)
    gs, inputs, masks = [], [], []
    for n, t, d_out, d_in in SIZES:
        mask = torch.rand(n, t, generator=generator) < 0.5
        mask[0, -1], mask[-1, 0] = False, True
        shape = (n, d_out, t) if transposed else (n, t, d_out)
        g = torch.randn(shape, generator=generator).to(dtype)
        g = g.mT if transposed else g
        g[~mask] *= torch.finfo(dtype).eps / 8
        gs.append(g)
        inputs.append(torch.randn(n, t, d_in, generator=generator).to(dtype))
        masks.append(mask)
    return gs, inputs, masks


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_what_counts_although_it_is_left_out(dtype, transposed, impl):
    gs, inputs, masks = problem(dtype, transposed)
    assert not ops.grouped_masked_gradient(gs, inputs, masks, impl=impl).any()
    for i in (0, 1, 3):
        places = (~masks[i]).nonzero()
        n, t = (int(place) for place in places[len(places) // 2])
        before, a = gs[i][n, t, -1].clone(), inputs[i][n, t].clone()
        gs[i][n, t, -1] = 0.5
        assert ops.grouped_masked_gradient(gs, inputs, masks, impl=impl).tolist() == [j == i for j in range(4)]
        inputs[i][n, t] = 0  # what is zero takes no gradient with it
        assert not ops.grouped_masked_gradient(gs, inputs, masks, impl=impl).any()
        gs[i][n, t, -1], inputs[i][n, t] = before, a


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_of_gradients_that_are_not_finite_nothing_is_said(bad, impl):
    gs, inputs, masks = problem(torch.float32, False)
    for g, mask in zip(gs, masks, strict=True):
        g[~mask] = 1.0
    gs[0][0, 0, 0] = bad
    assert ops.grouped_masked_gradient(gs[:2], inputs[:2], masks[:2], impl=impl).tolist() == [False, True]


def test_what_is_refused():
    g, a, mask = torch.randn(2, 5, 3), torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="grouped_masked_gradient: expected gs to be a list of at least one tensor"):
        ops.grouped_masked_gradient([], [], [])
    with pytest.raises(ValueError, match=r"entry 0: mask: expected shape \[2, 5\]"):
        ops.grouped_masked_gradient([g], [a], [mask[:1]])
    with pytest.raises(ValueError, match="entry 1: expected a mask and a gradient that is not empty"):
        ops.grouped_masked_gradient([g, g[:, :, :0]], [a, a], [mask, mask])
