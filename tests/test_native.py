"""The native extension: the eigensolver against mathematics, and what it does with bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from bayesian_lora_kernels.ops import native

needs_native = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ORDERS = ["descending", "ascending", "shuffled"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if native.why_unavailable() is None and native.build_info()["cuda"] is None:
            pytest.skip("the native extension was built without CUDA")
    return name


def solve(matrices: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
    """`native.small_eigh` into results poisoned with NaN."""
    eigenvalues = torch.full(matrices.shape[:2], torch.nan, dtype=matrices.dtype, device=matrices.device)
    eigenvectors = torch.full(matrices.shape, torch.nan, dtype=matrices.dtype, device=matrices.device)
    native.small_eigh(eigenvalues, eigenvectors, matrices, **options)
    return eigenvalues, eigenvectors


def assert_decomposes(matrices: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, tolerance: float) -> None:
    """Orthonormal, `A V = V diag(e)` relative to each matrix's largest element, descending."""
    a, e, v = (t.detach().cpu().double() for t in (matrices, eigenvalues, eigenvectors))
    identity = torch.eye(a.shape[-1], dtype=torch.float64)
    largest = a.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    assert (v.mT @ v - identity).abs().max() <= tolerance
    assert ((a / largest) @ v - v * (e[:, None, :] / largest)).abs().max() <= tolerance
    assert (e.diff(dim=-1) <= 0).all()


