"""The kernels of `jacobian_covariance` that go through inner products of tokens, in the interpreter, against float64;
and which arguments take that route.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from test_kernels_jacobian import covariance
from test_ops_jacobian import assert_within_budget, data, jacobians, posterior_and_dense

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops.jacobian_covariance.variants import Shape, by_tokens, variant

pytest.importorskip("triton")
pytestmark = pytest.mark.interpret
# By name: the package's attribute of that name is the function.
launch = importlib.import_module("bayesian_lora_kernels.ops.jacobian_covariance.kernel_launch")
tokens = importlib.import_module("bayesian_lora_kernels.ops.jacobian_covariance.launch_tokens")


@pytest.fixture
def through_tokens(monkeypatch):
    """Takes the route whatever it costs; workspaces start as NaN."""
    monkeypatch.setattr(launch, "variant", lambda shape, inputs, entries, architecture: by_tokens(shape, architecture))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def flags(monkeypatch):
    """The flags of every launch: which examples cancelled too much."""
    made = []

    def empty(*arguments, **options):
        made.append(torch.empty(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(tokens, "empty", empty)
    return made


SHAPES = [  # n, tokens, d_in, d_out, outputs, kept directions of the input, of the output
    (2, 37, 70, 5, 3, 4, 5),
    (1, 1, 66, 8, 1, 1, 4),  # one token, one output
    (1, 17, 130, 3, 17, 16, 3),  # several programs for the directions
    (1, 70, 100, 2, 32, 32, 0),  # two tiles of tokens of which one is nearly empty
    (1, 130, 65, 64, 2, 5, 64),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_covariance_equals_dense_kronecker(through_tokens, shape, dtype):
    *sizes, k_a, k_s = shape
    posterior, dense = posterior_and_dense(sizes[3], sizes[2], k_s, k_a)
    a, g = data(*sizes, dtype)
    assert_within_budget(covariance(a, g, posterior), a, g, dense)


def test_masked_tokens_may_hold_anything(through_tokens):
    a, g = data(3, 70, 90, 4, 2)
    posterior, dense = posterior_and_dense(4, 90, 2, 3)
    mask = torch.rand(3, 70) < 0.5
    mask[1] = False
    a[~mask] = float("nan")
    g.transpose(1, 2)[~mask] = float("inf")
    for one in (mask, mask.T.contiguous().T):
        result = covariance(a, g, posterior, one)
        assert_within_budget(result, a, g, dense, mask)
        assert torch.equal(result[1], torch.zeros(2, 2))


def test_any_layout(through_tokens):
    posterior, dense = posterior_and_dense(4, 66, 2, 3)
    layouts = [
        (torch.randn(3, 66, 5).mT, torch.randn(3, 2, 4, 5).mT),
        (torch.randn(6, 10, 132)[::2, ::2, ::2], torch.randn(3, 4, 5, 8)[:, ::2, :, ::2]),
        (torch.randn(1, 5, 66).expand(3, 5, 66), torch.randn(3, 1, 5, 4).expand(3, 2, 5, 4)),
        (torch.randn(3, 5, 67)[..., 1:].half(), torch.randn(3, 2, 5, 4)),  # not aligned
    ]
    for a, g in layouts:
        assert_within_budget(covariance(a, g, posterior), a, g, dense)


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e8])
@pytest.mark.parametrize("outside", [1e-1, 1e-2, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kept_directions_that_the_data_has_pinned_down(through_tokens, flags, ratio, outside, dtype):
    """Jacobians almost inside directions of a precision far above the others': the difference alone fails here."""
    posterior, _ = posterior_and_dense(
        8, 200, 8, 12, [torch.full((8, 12), ratio).double(), *(torch.ones(s).double() for s in ((8,), (12,), ()))]
    )
    a, g = data(2, 40, 200, 8, 3, torch.float64)
    basis = posterior.basis_a
    inside = a @ basis @ basis.T
    a = torch.stack([inside[0] + outside * (a - inside)[0], a[1]]).to(dtype)  # the second example is harmless
    j = jacobians(a, g.to(dtype)).reshape(2, 3, 8, 200)
    kept, rest = j @ basis, j - j @ basis @ basis.T
    truth = kept.flatten(2) @ kept.flatten(2).mT / ratio + rest.flatten(2) @ rest.flatten(2).mT
    result = covariance(a, g.to(dtype), posterior)
    plain = ops.jacobian_covariance(a.float(), g.to(dtype).float(), posterior, impl="reference")
    for one, exact, other in zip(result, truth, plain, strict=True):
        assert (one - exact).norm() <= 3 * (other - exact).norm() + 2e-6 * exact.norm()
    assert flags[0].tolist() == [[int(ratio > 1 and outside < 0.1), 0]]


