"""The native `nystrom_eigh` against mathematics: the Nystroem estimate, orthogonality, whitening, bad input."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops import native
from bayesian_lora_kernels.ops.dispatch import choose
from bayesian_lora_kernels.ops.incremental_svd import reference

needs_native = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))

EPS32, EPS64 = 2.0**-23, 2.0**-52


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if native.why_unavailable() is None and native.build_info()["cuda"] is None:
            pytest.skip("the native extension was built without CUDA")
    return name


def combine(core: Tensor, gram: Tensor, device: str = "cpu", rounding: float = EPS64, **options: bool) -> Tensor:
    """`native.nystrom_eigh` into a result poisoned with NaN, back on the CPU."""
    combination = torch.full(core.shape, torch.nan, dtype=core.dtype, device=device)
    native.nystrom_eigh(combination, core.to(device), gram.to(device), rounding, **options)
    return combination.cpu()


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(*shape: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(*shape, seed=seed)).Q


def sketch(a: Tensor, omega: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Y, C and K of test columns `omega`."""
    y = a @ omega
    return y, omega.mT @ y, y.mT @ y


def assert_orthogonal_and_descending(basis: Tensor, tolerance: float) -> None:
    norms = basis.norm(dim=-2)
    assert (norms[..., 1:] <= norms[..., :-1] * (1 + tolerance)).all()
    unit = basis / norms.clamp(min=1e-300)[..., None, :]
    identity = torch.diag_embed((norms > 0).double())
    assert (unit.mT @ unit - identity).abs().max() <= tolerance


def assert_close_to(basis: Tensor, truth: Tensor, tolerance: float) -> None:
    """`B B^T` is the truth, relative to its largest eigenvalue."""
    assert torch.linalg.matrix_norm(basis @ basis.mT - truth, 2) <= tolerance * torch.linalg.matrix_norm(truth, 2)


@needs_native
def test_every_size(device: str) -> None:
    for columns in range(1, native.MAX_N + 1):
        rows = random(2, columns + 20, columns + 5, seed=columns)
        a = rows @ rows.mT / columns + 0.1 * torch.eye(columns + 20)
        y, core, gram = sketch(a, orthonormal(2, columns + 20, columns, seed=1000 + columns))
        combination = combine(core, gram, device)
        basis = y @ combination
        assert_orthogonal_and_descending(basis, 1e-11)
        assert (combination.mT @ core @ combination - torch.eye(columns)).abs().max() <= 1e-11
        for i in range(2):
            assert_close_to(basis[i], y[i] @ torch.linalg.solve(core[i], y[i].T), 1e-11)


@needs_native
@pytest.mark.parametrize("columns", [5, 30, 74, 128])
def test_exact_on_a_matrix_whose_rank_the_sketch_reaches(device: str, columns: int) -> None:
    """C has rank `columns - 3`; the Nystroem estimate is the matrix itself, and three columns are zero."""
    rank, width = columns - 3, columns + 30
    spectrum = torch.zeros(width, dtype=torch.float64)
    spectrum[:rank] = torch.linspace(3, 1, rank)
    vectors = orthonormal(width, width, seed=columns)
    a = (vectors * spectrum) @ vectors.T
    y, core, gram = sketch(a, orthonormal(width, columns, seed=1))
    combination = combine(core[None], gram[None], device, rounding=1e-10)[0]
    assert (combination[:, rank:] == 0).all()
    assert_orthogonal_and_descending(y @ combination, 1e-9)
    assert_close_to(y @ combination, a, 1e-9)