def graded(n: int, decades: float, order: str, seed: int) -> np.ndarray:
    """`D A D`, A random and well-conditioned: eigenvalues over about that many decades, each well determined."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(n, 4 * n))
    scale = np.logspace(0, -decades / 2, n)
    if order == "ascending":
        scale = scale[::-1]
    elif order == "shuffled":
        scale = generator.permutation(scale)
    matrix = (rows @ rows.T / (4 * n)) * scale[:, None] * scale[None, :]
    return np.tril(matrix) + np.tril(matrix, -1).T


def true_eigenvalues(matrix: np.ndarray) -> np.ndarray:
    """Descending, computed with 50 digits."""
    with mpmath.workdps(50):
        exact = mpmath.eigsy(mpmath.matrix(matrix.tolist()), eigvals_only=True)
        return np.array(sorted((float(value) for value in exact), reverse=True))


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]


@needs_native
def test_build_info_names_this_pytorch() -> None:
    info = native.build_info()
    assert torch.__version__.startswith(str(info["torch"]).split("+")[0])
    assert info["compiler"]
    assert bool(info["cuda"]) == bool(info["architectures"])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_size(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for n in range(1, native.MAX_N + 1):
        rows = torch.randn(2, n, n, dtype=dtype, generator=generator)
        matrices = torch.stack([rows[0] + rows[0].T, rows[1] @ rows[1].T]).to(device)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-4
        assert_decomposes(matrices, *solve(matrices), tolerance)


@needs_native
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [2, 3, 7, 16, 24])
def test_graded_eigenvalues_are_relatively_accurate(device: str, n: int, order: str) -> None:
    matrix = graded(n, 12, order, seed=n)
    truth = true_eigenvalues(matrix)
    assert truth[0] / truth[-1] > 1e11
    matrices = torch.from_numpy(matrix)[None].to(device)
    eigenvalues, eigenvectors = solve(matrices)
    assert_decomposes(matrices, eigenvalues, eigenvectors, 1e-12)
    np.testing.assert_allclose(eigenvalues[0].cpu().numpy(), truth, rtol=1e-10)


@needs_native
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", [(8, 8), (7, 11), (8, 16)])
def test_large_graded_matrices(device: str, sizes: tuple[int, int], order: str) -> None:
    # The eigenvalues of a Kronecker product are the products of the factors' eigenvalues.
    factors = [graded(n, 6, order, seed) for seed, n in enumerate(sizes)]
    truth = np.sort(np.kron(true_eigenvalues(factors[0]), true_eigenvalues(factors[1])))[::-1]
    assert truth[0] / truth[-1] > 1e11
    eigenvalues, _ = solve(torch.from_numpy(np.kron(*factors))[None].to(device))
    np.testing.assert_allclose(eigenvalues[0].cpu().numpy(), truth, rtol=1e-10)


@needs_native
def test_graded_float32_beats_lapack(device: str) -> None:
    matrix = graded(16, 8, "shuffled", seed=3).astype(np.float32)
    truth = true_eigenvalues(matrix.astype(np.float64))
    eigenvalues, _ = solve(torch.from_numpy(matrix)[None].to(device))
    np.testing.assert_allclose(eigenvalues[0].cpu().numpy(), truth, rtol=1e-5)
    lapack = torch.linalg.eigvalsh(torch.from_numpy(matrix)).flip(0).numpy()
    assert np.max(np.abs(lapack - truth) / truth) > 1e-5  # or this test shows nothing


@needs_native
@pytest.mark.parametrize("n", [2, 5, 32, 77, 128])
def test_repeated_and_zero_eigenvalues(device: str, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    q = orthogonal(n, generator)
    spectra = [
        torch.zeros(n, dtype=torch.float64),
        torch.full((n,), 3.0, dtype=torch.float64),
        (torch.arange(n) < n // 2).double(),  # a projector
        torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64).repeat_interleave(n // 4 + 1)[:n],
        torch.tensor([2.0, -2.0], dtype=torch.float64).repeat(n // 2 + 1)[:n].sort(descending=True)[0],
        torch.cat([torch.full((1,), 1e6, dtype=torch.float64), torch.zeros(n - 1, dtype=torch.float64)]),
    ]
    matrices = torch.stack([(q * spectrum) @ q.T for spectrum in spectra]).to(device)
    eigenvalues, eigenvectors = solve(matrices)
    assert_decomposes(matrices.tril() + matrices.tril(-1).mT, eigenvalues, eigenvectors, 1e-12)
    for found, spectrum in zip(eigenvalues.cpu(), spectra, strict=True):
        torch.testing.assert_close(found, spectrum, rtol=0, atol=1e-12 * max(1.0, float(spectrum.abs().max())))


@needs_native
def test_degenerate_structure(device: str) -> None:
    n = 33
    ones = torch.ones(n, n, dtype=torch.float64)
    flipped = torch.eye(n, dtype=torch.float64).flip(0)  # zero diagonal, angles of 45 degrees
    line = torch.arange(n - 1.0, dtype=torch.float64).diag(1)
    matrices = torch.stack([ones, ones - torch.eye(n), flipped, line + line.T, -ones]).to(device)
    assert_decomposes(matrices, *solve(matrices), 1e-12)


@needs_native
@pytest.mark.parametrize("scale", [1e-290, 1e-150, 1e150, 1e300])
def test_extreme_scales(device: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q = orthogonal(20, generator)
    spectrum = torch.linspace(2, 1, 20, dtype=torch.float64)
    eigenvalues, _ = solve((((q * spectrum) @ q.T) * scale)[None].to(device))
    torch.testing.assert_close(eigenvalues[0].cpu() / scale, spectrum, rtol=1e-13, atol=0)


@needs_native
def test_batch_results_do_not_depend_on_each_other(device: str) -> None:
    rows = torch.randn(300, 9, 9, generator=torch.Generator().manual_seed(1))
    matrices = (rows + rows.mT).to(device)
    eigenvalues, eigenvectors = solve(matrices)
    for i in (0, 150, 299):
        alone = solve(matrices[i : i + 1])
        assert torch.equal(alone[0][0], eigenvalues[i])
        assert torch.equal(alone[1][0], eigenvectors[i])


@needs_native
def test_reads_the_lower_triangle_of_any_layout(device: str) -> None:
    rows = torch.randn(3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    symmetric = (rows + rows.mT).to(device)
    expected = solve(symmetric)
    upper_ignored = symmetric.tril() + torch.full_like(symmetric, torch.nan).triu(1)
    assert torch.equal(solve(upper_ignored)[0], expected[0])
    strided = torch.zeros(3, 6, 12, dtype=torch.float64, device=device)[:, :, ::2].copy_(symmetric)
    assert not strided.is_contiguous()
    assert torch.equal(solve(strided)[1], expected[1])
    repeated = symmetric[:1].expand(4, 6, 6)
    assert torch.equal(solve(repeated)[0], expected[0][:1].expand(4, 6))


@needs_native
@pytest.mark.parametrize("shape", [(0, 5, 5), (3, 0, 0), (0, 0, 0)])
def test_empty(device: str, shape: tuple[int, int, int]) -> None:
    eigenvalues, eigenvectors = solve(torch.empty(shape, device=device))
    assert eigenvalues.shape == shape[:2]
    assert eigenvectors.shape == shape


@needs_native
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(4, 0), (2, 2)])
def test_not_finite_names_the_matrix(device: str, bad: float, place: tuple[int, int]) -> None:
    matrices = torch.eye(5, device=device).repeat(7, 1, 1)
    matrices[3][place] = bad
    with pytest.raises(ValueError, match="NaN or infinity in matrix 3 of 7"):
        solve(matrices)
    eigenvalues, eigenvectors = solve(matrices, check_errors=False)
    assert eigenvalues[3].isnan().all()
    assert eigenvectors[3].isnan().all()
    assert (eigenvalues[[0, 1, 2, 4, 5, 6]] == 1).all()


@needs_native
def test_argument_errors() -> None:
    good = torch.eye(4)[None]
    values, vectors = torch.empty(1, 4), torch.empty(1, 4, 4)
    with pytest.raises(ValueError, match=r"\[L, n, n\], got \[4, 4\]"):
        native.small_eigh(values, vectors, good[0])
    with pytest.raises(ValueError, match=r"\[L, n, n\], got \[1, 4, 3\]"):
        native.small_eigh(values, vectors, good[:, :, :3])
    with pytest.raises(ValueError, match=r"n <= 128, got .*\[1, 129, 129\]"):
        solve(torch.zeros(1, 129, 129))
    with pytest.raises(TypeError, match="float32 or float64, got Half"):
        solve(good.half())
    with pytest.raises(ValueError, match="contiguous eigenvectors"):
        native.small_eigh(values, vectors.mT, good)
    with pytest.raises(ValueError, match=r"eigenvalues of shape \[1, 4\]"):
        native.small_eigh(values[:, :3], vectors, good)
    with pytest.raises(TypeError, match="eigenvectors of dtype Float"):
        native.small_eigh(values, vectors.double(), good)
    with pytest.raises(RuntimeError, match="single memory location"):
        native.small_eigh(values, good, good)


def test_refusals() -> None:
    values, vectors = torch.empty(1, 129), torch.empty(1, 129, 129)
    assert "n = 129" in str(native.refuses_small_eigh(values, vectors, vectors))
    assert native.refuses_small_eigh(values[:, :4], vectors[:, :4, :4], vectors[:, :4, :4]) is None
    assert "meta" in str(native.refuses_small_eigh(values, vectors, torch.empty(1, 4, 4, device="meta")))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"reason": "no C++ compiler"}, "was not built: no C++ compiler"),
        ({"torch": "1.0.0"}, "was built for PyTorch 1.0.0, and this is"),
        (None, "was not built; to build it"),
    ],
)
def test_says_why_it_is_unavailable(
    record: dict[str, str] | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ops").mkdir()
    if record is not None:
        (tmp_path / "_native_build.json").write_text(json.dumps(record))
    monkeypatch.setattr(native, "__file__", str(tmp_path / "ops" / "native.py"))
    native._load.cache_clear()
    try:
        assert expected in str(native.why_unavailable())
        with pytest.raises(RuntimeError, match="native extension"):
            native.build_info()
        with pytest.raises(RuntimeError, match="small_eigh: the native extension"):
            solve(torch.eye(2)[None])
    finally:
        monkeypatch.undo()
        native._load.cache_clear()


def test_a_build_that_lacks_an_operator_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.why_unavailable() is not None:
        pytest.skip(str(native.why_unavailable()))
    monkeypatch.setattr(native, "_OPERATORS", ("small_eigh", "of_next_year"))
    native._load.cache_clear()
    try:
        assert "older than this package and lacks of_next_year" in str(native.why_unavailable())
    finally:
        monkeypatch.undo()
        native._load.cache_clear()


def test_importing_the_package_does_not_load_it() -> None:
    code = "import sys, bayesian_lora_kernels.ops.native; sys.exit('bayesian_lora_kernels._native' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
