"""Per-example weight gradients: the reference here, the kernel in the interpreter, both against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bayesian_lora_kernels import ops

IMPLS = [
    pytest.param("reference", id="reference"),
    pytest.param("triton", marks=pytest.mark.interpret, id="triton"),
]
# Output gradients and inputs of LoRA B, LoRA A, a wide layer, one with ragged sizes, no tokens, no examples.
SIZES = [(3, 40, 200, 8), (3, 40, 8, 200), (2, 70, 66, 80), (1, 5, 3, 1), (2, 0, 4, 3), (0, 4, 3, 2)]


def problem(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Every size as it is and under a mask; one transposed, one of stride 0. What does not count holds NaN."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    gs, inputs, masks = [], [], []
    for n, t, d_out, d_in in SIZES:
        for masked in (False, True):
            gs.append(normal(n, t, d_out))
            inputs.append(normal(n, t, d_in))
            masks.append(torch.rand(n, t, generator=generator) < 0.6 if masked else None)
            if masked:
                gs[-1][~masks[-1]] = float("nan")
                inputs[-1][~masks[-1]] = float("inf")
    gs += [normal(2, 24, 33).mT, normal(2, 1, 16).expand(2, 33, 16)]
    inputs += [normal(2, 33, 8), normal(2, 33, 1).expand(2, 33, 16)]
    return gs, inputs, [*masks, None, torch.arange(66).reshape(2, 33) % 3 > 0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_against_float64(dtype, impl):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the kernel sums in float32, and says so")
    gs, inputs, masks = problem(dtype)
    found = ops.grouped_weight_gradient(gs, inputs, masks=masks, impl=impl)
    for one, g, a, mask in zip(found, gs, inputs, masks, strict=True):
        weight = torch.ones(g.shape[:2]) if mask is None else mask
        g, a = (torch.where(weight[..., None] > 0, x.double(), 0.0) for x in (g, a))
        assert one.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert one.shape == (g.shape[0], g.shape[2], a.shape[2])
        error = (one.double() - torch.einsum("nto,nti->noi", g, a)).abs()
        bound = torch.einsum("nto,nti->noi", g.abs(), a.abs()) * 1e-6 + 1e-12
        assert (error <= bound).all()


def test_gradients_and_inputs_of_different_dtypes():
    g, a = torch.randn(2, 5, 3).bfloat16(), torch.randn(2, 5, 4)
    (found,) = ops.grouped_weight_gradient([g], [a])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.einsum("nto,nti->noi", g.float(), a))


def test_what_is_refused():
    g, a = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match="grouped_weight_gradient: expected gs to be a list of at least one tensor"):
        ops.grouped_weight_gradient([], [])
    with pytest.raises(ValueError, match=r"entry 1: a: expected shape \[2, 5, d_in\]"):
        ops.grouped_weight_gradient([g, g], [a, a[:1]])
    with pytest.raises(ValueError, match=r"entry 0: mask: expected shape \[2, 5\]"):
        ops.grouped_weight_gradient([g], [a], masks=[torch.ones(5, dtype=torch.bool)])
    with pytest.raises(ValueError, match="inputs: expected 2 entries, got 1"):
        ops.grouped_weight_gradient([g, g], [a])


G, A, MASK = torch.zeros(2, 5, 3), torch.zeros(2, 5, 4), torch.ones(2, 5) > 0
BAD = [
    (G.long(), A, MASK, TypeError, r"entry 0: g: expected dtype .*, got int64\[2, 5, 3\]"),
    (G[0], A, MASK, ValueError, r"entry 0: g: expected shape \[N, T, d_out\]"),
    ("g", A, MASK, TypeError, r"entry 0: g: expected a tensor .*, got str"),
    (G, None, MASK, TypeError, r"entry 0: a: expected a tensor .*, got NoneType"),
    (G, A[:, :4], MASK, ValueError, r"entry 0: a: expected shape \[2, 5, d_in\]"),
    (G, A.to("meta"), MASK, ValueError, r"entry 0: a: expected a tensor on cpu, got .* on meta"),
    (G, A, MASK.float(), TypeError, r"entry 0: mask: expected dtype bool"),
    (G, A, MASK.to("meta"), ValueError, r"entry 0: mask: expected a tensor on cpu"),
]


@pytest.mark.parametrize("operation", [ops.grouped_weight_gradient, ops.grouped_masked_gradient])
@pytest.mark.parametrize(("g", "a", "mask", "kind", "message"), BAD)
def test_bad_input_is_named(operation, g, a, mask, kind, message):
    with pytest.raises(kind, match=message):
        operation([g], [a], masks=[mask])
    with pytest.raises(ValueError, match="expected impl to be one of"):
        operation([G], [A], masks=[MASK], impl="fast")