@needs_native
@pytest.mark.parametrize("size", [1e6, 1e12])
@pytest.mark.parametrize("columns", [8, 30, 74])
def test_massive_activations_do_not_hide_the_other_directions(device: str, columns: int, size: float) -> None:
    """An eigenvalue of `size` among others near 1, and test columns close to eigenvectors, as a stream has them: only
    the first one meets the massive direction, but for 1e-7.
    """
    spectrum = torch.linspace(2, 1, columns, dtype=torch.float64)
    spectrum[0] = size
    noise = 0.1 * random(columns, columns, seed=2) / columns**0.5
    noise[0, 1:], noise[1:, 0] = 0, 1e-7
    omega = torch.linalg.qr(torch.eye(columns) + noise).Q
    vectors = orthonormal(columns + 10, columns, seed=columns)
    y, core = vectors @ (spectrum[:, None] * omega), omega.T @ (spectrum[:, None] * omega)
    gram = y.T @ y
    eigenvalues = torch.linalg.eigvalsh(core)
    assert size < 1e7 or eigenvalues[0] < EPS32 * eigenvalues[-1]  # unscaled, the cut-off would drop them
    basis = y @ combine(core[None], gram[None], device, rounding=EPS32)[0]
    tolerance = 1e-14 * size + 1e-9
    torch.testing.assert_close(basis.norm(dim=0) ** 2, spectrum, rtol=tolerance, atol=0)
    others = vectors[:, 1:]
    assert (others.T @ basis @ basis.T @ others - spectrum[1:].diag()).abs().max() <= tolerance


@needs_native
def test_the_cut_off_is_relative_to_directions(device: str) -> None:
    """Of two eigenvalues of a core with unit diagonal, 2 - x and x, the second counts above `rounding` (2 - x)."""
    for small, kept in ((4.1e-6, 2), (1.9e-6, 1)):
        core = torch.tensor([[1.0, 1.0 - small], [1.0 - small, 1.0]], dtype=torch.float64)
        scale = torch.tensor([1e-3, 1e5], dtype=torch.float64).diag()
        combination = combine((scale @ core @ scale)[None], torch.eye(2).double()[None], device, rounding=1e-6)[0]
        assert int((combination.norm(dim=0) > 0).sum()) == kept


@needs_native
def test_zero_and_empty_columns(device: str) -> None:
    zeros = torch.zeros(3, 30, 30, dtype=torch.float64)
    assert (combine(zeros, zeros, device) == 0).all()
    # test columns that nothing fills, as where streams of different widths share one launch
    rows = random(40, 25, seed=0)
    y, core, gram = sketch(rows @ rows.T, orthonormal(40, 12, seed=1))
    wide_core, wide_gram = zeros[0].clone(), zeros[0].clone()
    filled = torch.arange(12) * 2
    wide_core[filled[:, None], filled], wide_gram[filled[:, None], filled] = core, gram
    combination = combine(wide_core[None], wide_gram[None], device)[0]
    assert (combination[:, 12:] == 0).all()
    assert (combination[1::2] == 0).all()
    assert_close_to(y @ combination[filled, :12], y @ torch.linalg.solve(core, y.T), 1e-12)


@needs_native
@pytest.mark.parametrize("columns", [1, 14, 30, 128])
def test_the_reference_agrees(device: str, columns: int) -> None:
    rows = random(3, columns + 9, columns + 9, seed=columns)
    y, core, gram = sketch(rows @ rows.mT, orthonormal(3, columns + 9, columns, seed=1))
    found, truth = combine(core, gram, device, EPS32), reference.nystrom_eigh(core, gram, EPS32)
    for i in range(3):
        estimate = (y @ truth)[i] @ (y @ truth)[i].T
        assert_close_to((y @ found)[i], estimate, 1e-12 * columns)
        torch.testing.assert_close((y @ found)[i].norm(dim=0), (y @ truth)[i].norm(dim=0), rtol=1e-9, atol=0)


@needs_native
def test_entries_do_not_depend_on_each_other_or_on_the_layout(device: str) -> None:
    rows = random(50, 20, 20, seed=0)
    _, core, gram = sketch(rows @ rows.mT, orthonormal(50, 20, 9, seed=1))
    core, gram = core.tril() + core.tril(-1).mT, gram.tril() + gram.tril(-1).mT
    together = combine(core, gram, device)
    for i in (0, 31, 49):
        assert torch.equal(combine(core[i : i + 1], gram[i : i + 1], device)[0], together[i])
    assert torch.equal(combine(core.tril() + torch.full_like(core, torch.nan).triu(1), gram, device), together)
    strided = torch.zeros(50, 9, 18, dtype=torch.float64)[:, :, ::2].copy_(core)
    assert torch.equal(combine(strided, gram.mT, device), together)
    assert torch.equal(combine(core[:1].expand(4, 9, 9), gram[:1].expand(4, 9, 9), device)[3], together[0])


