"""Every operation is a well-behaved custom operator: opcheck, and torch.compile without a graph break."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from bayesian_lora_kernels import ops

OPERATORS = torch.ops.bayesian_lora_kernels


@dataclass
class Posterior:
    basis_s: torch.Tensor
    basis_a: torch.Tensor
    precision_blocks: tuple[torch.Tensor, ...]


def arguments():
    x, mask, out = torch.randn(40, 12), torch.rand(40) < 0.7, torch.zeros(12, 12)
    basis, few = torch.zeros(12, 6), torch.randn(3, 12).bfloat16()
    numbers = torch.rand(2, 6, 16, dtype=torch.float64)
    a, g = torch.randn(2, 5, 7), torch.randn(2, 3, 5, 4)
    weights = (torch.rand(2, 3), torch.rand(2), torch.rand(3), torch.rand(()))
    mask_nt = torch.rand(2, 5) < 0.7
    posterior = (torch.randn(4, 2), torch.randn(7, 3), *weights)
    head, hidden, bias = torch.randn(11, 7), torch.randn(2, 5, 7), torch.randn(11)
    targets, lse = torch.tensor([3, 10]), torch.full((2, 5), 9.0, dtype=torch.float64)
    heads, tangents = (g, g[:, :1], g[:, :1]), torch.randn(2, *g.shape)
    return {
        "mirror_lower": (torch.randn(12, 12), "auto"),
        "grouped_outer_product": ([x, few], [mask, None], [1.0, 2.0], "auto"),
        "grouped_outer_product_accumulate": ([out, out.clone()], [x, few], [mask, None], [1.0, 2.0], "auto"),
        "grouped_square_sum": ([x, few], [mask, None], "auto"),
        "grouped_masked_gradient": ([g[:, 0], g[:, 1]], [a, a], [mask_nt, mask_nt], "auto"),
        "grouped_weight_gradient": ([g[:, 0], g[:, 1]], [a, a], [mask_nt, None], "auto"),
        "grouped_incremental_svd": ([basis, basis[:, :0]], [x, few], [mask, None], numbers, [6, 5], 2, "auto"),
        "jacobian_gram": (a, g, None, "auto"),
        "jacobian_covariance": (a, g, *posterior, mask_nt, "auto"),
        "grouped_jacobian_covariance": ([a, a], [g, g], *([part] * 2 for part in posterior), [mask_nt, None], "auto"),
        "small_eigh": (torch.eye(5).repeat(3, 1, 1), "auto"),
        "vocabulary_logsumexp": (head, hidden, bias, 5.0, False, "auto"),
        "vocabulary_probs": (head, hidden, None, None, False, lse, 0, "auto"),
        "vocabulary_statistics": (
            head,
            hidden.bfloat16(),
            bias.expand(len(hidden), -1),
            None,
            True,
            targets,
            None,
            None,
            "auto",
        ),
        "vocabulary_variance": (head, hidden.mT, "auto"),
        "attention_jvp": (*heads, tangents, None, tangents[:, :, :1], mask_nt[:, None, None], False, 0.5, "auto"),
    }


@pytest.mark.parametrize("name", sorted(arguments()))
def test_opcheck(name):
    torch.library.opcheck(getattr(OPERATORS, name).default, arguments()[name])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(backend):
    def step(x, mask, a, g, basis_s, basis_a, blocks, out):
        first = ops.outer_product(x, mask=mask, scale=0.5)
        second = ops.mirror_lower(ops.outer_product(x, out=out, lower=True))
        grouped = ops.grouped_outer_product([x, 2 * x], masks=[mask, None], outs=[first, out])
        squares = ops.grouped_square_sum([x, x[:3]], masks=[mask, None])
        gradients = ops.grouped_weight_gradient([g[:, 0], g[:, 1]], [a, a], masks=[mask[:10].reshape(2, 5), None])
        basis = ops.incremental_svd(None, x, columns=6, mask=mask, fresh=2)
        bases = ops.grouped_incremental_svd([basis, None], [x, x[:3]], columns=6)
        posterior = Posterior(basis_s, basis_a, blocks)
        gram = ops.jacobian_gram(a, g) + ops.jacobian_covariance(a, g, posterior)
        gram = gram + ops.grouped_jacobian_covariance([a, 2 * a], [g, g], [posterior] * 2)
        lse = ops.vocabulary_logsumexp(a[0], a, softcap=9.0)
        probs = ops.vocabulary_probs(a[0], a, logsumexp=lse, softcap=9.0) + ops.vocabulary_variance(a[0], a.mT)
        statistics = ops.vocabulary_statistics(a[0], a, targets=mask[:2].long())
        eigen = ops.small_eigh(out[None])
        attended = ops.attention_jvp(g, g, g, g[None], causal=True)
        return first, second, *grouped, squares, *gradients, basis, *bases, gram, *eigen, probs, *statistics, *attended

    def inputs():
        torch.manual_seed(1)
        blocks = (torch.rand(2, 3), torch.rand(2), torch.rand(3), torch.rand(()))
        shapes = ((2, 5, 7), (2, 3, 5, 4), (4, 2), (7, 3))
        tensors = [torch.randn(shape) for shape in shapes]
        return torch.randn(40, 12), torch.rand(40) < 0.7, *tensors, blocks, torch.zeros(12, 12)

    expected = step(*inputs())
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)(*inputs())
    for result, truth in zip(compiled, expected, strict=True):
        assert torch.equal(result, truth)
