"""Every kernel on a real device: float64 truth, streams, devices, 64-bit addresses, no waiting for the device.

Each test has one body for `cuda` and for the CPU, where it runs in Triton's interpreter at a small size, so that a
mistake in a test shows before there is a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_ops_jacobian import Posterior, assert_within_budget, data, posterior_and_dense

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops.dispatch import interpreting
from benchmarks.cases import Case, all_cases, interpretable
from benchmarks.cases.case import Provider, absent_here

CPU = pytest.param("cpu", marks=pytest.mark.interpret)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
OURS = ("triton", "triton lower", "native")
PAIRS = [
    pytest.param(case, name, id=f"{case.name}-{name}")
    for case in all_cases()
    for name in OURS
    if any(provider.name == name for provider in case.providers(torch.device("cpu")))
]
# One case of each operation: the bodies on the CPU say nothing new.
FEW = list({(pair.values[0].operation, pair.values[1]): pair for pair in reversed(PAIRS)}.values())
HOT = ("grouped_incremental_svd", "grouped_outer_product", "grouped_square_sum", "grouped_jacobian_covariance")


@pytest.fixture(params=[CPU, CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and (interpreting() or not torch.cuda.is_available()):
        pytest.skip("no CUDA device, or TRITON_INTERPRET=1")
    return torch.device(request.param)


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """What a kernel fails to write, or should not read, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def ours(case: Case, name: str, device: torch.device) -> tuple[Case, Provider]:
    small = interpretable(case.dry())
    provider = next(provider for provider in small.providers(device) if provider.name == name)
    if provider.absent:
        pytest.skip(provider.absent)
    return small, provider


def assert_right(case: Case, provider: Provider, inputs: Any, truth: Any) -> None:
    error = case.error(truth, provider.comparable(provider.call(inputs)))
    assert error <= case.tolerance


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_every_case_against_float64(case, name, device):
    small, provider = ours(case, name, device)
    for seed in range(1 if device.type == "cpu" else 3):
        inputs = small.inputs(device, seed)
        truth = small.truth(inputs)
        assert_right(small, provider, inputs, truth)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_every_case_at_a_moderate_size(case, name):
    """Several tiles and multiprocessors, several parts of the rows: too much for the interpreter."""
    if interpreting() or not torch.cuda.is_available():
        pytest.skip("no CUDA device, or TRITON_INTERPRET=1")
    device = torch.device("cuda")
    _, provider = ours(case, name, device)
    moderate = case.moderate()
    provider = next(provider for provider in moderate.providers(device) if provider.name == name)
    inputs = moderate.inputs(device, seed=0)
    truth = moderate.truth(inputs)
    assert_right(moderate, provider, inputs, truth)