@needs_native
@pytest.mark.parametrize("shape", [(0, 30, 30), (3, 0, 0), (0, 0, 0)])
def test_empty(device: str, shape: tuple[int, int, int]) -> None:
    assert combine(torch.empty(shape).double(), torch.empty(shape).double(), device).shape == shape


@needs_native
@pytest.mark.parametrize("columns", [1, 6, 40])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["core's diagonal", "core", "gram's diagonal", "gram"])
def test_not_finite_names_the_entry(device: str, where: str, bad: float, columns: int) -> None:
    core, gram = (torch.eye(columns, dtype=torch.float64).repeat(5, 1, 1) for _ in range(2))
    place = (columns // 2,) * 2 if "diagonal" in where else (columns - 1, 0)
    (core if "core" in where else gram)[(3, *place)] = bad
    with pytest.raises(
        ValueError, match="nystrom_eigh: expected finite matrices, got NaN or infinity in matrix 3 of 5"
    ):
        combine(core, gram, device)
    combination = combine(core, gram, device, check_errors=False)
    assert combination[3].isnan().all()
    assert (combination[[0, 1, 2, 4]].abs().sum(-1) == 1).all()


@needs_native
def test_overflow_is_reported(device: str) -> None:
    identity = torch.eye(4, dtype=torch.float64)[None]
    with pytest.raises(ValueError, match="matrix 0 of 1"):
        combine(identity * 1e-200, identity * 1e200, device)


@needs_native
def test_argument_errors() -> None:
    good = torch.eye(4, dtype=torch.float64)[None]
    out = torch.empty_like(good)
    with pytest.raises(ValueError, match=r"nystrom_eigh: expected core of shape \[L, n, n\], got \[4, 4\]"):
        native.nystrom_eigh(out, good[0], good, EPS32)
    with pytest.raises(ValueError, match=r"core of shape \[L, n, n\], got \[1, 4, 3\]"):
        native.nystrom_eigh(out, good[:, :, :3], good, EPS32)
    with pytest.raises(ValueError, match=r"n <= 128, got core of shape \[1, 129, 129\]"):
        combine(torch.zeros(1, 129, 129).double(), torch.zeros(1, 129, 129).double())
    with pytest.raises(TypeError, match="core of dtype float64, got Float"):
        native.nystrom_eigh(out, good.float(), good, EPS32)
    with pytest.raises(TypeError, match="gram of dtype Double like the core, got Float"):
        native.nystrom_eigh(out, good, good.float(), EPS32)
    with pytest.raises(ValueError, match=r"gram of shape \[1, 4, 4\], got shape \[2, 4, 4\]"):
        native.nystrom_eigh(out, good, good.repeat(2, 1, 1), EPS32)
    with pytest.raises(ValueError, match="contiguous combination"):
        native.nystrom_eigh(torch.empty(1, 4, 8).double()[:, :, ::2], good, good, EPS32)
    with pytest.raises(TypeError, match="combination of dtype Double like the core, got Float"):
        native.nystrom_eigh(out.float(), good, good, EPS32)
    for rounding in (-1e-9, 1.0, torch.nan):
        with pytest.raises(ValueError, match=r"rounding in \[0, 1\)"):
            native.nystrom_eigh(out, good, good, rounding)
    other = good.clone()
    for core, gram in ((other, good), (good, other)):
        with pytest.raises(RuntimeError, match="single memory location"):
            native.nystrom_eigh(other, core, gram, EPS32)


@needs_native
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_of_different_devices_are_refused() -> None:
    good = torch.eye(4, dtype=torch.float64)[None]
    for place in range(3):
        arguments = [good.cuda() if i == place else good.clone() for i in range(3)]
        with pytest.raises(ValueError, match=r"on .* like the core, got"):
            native.nystrom_eigh(*arguments, EPS32)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_team_of_threads_computes_what_one_does(tmp_path: Path) -> None:
    """The order of barriers that a CUDA block relies on, without a GPU."""
    compiler = ["c++", "-std=c++20", "-O1", "-g", "-ffp-contract=off", "-pthread", f"-o{tmp_path / 'team'}"]
    compiler.append(str(Path(__file__).with_name("native_team.cpp")))
    for sanitizer in (["-fsanitize=thread"], []):
        built = subprocess.run([*compiler, *sanitizer], capture_output=True, text=True)
        if built.returncode == 0:
            done = subprocess.run([tmp_path / "team"], capture_output=True, text=True, timeout=120)
            if "FATAL: ThreadSanitizer" not in done.stderr:  # it cannot start on every kernel
                break
    else:
        pytest.skip(f"the compiler does not take C++20: {built.stderr[-500:]}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == 20


def stream(batches: int, massive: bool, width: int = 60, rows: int = 64) -> list[Tensor]:
    directions = orthonormal(width, width, seed=0)
    xs = []
    for batch in range(batches):
        x = random(rows, width, seed=1 + batch) / torch.arange(1, width + 1).double().sqrt() @ directions.T
        if massive:
            x[3] += (1e6 * rows / 4) ** 0.5 * directions[:, 5]
        xs.append(x)
    return xs


@needs_native
@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_are_those_of_the_reference(dtype: torch.dtype, massive: bool) -> None:
    """Streams of two widths and a short batch through both: the same estimates, close to the best of their rank."""
    long, short = stream(5, massive), stream(5, False, width=20, rows=9)
    results = []
    for impl in ("native", "reference"):
        generator, bases = torch.Generator().manual_seed(0), [None, None, None]
        for x, y in zip(long, short, strict=True):
            xs = [x.to(dtype), x[:, :30].to(dtype), y.to(dtype)]
            options = dict(columns=[18, 14, 12], generator=generator, fresh=6, impl=impl)
            bases = ops.grouped_incremental_svd(bases, xs, **options)
        results.append(bases)
    for found, truth in zip(*results, strict=True):
        assert_close_to(found.double(), truth.double() @ truth.double().T, 1e-4 if dtype == torch.float32 else 1e-10)
    a = sum(x.T @ x for x in long)
    leading = results[0][0][:, :4].double()
    assert (a - leading @ leading.T).norm() <= 1.02 * torch.linalg.eigvalsh(a)[:-4].norm()


@needs_native
def test_auto_takes_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLK_IMPL", raising=False)

    def chosen(columns: list[int], rows: int = 500, threads: int = 1) -> str:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        outs = [torch.empty(300, width) for width in columns]
        xs = [torch.empty(rows, 300)] * len(outs)
        function = choose("grouped_incremental_svd", "auto", outs, outs, xs)
        return function.__module__.rpartition(".")[2]

    assert chosen([20]) == chosen([12] * 8) == chosen([20, 12]) == chosen([30] * 8, threads=2) == "nystrom"
    assert chosen([74]) == chosen([30] * 8) == chosen([20, 74]) == chosen([130]) == "reference"
    assert chosen([20], rows=20) == "reference"  # a short batch goes the direct route


def test_what_it_cannot_take_is_said() -> None:
    if native.why_unavailable() is not None:
        with pytest.raises(RuntimeError, match="impl='native' cannot run: the native extension"):
            ops.incremental_svd(None, torch.randn(40, 8), columns=4, impl="native")
        return
    with pytest.raises(RuntimeError, match=r"impl='native' cannot run: it takes up to 128 columns, here are 130"):
        ops.incremental_svd(None, torch.randn(200, 140), columns=130, impl="native")
    with pytest.raises(ValueError, match="expected finite counted rows and basis"):
        ops.incremental_svd(None, torch.full((40, 8), torch.nan), columns=4, impl="native")
