"""The Triton kernels of `jacobian_gram`, `jacobian_covariance` and the grouped form, in Triton's interpreter, against
float64. What is checked and how is in `test_ops_jacobian.py`, which does it for the reference.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from test_ops_jacobian import (
    Posterior,
    assert_within_budget,
    data,
    jacobians,
    posterior_and_dense,
)

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops.jacobian_covariance.routes import kernel_refuses
from bayesian_lora_kernels.ops.jacobian_covariance.variants import by_jacobian, side_by_side

pytestmark = pytest.mark.interpret


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """Outputs and workspaces start as NaN: what a kernel fails to write, or should not read, shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _by_jacobian(monkeypatch):
    """The other route has its tests in `test_kernels_jacobian_tokens.py`."""
    launch = importlib.import_module("bayesian_lora_kernels.ops.jacobian_covariance.kernel_launch")
    monkeypatch.setattr(launch, "variant", lambda shape, inputs, entries, architecture: by_jacobian(shape))


def covariance(a, g, posterior, mask=None):
    return ops.jacobian_covariance(a, g, posterior, mask=mask, impl="triton")


def gram(a, g, mask=None):
    return ops.jacobian_gram(a, g, mask=mask, impl="triton")


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [  # n, tokens, d_in, d_out, outputs
    (2, 37, 70, 5, 3),  # wide input, ragged everywhere, more than one step of tokens
    (1, 1, 64, 8, 1),  # one token, one output
    (2, 3, 1, 1, 2),  # one column
    (1, 9, 130, 3, 17),  # more outputs than rows of a matrix instruction
    (1, 4, 66, 2, 33),  # more than 32 outputs: another configuration
    (2, 5, 6, 100, 3),  # wide output
    (1, 2, 3, 65, 33),
    (1, 4, 90, 40, 2),  # several blocks of directions
    (1, 3, 40, 90, 2),
    (3, 7, 9, 9, 4),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gram_equals_explicit_jacobians(shape, dtype):
    a, g = data(*shape, dtype)
    assert_within_budget(gram(a, g), a, g, torch.eye(shape[2] * shape[3]).double())


@pytest.mark.parametrize("shape", SHAPES[:7])
@pytest.mark.parametrize("narrow", ["full", "some", "none"])
@pytest.mark.parametrize("wide", ["some", "none", "many"])
def test_covariance_equals_dense_kronecker(shape, narrow, wide):
    _, _, d_in, d_out, _ = shape
    k_wide = {"some": max(d_in, d_out) // 8, "none": 0, "many": min(max(d_in, d_out), 33)}[wide]
    k_narrow = {"full": min(d_in, d_out), "some": min(d_in, d_out) // 2, "none": 0}[narrow]
    k_s, k_a = (k_narrow, k_wide) if d_in >= d_out else (k_wide, k_narrow)
    posterior, dense = posterior_and_dense(d_out, d_in, k_s, k_a)
    a, g = data(*shape, (torch.float32, torch.float16)[k_wide % 2])
    assert_within_budget(covariance(a, g, posterior), a, g, dense)


@pytest.mark.parametrize("shape", [(2, 5, 9, 4, 3), (2, 5, 4, 9, 3), (1, 6, 4, 4, 2)])
def test_without_any_complement(shape):
    """The variances of an absent complement mean nothing and may be anything."""
    _, _, d_in, d_out, _ = shape
    posterior, dense = posterior_and_dense(d_out, d_in, d_out, d_in)
    kept, rest_a, rest_s, rest = posterior.precision_blocks
    posterior.precision_blocks = (kept, rest_a * float("nan"), rest_s * float("inf"), rest * 0)
    a, g = data(*shape)
    assert_within_budget(covariance(a, g, posterior), a, g, dense)


@pytest.mark.parametrize("shape", [(3, 6, 70, 4, 2), (3, 6, 4, 70, 2)])
def test_masked_tokens_may_hold_anything(shape):
    _, _, d_in, d_out, _ = shape
    a, g = data(*shape)
    posterior, dense = posterior_and_dense(d_out, d_in, 2, 3)
    mask = torch.rand(3, 6) < 0.5
    mask[1] = False
    a[~mask] = float("nan")
    g.transpose(1, 2)[~mask] = float("inf")
    assert_within_budget(covariance(a, g, posterior, mask), a, g, dense, mask)
    assert_within_budget(covariance(a, g, posterior, mask.T.contiguous().T), a, g, dense, mask)
    result = gram(a, g, mask)
    assert_within_budget(result, a, g, torch.eye(d_in * d_out).double(), mask)
    assert torch.equal(result[1], torch.zeros(2, 2))


@pytest.mark.parametrize(("d_in", "d_out"), [(66, 4), (4, 66)])
def test_any_layout_mixed_dtypes_and_empty_sizes(d_in, d_out):
    posterior, dense = posterior_and_dense(d_out, d_in, 2, 3)
    layouts = [
        (torch.randn(3, d_in, 5).mT, torch.randn(3, 2, d_out, 5).mT),
        (torch.randn(6, 10, 2 * d_in)[::2, ::2, ::2], torch.randn(3, 4, 5, 2 * d_out)[:, ::2, :, ::2]),
        (torch.randn(1, 5, d_in).expand(3, 5, d_in), torch.randn(3, 1, 5, d_out).expand(3, 2, 5, d_out)),
        (torch.randn(3, 1, d_in).expand(3, 5, d_in), torch.randn(3, 2, 1, d_out).expand(3, 2, 5, d_out)),
        (torch.randn(3, 5, 1).expand(3, 5, d_in), torch.randn(3, 2, 5, 1).expand(3, 2, 5, d_out)),
        (torch.randn(3, 5, d_in).half(), torch.randn(3, 2, 5, d_out)),
        (torch.randn(3, 5, d_in + 1)[..., 1:], torch.randn(3, 2, 5, d_out + 1)[..., 1:]),  # not aligned
    ]
    for a, g in layouts:
        assert_within_budget(covariance(a, g, posterior), a, g, dense)
        assert_within_budget(gram(a, g), a, g, torch.eye(d_in * d_out).double())
    for n, tokens, outputs in ((0, 5, 2), (3, 0, 2), (3, 5, 0)):
        a, g = data(n, tokens, d_in, d_out, outputs)
        for result in (covariance(a, g, posterior), gram(a, g)):
            assert torch.equal(result, torch.zeros(n, outputs, outputs))


@pytest.mark.parametrize("ratio", [1e3, 1e6])
@pytest.mark.parametrize(("d_in", "d_out"), [(200, 8), (8, 200)])
def test_kept_directions_that_the_data_has_pinned_down(ratio, d_in, d_out):
    """Curvature far above the prior, Jacobians almost inside the kept directions: a subtractive form fails here."""
    k = 12
    wide_input = d_in > d_out
    k_s, k_a = (d_out, k) if wide_input else (k, d_in)
    precisions = (torch.full((k_s, k_a), 1 + ratio), torch.ones(k_s), torch.ones(k_a), torch.ones(()))
    posterior, _ = posterior_and_dense(d_out, d_in, k_s, k_a, tuple(block.double() for block in precisions))
    a, g = data(4, 16, d_in, d_out, 3, torch.float64)
    if wide_input:
        basis = posterior.basis_a
        a = (a @ basis @ basis.T + 1e-5 * a).float().double()
    else:
        basis = posterior.basis_s
        g = (g @ basis @ basis.T + 1e-5 * g).float().double()
    j = jacobians(a, g).reshape(4, 3, d_out, d_in)
    j = j if wide_input else j.mT
    kept, rest = j @ basis, j - j @ basis @ basis.T
    truth = (kept.flatten(2) @ kept.flatten(2).mT) / (1 + ratio) + rest.flatten(2) @ rest.flatten(2).mT
    result = covariance(a.float(), g.float(), posterior)
    error = (result - truth).norm()
    plain = (ops.jacobian_covariance(a.float(), g.float(), posterior, impl="reference") - truth).norm()
    assert error <= 2 * plain + 1e-6 * truth.norm()


def test_basis_with_tiles_that_hold_little_or_nothing_of_it():
    """Unit vectors in one tile, a repeated direction, columns of zeros in the others."""
    d_in, d_out, k = 200, 4, 3
    basis = torch.zeros(d_in, k)
    basis[0, 0] = 1
    basis[[1, 70], 1] = 0.5**0.5
    basis[[1, 70, 199], 2] = torch.tensor([0.5, -0.5, 0.5**0.5])
    blocks = (torch.rand(d_out, k) + 0.1, torch.rand(d_out) + 0.1, torch.rand(k), torch.rand(()))
    posterior = Posterior(torch.linalg.qr(torch.randn(d_out, d_out)).Q, basis, blocks)
    a, g = data(2, 5, d_in, d_out, 3)
    exact = Posterior(posterior.basis_s.double(), basis.double(), tuple(block.double() for block in blocks))
    truth = ops.jacobian_covariance(a.double(), g.double(), exact)
    assert (covariance(a, g, posterior) - truth).norm() <= 3e-7 * truth.norm()


def modules():
    """Three of one shape, one of another, one of the other orientation, one with another number of kept directions."""
    shapes = [(5, 70, 4), (5, 70, 4), (5, 70, 4), (3, 66, 4), (4, 4, 80), (5, 70, 4)]
    lists = [], [], [], [], []
    for i, (tokens, d_in, d_out) in enumerate(shapes):
        a, g = data(2, tokens, d_in, d_out, 3, torch.float16 if i == 2 else torch.float32)
        posterior, dense = posterior_and_dense(d_out, d_in, 3, 2 if i == 5 else 4)
        for column, value in zip(lists, (a, g, posterior, dense, None), strict=True):
            column.append(value)
    lists[4][1] = torch.rand(2, 5) < 0.7
    return lists


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_grouped_is_the_sum_over_modules(impl):
    a, g, posteriors, dense, masks = modules()
    result = ops.grouped_jacobian_covariance(a, g, posteriors, masks=masks, impl=impl)
    js = [jacobians(*one) for one in zip(a, g, masks, strict=True)]
    truth = sum(j @ d @ j.mT for j, d in zip(js, dense, strict=True))
    assert (result - truth).norm() <= 1e-6 * truth.norm()
    assert torch.equal(result, result.mT)


def test_a_small_workspace_changes_nothing(monkeypatch):
    # By name: the package's attribute of that name is the function.
    launch = importlib.import_module("bayesian_lora_kernels.ops.jacobian_covariance.kernel_launch")
    a, g, posteriors, _, masks = modules()
    expected = ops.grouped_jacobian_covariance(a, g, posteriors, masks=masks, impl="triton")
    monkeypatch.setattr(launch, "_WORKSPACE", 100)
    jacobians_ = importlib.import_module("bayesian_lora_kernels.ops.jacobian_covariance.launch_jacobians")
    monkeypatch.setattr(jacobians_, "_PROGRAMS", 1)
    result = ops.grouped_jacobian_covariance(a, g, posteriors, masks=masks, impl="triton")
    assert (result - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_results_repeat_bit_by_bit():
    a, g, posteriors, _, masks = modules()
    first, second = (ops.grouped_jacobian_covariance(a, g, posteriors, masks=masks, impl="triton") for _ in range(2))
    assert torch.equal(first, second)


REFUSED = [
    (data(1, 2, 5, 3, 2, torch.float64), (3, 5), "the input is float64"),
    (data(1, 2, 5, 3, 65), (3, 5), "65 outputs, more than 64"),
    (data(1, 2, 70, 65, 2), (3, 5), "both sides are wider than 64: 70 and 65"),
    (data(1, 2, 70, 3, 2), (3, 65), "65 kept directions on the wide side, more than 64"),
    (data(1, 2, 3, 70, 2), (65, 3), "65 kept directions on the wide side, more than 64"),
]


@pytest.mark.parametrize(("tensors", "kept", "message"), REFUSED)
def test_what_the_kernels_cannot_take_is_refused(tensors, kept, message):
    a, g = tensors
    blocks = (torch.ones(kept), torch.ones(kept[0]), torch.ones(kept[1]), torch.ones(()))
    posterior = Posterior(torch.eye(g.shape[3], kept[0]), torch.eye(a.shape[2], kept[1]), blocks)
    with pytest.raises(RuntimeError, match=message):
        covariance(a, g, posterior)
    with pytest.raises(RuntimeError, match=message):
        ops.grouped_jacobian_covariance([a], [g], [posterior], impl="triton")
    assert kernel_refuses(torch.empty(1, 2, 2), a[:, :, :3], g[:, :2, :, :3], None) is None


@pytest.mark.parametrize(
    ("outputs", "rows", "expected"),
    [
        (4, 8, (4, 8)),
        (3, 5, (4, 8)),
        (32, 8, (32, 1)),
        (64, 8, (64, 1)),
        (1, 1, (1, 16)),
        (16, 3, (16, 2)),
        (1, 64, (1, 32)),
    ],
)
def test_rows_side_by_side(outputs, rows, expected):
    assert side_by_side(outputs, rows, 32) == expected