SHAPES = {"cpu": [(33, 17), (40, 70)], "cuda": [(33, 17), (1000, 300), (4099, 520), (70000, 24)]}


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_outer_products_within_the_error_budget(dtype, device):
    """Per element at most twice the error of PyTorch from the same inputs, plus the rounding of sums in order."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("arithmetic in bfloat16 is wrong in the interpreter")
    for rows, width in SHAPES[device.type]:
        x = torch.randn(rows, width, device=device).to(dtype)
        truth, plain = x.double().T @ x.double(), x.float().T @ x.float()
        size = x.double().abs().T @ x.double().abs()
        budget = 2 * (plain.double() - truth).abs() + (4 + rows / 16) * torch.finfo(torch.float32).eps * size
        for result in (ops.outer_product(x, impl="triton"), ops.grouped_outer_product([x, x], impl="triton")[1]):
            assert torch.equal(result, result.T)
            assert ((result.double() - truth).abs() <= budget).all()


JACOBIANS = {  # n, tokens, d_in, d_out, outputs
    "cpu": [(2, 5, 66, 3, 2), (1, 4, 3, 66, 2)],
    "cuda": [
        *((2, 37, 70, 5, 3), (2, 130, 260, 4, 33), (1, 4, 90, 40, 2), (2, 9, 6, 200, 17), (3, 70, 4, 130, 2)),
        *((2, 60, 1000, 2, 32), (1, 200, 1000, 4, 32)),  # through inner products of tokens
    ],
}


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_jacobians_within_the_error_budget(dtype, device):
    for shape in JACOBIANS[device.type]:
        _, _, d_in, d_out, _ = shape
        a, g = data(*shape, dtype)
        kept = 4 if max(d_in, d_out) > 8 else 2
        k_s, k_a = (d_out, kept) if d_in >= d_out else (kept, d_in)
        posterior, dense = posterior_and_dense(d_out, d_in, k_s, k_a)
        blocks = tuple(block.to(device) for block in posterior.precision_blocks)
        there = Posterior(posterior.basis_s.to(device), posterior.basis_a.to(device), blocks)
        on_device = a.to(device), g.to(device)
        covariance = ops.jacobian_covariance(*on_device, there, impl="triton")
        grouped = ops.grouped_jacobian_covariance(*([one] * 2 for one in (*on_device, there)), impl="triton")
        gram = ops.jacobian_gram(*on_device, impl="triton")
        assert covariance.device.type == device.type
        assert_within_budget(covariance.cpu(), a, g, dense)
        assert_within_budget(grouped.cpu() / 2, a, g, dense)
        assert_within_budget(gram.cpu(), a, g, torch.eye(d_in * d_out).double())


def test_outer_product_past_two_to_the_31_elements(device):
    large = device.type == "cuda"
    rows, width = (2**24 + 3 if large else 67), 160
    dtype = torch.bfloat16 if large else torch.float32
    x = torch.zeros(rows, width, dtype=dtype, device=device)
    x[-2:] = torch.randn(2, width, device=device)
    truth = x[-2:].double().T @ x[-2:].double()
    for result, expected in (
        (ops.outer_product(x, impl="triton"), truth),
        (ops.grouped_outer_product([x[:, 80:]], impl="triton")[0], truth[80:, 80:]),
    ):
        assert (result.double() - expected).abs().max() <= 1e-6 * truth.abs().max()


def test_outer_product_with_a_result_past_two_to_the_31_elements(device):
    width = 46400 if device.type == "cuda" else 150
    x = torch.randn(3, width, device=device)
    out = torch.zeros(width, width, device=device)
    ops.outer_product(x, out=out, lower=True, impl="triton")
    ops.mirror_lower(out, impl="triton")
    for rows in (slice(0, 40), slice(width - 40, width)):
        truth = x[:, rows].double().T @ x.double()
        assert (out[rows].double() - truth).abs().max() <= 1e-5
        assert torch.equal(out[rows], out[:, rows].T)


def test_incremental_svd_past_two_to_the_31_elements(device):
    large = device.type == "cuda"
    rows, width = (2**19 + 3, 4100) if large else (60, 40)
    x = torch.zeros(rows, width, dtype=torch.bfloat16 if large else torch.float32, device=device)
    mask = torch.zeros(rows, dtype=torch.bool, device=device)
    x[-30:] = (torch.randn(30, 3, device=device) @ torch.randn(3, width, device=device)).to(x.dtype)
    mask[-30:] = True
    state = torch.Generator(device).manual_seed(0)
    basis = None
    for _ in range(2):
        basis = ops.incremental_svd(basis, x, columns=34, mask=mask, generator=state, impl="triton")
    # By its action: the dense [d, d] would be the largest tensor of all. 30 rows: nothing needs to be cut off.
    probe = torch.randn(width, 5, device=device, dtype=torch.float64)
    counted = x[-30:].double()
    truth = 2 * counted.T @ (counted @ probe)
    assert (basis.double() @ (basis.double().T @ probe) - truth).norm() <= 1e-4 * truth.norm()


@pytest.mark.parametrize("wide_input", [True, False])
def test_jacobian_covariance_past_two_to_the_31_elements(wide_input, device):
    large = device.type == "cuda"
    wide = 4100 if large else 70
    tokens = {(True, True): 131080, (True, False): 70000}.get((large, wide_input), 7)
    d_in, d_out = (wide, 4) if wide_input else (4, wide)
    dtype = torch.bfloat16 if large else torch.float32
    examples, outputs = 4, 2
    a = torch.zeros(examples, tokens, d_in, dtype=dtype, device=device)
    g = torch.zeros(examples, outputs, tokens, d_out, dtype=dtype, device=device)
    a[:, -5:] = torch.randn(examples, 5, d_in, device=device).to(dtype)
    g[:, :, -5:] = torch.randn(examples, outputs, 5, d_out, device=device).to(dtype)
    assert not large or max(a.numel(), g.numel()) > 2**31
    gram = ops.jacobian_gram(a, g, impl="triton")
    j = torch.einsum("ncto,nti->ncoi", g[:, :, -5:].double(), a[:, -5:].double()).flatten(2)
    truth = j @ j.mT
    assert (gram.double() - truth).norm() <= 1e-5 * truth.norm()


def test_vocabulary_past_two_to_the_31_elements(device):
    for operation in ("vocabulary_variance", "vocabulary_probs"):
        if absent := absent_here(operation, "triton", device):
            pytest.skip(f"{operation}: {absent}")
    large = device.type == "cuda"
    vocabulary, width = (2**19 + 5, 4100) if large else (40, 24)
    dtype = torch.bfloat16 if large else torch.float32
    weight = torch.zeros(vocabulary, width, dtype=dtype, device=device)
    weight[-3:] = torch.randn(3, width, device=device).to(dtype)
    factor = torch.randn(2, width, 4, device=device).to(dtype)
    variance = ops.vocabulary_variance(weight, factor, impl="triton")
    truth = (weight[-3:].double() @ factor.double()).square().sum(-1)
    assert (variance[:, :-3] == 0).all()
    assert (variance[:, -3:].double() - truth).norm() <= 1e-4 * truth.norm()
    hidden = (torch.randn(2, 3, width, device=device) * width**-0.5).to(dtype)
    probs = ops.vocabulary_probs(weight, hidden, impl="triton")
    logits = hidden.double() @ weight[-3:].double().T
    whole = vocabulary - 3 + logits.exp().sum(-1, keepdim=True)
    truth = (logits.exp() / whole).mean(1)
    assert (probs[:, -3:].double() - truth).norm() <= 1e-4 * truth.norm()
    assert (probs[:, 0].double() - (1 / whole).mean((1, 2))).abs().max() <= 1e-4 / vocabulary


def flat(inputs: Any) -> list[torch.Tensor]:
    """All tensors of nested inputs."""
    if isinstance(inputs, torch.Tensor):
        return [inputs]
    if inputs is None:
        return []
    parts = inputs if isinstance(inputs, list | tuple) else vars(inputs).values()
    return [tensor for part in parts for tensor in flat(part)]


@contextlib.contextmanager
def busy_side_stream(device: torch.device) -> Iterator[None]:
    """A side stream that has much to do before it comes to what is launched inside."""
    if device.type == "cpu":
        yield
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        yield
    torch.cuda.current_stream().wait_stream(side)


@pytest.mark.parametrize(("case", "name"), FEW)
def test_respects_the_current_stream(case, name, device):
    """Inputs that arrive late on a side stream are seen by what is launched there."""
    small, provider = ours(case, name, device)
    inputs = small.inputs(device, seed=0)
    truth = small.truth(inputs)
    assert_right(small, provider, small.inputs(device, seed=0), truth)  # compiles
    kept = [tensor.clone() for tensor in flat(inputs)]
    for tensor in flat(inputs):
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    with busy_side_stream(device):
        for tensor, value in zip(flat(inputs), kept, strict=True):
            tensor.copy_(value)
        result = provider.call(inputs)
    assert small.error(truth, provider.comparable(result)) <= small.tolerance


@pytest.mark.parametrize("inside", [False, True], ids=["other device current", "torch.cuda.device"])
@pytest.mark.parametrize(("case", "name"), FEW)
def test_a_tensors_device_decides(case, name, inside, device):
    """Tensors on cuda:1, with cuda:0 current or inside `torch.cuda.device(1)`."""
    where = device
    if device.type == "cuda":
        if torch.cuda.device_count() < 2:
            pytest.skip("one CUDA device only")
        where = torch.device("cuda:1")
    small, provider = ours(case, name, where)
    inputs = small.inputs(where, seed=0)
    truth = small.truth(inputs)
    on_cuda = device.type == "cuda"
    with torch.cuda.device(where if inside else 0) if on_cuda else contextlib.nullcontext():
        before = torch.cuda.current_device() if on_cuda else None
        result = provider.call(inputs)
        assert before == (torch.cuda.current_device() if on_cuda else None)
    assert all(tensor.device == where for tensor in flat(provider.comparable(result)))
    assert small.error(truth, provider.comparable(result)) <= small.tolerance


@pytest.mark.parametrize("operation", HOT)
def test_no_host_synchronisation(operation, device):
    case = next(case for case in all_cases() if case.operation == operation)
    small, provider = ours(case, "triton", device)
    inputs = small.inputs(device, seed=0)
    if operation == "grouped_incremental_svd" and (absent := absent_here("small_eigh", "native", device)):
        pytest.skip(f"torch.linalg.eigh waits for its result, and: {absent}")
    provider.call(inputs)  # compiles
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        provider.call(inputs)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_grouped_covariance_in_several_launches(monkeypatch, dtype, device):
    """Unequal modules and a workspace that does not hold them all, against their sum one by one in float64."""
    import importlib

    launch = importlib.import_module("bayesian_lora_kernels.ops.jacobian_covariance.kernel_launch")
    monkeypatch.setattr(launch, "_WORKSPACE", 4096)
    lists: tuple[list[Any], ...] = ([], [], [])
    truth: Any = 0
    for d_in, d_out in ((70, 3), (70, 3), (3, 80)):
        a, g = data(2, 6, d_in, d_out, 3, dtype)
        k_s, k_a = (d_out, 4) if d_in > d_out else (4, d_in)
        posterior, dense = posterior_and_dense(d_out, d_in, k_s, k_a)
        j = torch.einsum("ncto,nti->ncoi", g.double(), a.double()).flatten(2)
        truth = truth + j @ dense @ j.mT
        blocks = tuple(block.to(device) for block in posterior.precision_blocks)
        there = replace(
            posterior,
            basis_s=posterior.basis_s.to(device),
            basis_a=posterior.basis_a.to(device),
            precision_blocks=blocks,
        )
        for column, value in zip(lists, (a.to(device), g.to(device), there), strict=True):
            column.append(value)
    result = ops.grouped_jacobian_covariance(*lists, impl="triton")
    assert (result.cpu().double() - truth).norm() <= 1e-6 * truth.norm()