def test_massive_activations(through_tokens):
    """A token, and a column, that outweigh all others by far: relative to what an entry could be, nothing is lost."""
    posterior, dense = posterior_and_dense(4, 100, 4, 8)
    a, g = data(2, 20, 100, 4, 3)
    a[:, 0] *= 1e4
    a[:, :, 7] *= 1e3
    assert_within_budget(covariance(a, g, posterior), a, g, dense)


def test_variances_are_positive(through_tokens):
    """Jacobians of zero remainder, and zero Jacobians."""
    posterior, _ = posterior_and_dense(
        4, 100, 4, 8, [torch.full((4, 8), 1e8).double(), *(torch.ones(s).double() for s in ((4,), (8,), ()))]
    )
    a, g = data(2, 20, 8, 4, 3)
    a = a @ posterior.basis_a.float().T
    g[:, 1] = 0
    variance = covariance(a, g, posterior).diagonal(dim1=1, dim2=2)
    assert (variance[:, [0, 2]] > 0).all()
    assert (variance[:, 1] == 0).all()


def test_modules_that_share_their_input(through_tokens, flags):
    """q, k and v have their token products once, another module's basis or mask makes an input of its own."""
    a, posterior, dense = torch.randn(2, 9, 70), *posterior_and_dense(4, 70, 4, 3)
    other, other_dense = posterior_and_dense(4, 70, 4, 3)
    posterior.basis_a = posterior.basis_a.float()
    mask = torch.rand(2, 9) < 0.7
    g = [torch.randn(2, 3, 9, 4) for _ in range(5)]
    inputs, posteriors, masks = [a, a, a, a, a.clone()], [posterior, other, posterior, posterior, posterior], [None] * 5
    masks[3] = mask
    result = ops.grouped_jacobian_covariance(inputs, g, posteriors, masks=masks, impl="triton")
    js = [jacobians(*one) for one in zip(inputs, g, masks, strict=True)]
    denses = [dense, other_dense, dense, dense, dense]
    truth = sum(j @ d @ j.mT for j, d in zip(js, denses, strict=True))
    assert (result - truth).norm() <= 1e-6 * truth.norm()
    # Modules with a mask are a group of their own.
    assert sorted(len(one) for one in flags) == [1, 3]


def test_a_small_workspace_changes_nothing(through_tokens, monkeypatch):
    a, posterior, _ = torch.randn(3, 9, 70), *posterior_and_dense(4, 70, 4, 3)
    g = [torch.randn(3, 3, 9, 4) for _ in range(3)]
    arguments = [a] * 3, g, [posterior] * 3
    expected = ops.grouped_jacobian_covariance(*arguments, impl="triton")
    for limit in (1, 20_000, 60_000):
        monkeypatch.setattr(launch, "_WORKSPACE", limit)
        assert torch.equal(ops.grouped_jacobian_covariance(*arguments, impl="triton"), expected)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("outputs", "tokens", "kept", "sharing", "expected"),
    [
        (1, 256, 10, 1, "tokens"),
        (4, 256, 10, 1, "tokens"),
        (4, 600, 10, 1, "input"),
        (4, 600, 10, 3, "tokens"),  # their input counts once
        (32, 256, 10, 1, "tokens"),
        (32, 256, 32, 1, "tokens"),
        (32, 256, 0, 1, "input"),  # nothing to take out of tokens that cancel
        (32, 256, 40, 1, "input"),  # no registers
        (40, 256, 10, 1, "input"),
        (32, 2048, 10, 1, "input"),  # its cost grows with the square
    ],
)
def test_route(outputs, tokens, kept, sharing, expected, architecture):
    on_gpu = dict(interpreted=False, masked=True, aligned=True, contiguous=True)
    sizes = dict(outputs=outputs, tokens=tokens, width=4096, rows=8, kept=kept)
    shape = Shape(wide_input=True, wide=torch.bfloat16, narrow=torch.bfloat16, **sizes, **on_gpu)
    assert variant(shape, 1, sharing, architecture).route == expected
    assert variant(shape._replace(wide_input=False), 1, sharing, architecture).route == "output"


def test_variants_are_distinct_and_readable():
    a, g = data(2, 37, 70, 4, 3, torch.float16)
    out, mask = torch.empty(2, 3, 3), torch.ones(2, 37) > 0
    assert [str(one) for one in launch.variants(out, a, g, None)] == [
        "input fp16 fp16 aligned contiguous rest R=4 C=4 O=4 D=64 T=32"
    ]
    bases = [torch.empty(4, 4)] * 3, [torch.empty(70, 6)] * 3
    found = launch.variants(out, [a, a, a.mT.contiguous().mT], [g] * 3, *bases, *[[None] * 3] * 4, [None, mask, None])
    assert len(set(found)) == len({str(one) for one in found}) == 3
