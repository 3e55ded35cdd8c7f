"""`incremental_svd`: invariants over a battery of streams, against the best possible rank-k error in float64."""

from __future__ import annotations

import pytest
import torch

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.curvature.factor_sums import stream_columns
from bayesian_lora_kernels.ops.incremental_svd.sparse_signs import choose_rows, draw_numbers

WIDTH, KEPT = 192, 8
COLUMNS = 2 * KEPT + 10
NATIVE = ops.backends()["native"]
IMPLS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not NATIVE["available"], reason=str(NATIVE["reason"]))),
]
SPECTRA = {
    "flat": lambda i: torch.ones_like(i),
    "1/i": lambda i: 1 / i,
    "1/i^2": lambda i: 1 / i**2,
    "low rank": lambda i: (i <= KEPT - 2).double(),
    "massive": lambda i: 1 / i,
    "drift": lambda i: 1 / i,
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Many small products: threads only get in each other's way, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stream(kind, rows, batches, dtype=torch.float32, width=WIDTH, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rotation():
        return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q

    spectrum = SPECTRA[kind](torch.arange(1, width + 1).double())
    directions, result = rotation(), []
    for batch in range(batches):
        if kind == "drift" and batch in (batches // 3, 2 * batches // 3):
            directions = rotation()
        x = torch.randn(rows, width, generator=generator, dtype=torch.float64) * spectrum.sqrt() @ directions.T
        if kind == "massive":  # one token in 256 far along one direction: 1e6 times the k-th eigenvalue
            tokens = torch.randint(rows, (max(1, rows // 256),), generator=generator)
            x[tokens] += (1e6 * spectrum[KEPT - 1] * rows / len(tokens)).sqrt() * directions[:, 5]
        result.append(x.to(dtype))
    return result


def sum_of(xs):
    return sum(x.double().T @ x.double() for x in xs)


def best_error(a, kept=KEPT):
    return torch.linalg.eigvalsh(a)[:-kept].norm()


def rank_error(basis, a, kept=KEPT):
    leading = basis[:, :kept].double()
    return (a - leading @ leading.T).norm()


def run(xs, columns=COLUMNS, seed=0, **options):
    generator, basis = torch.Generator().manual_seed(seed), None
    for x in xs:
        basis = ops.incremental_svd(basis, x, columns=columns, generator=generator, **options)
    return basis


def exact_svd_keeping(xs, kept=KEPT):
    basis = xs[0].double().new_zeros(xs[0].shape[1], 0)
    for x in xs:
        u, s, _ = torch.linalg.svd(torch.cat([basis, x.double().T], dim=1), full_matrices=False)
        basis = u[:, :kept] * s[:kept]
    return basis


def assert_orthogonal_and_descending(basis):
    norms = basis.double().norm(dim=0)
    assert (norms[:-1] >= norms[1:] * (1 - 1e-5)).all()
    kept = norms > 0
    assert kept.tolist() == sorted(kept.tolist(), reverse=True)  # zero columns come last
    unit = basis.double()[:, kept] / norms[kept]
    assert ((unit.T @ unit - torch.eye(int(kept.sum())).double()).abs() < 1e-5).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["flat", "1/i", "1/i^2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_stationary_streams_are_within_a_hundredth_of_the_best_and_no_worse_than_exact_updates(kind, dtype, impl):
    xs = stream(kind, rows=384, batches=16, dtype=dtype)
    a = sum_of(xs)
    basis = run(xs, impl=impl)
    error, exact, best = rank_error(basis, a), rank_error(exact_svd_keeping(xs), a), best_error(a)
    assert basis.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error <= 1.01 * best
    assert error <= exact
    assert_orthogonal_and_descending(basis)


@pytest.mark.parametrize(("kind", "bound"), [("flat", 1.025), ("1/i", 1.005), ("massive", 1.03), ("drift", 1.05)])
def test_a_fit_of_rank_32_streams_64_columns(kind, bound):
    columns = [stream_columns(LaplaceConfig(rank=rank, rank_threshold=8), 300) for rank in (10, 26, 27, 32, 33, 60)]
    assert columns == [30, 62, 64, 64, 76, 128]
    assert [stream_columns(LaplaceConfig(rank=32, rank_threshold=8), width) for width in (64, 65)] == [None, 64]
    xs = stream(kind, rows=384, batches=12)
    a = sum_of(xs)
    assert rank_error(run(xs, columns=64), a, 32) <= bound * best_error(a, 32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [12, 384])
def test_massive_activations(dtype, rows, impl):
    xs = stream("massive", rows, batches=16, dtype=dtype)
    a = sum_of(xs)
    eigenvalues = torch.linalg.eigvalsh(a).flip(0)
    assert eigenvalues[0] > 7e5 * eigenvalues[KEPT - 1]
    basis = run(xs, impl=impl)
    assert rank_error(basis, a) <= 1.02 * best_error(a)  # required: 1.1
    assert_orthogonal_and_descending(basis[:, :KEPT])


def test_massive_activations_do_not_add_up_over_a_long_stream():
    xs = stream("massive", rows=512, batches=40, width=96)
    a = sum_of(xs)
    assert rank_error(run(xs), a) <= 1.05 * best_error(a)


@pytest.mark.parametrize("rows", [COLUMNS - 2, 384])
def test_leading_subspace_that_changes_twice(rows):
    xs = stream("drift", rows, batches=18)
    a = sum_of(xs)
    error = rank_error(run(xs), a)
    assert error <= 1.05 * best_error(a)
    assert error <= rank_error(exact_svd_keeping(xs), a)


@pytest.mark.parametrize("kind", ["flat", "1/i", "1/i^2"])
@pytest.mark.parametrize("rows", [1, 5, COLUMNS])
def test_batches_smaller_than_the_sketch_lose_no_quality(kind, rows):
    xs = stream(kind, rows, batches=120 if rows == 1 else 60 if rows == 5 else 16)
    a = sum_of(xs)
    error = rank_error(run(xs), a)
    assert error <= (1.03 if kind == "flat" else 1.01) * best_error(a)
    assert error <= rank_error(exact_svd_keeping(xs), a)


@pytest.mark.parametrize("rows", [4, 384])
def test_exactly_low_rank_gives_zero_columns(rows):
    xs = stream("low rank", rows, batches=12)
    a = sum_of(xs)
    basis = run(xs)
    assert basis.shape == (WIDTH, COLUMNS)
    assert (basis[:, : KEPT - 2].norm(dim=0) > 0).all()
    assert (basis[:, KEPT - 2 :] == 0).all()
    assert rank_error(basis, a, COLUMNS) <= 1e-6 * a.norm()


def test_one_batch_is_close_to_its_own_svd():
    (x,) = stream("1/i", rows=384, batches=1)
    a = sum_of([x])
    assert rank_error(run([x]), a) <= 1.01 * best_error(a)


@pytest.mark.parametrize("rows", [9, 384])
def test_batches_of_zeros_take_nothing_away(rows):
    xs = stream("1/i", 384, 4)
    basis, zeros = run(xs), torch.zeros(rows, WIDTH)
    after = run([zeros, *xs, zeros, zeros])
    a = sum_of(xs)
    # Not exactly: a first batch of zeros costs the second one its step of subspace iteration.
    assert abs(rank_error(after, a) - rank_error(basis, a)) <= 0.005 * best_error(a)
    again = ops.incremental_svd(basis, zeros)
    assert (again @ again.T - basis @ basis.T).norm() <= 1e-5 * (basis @ basis.T).norm()
    assert (ops.incremental_svd(None, zeros, columns=COLUMNS) == 0).all()
    for x in xs:
        x[:, : WIDTH // 2] = 0  # directions that are nowhere near those of the data
    basis = run(xs)
    again = ops.incremental_svd(basis, zeros)
    assert (again @ again.T - basis @ basis.T).norm() <= 1e-5 * (basis @ basis.T).norm()


def test_a_free_column_is_filled_by_the_next_batch():
    few, many = stream("1/i", 3, 1)[0], stream("1/i", 384, 1)[0]
    basis, a = run([few, many]), sum_of([few, many])
    assert (basis.norm(dim=0) > 0).all()
    assert rank_error(basis, a) <= 1.06 * best_error(a)


@pytest.mark.parametrize("rows", [20, 200])
def test_masked_rows_may_hold_anything(rows):
    (x,) = stream("1/i", rows, 1)
    mask = torch.arange(rows) % 4 != 1
    first = run([x], mask=mask)
    second = ops.incremental_svd(first, x, mask=mask, generator=torch.Generator().manual_seed(1))
    x[~mask] = float("nan")
    x[1] = float("inf")
    assert torch.equal(run([x], mask=mask), first)
    again = ops.incremental_svd(first, x, mask=mask, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, second)
    a = sum_of([x[mask]])
    assert rank_error(first, a) <= 1.01 * best_error(a)
    assert (ops.incremental_svd(None, x, columns=COLUMNS, mask=mask & False) == 0).all()


def test_seeds_reproduce_and_differ():
    xs = stream("1/i", 200, 2)
    assert torch.equal(run(xs, seed=3), run(xs, seed=3))
    assert not torch.equal(run(xs, seed=3), run(xs, seed=4))
    torch.manual_seed(5)
    first = ops.incremental_svd(None, xs[0], columns=COLUMNS)
    torch.manual_seed(5)
    assert torch.equal(ops.incremental_svd(None, xs[0], columns=COLUMNS), first)


@pytest.mark.parametrize(
    ("rows", "width", "columns"),
    [(0, 7, 3), (1, 7, 3), (50, 7, 3), (50, 7, 7), (50, 7, 12), (5, 7, 12), (40, 1, 2), (3, 0, 2)],
)
def test_any_shape_in_every_layout(rows, width, columns):
    for x in (
        torch.randn(rows, width),
        torch.randn(width, rows).T,
        torch.randn(2 * rows, 3 * width)[::2, ::3],
        torch.randn(1, width).expand(rows, width),
        torch.randn(rows, width).half(),
    ):
        basis = run([x, x], columns=columns)
        assert basis.shape == (width, columns)
        assert_orthogonal_and_descending(basis)
        if columns >= width:  # nothing is cut off
            truth = 2 * sum_of([x])
            assert (basis.double() @ basis.double().T - truth).norm() <= 1e-5 * (1 + truth.norm())


def test_columns_may_change_between_batches():
    xs = stream("1/i", 200, 3)
    wide = run(xs[:2])
    narrow = ops.incremental_svd(wide, xs[2], columns=KEPT)
    wider = ops.incremental_svd(wide, xs[2], columns=COLUMNS + 9)
    assert narrow.shape == (WIDTH, KEPT)
    assert wider.shape == (WIDTH, COLUMNS + 9)
    a = sum_of(xs)
    assert rank_error(wider, a) <= 1.02 * best_error(a)


def test_two_estimates_merge():
    xs = stream("1/i", 384, 8)
    merged = ops.incremental_svd(run(xs[:4]), run(xs[4:], seed=1).T)
    a = sum_of(xs)
    assert rank_error(merged, a) <= 1.01 * best_error(a)


def test_grouped_streams_of_any_width():
    streams = [stream("1/i", rows, 6, width=width) for rows, width in ((300, 64), (7, 40), (120, 96))]
    columns, bases = [26, 20, 22], [None, None, None]
    generator = torch.Generator().manual_seed(0)
    masks = [None, torch.arange(7) != 2, None]
    for xs in zip(*streams, strict=True):
        bases = ops.grouped_incremental_svd(bases, list(xs), columns=columns, masks=masks, generator=generator)
    for basis, xs, mask, width in zip(bases, streams, masks, columns, strict=True):
        assert basis.shape[1] == width
        a = sum_of([x if mask is None else x[mask] for x in xs])
        assert rank_error(basis, a, 6) <= 1.01 * best_error(a, 6)
    unchanged = ops.grouped_incremental_svd(bases, [xs[0][:0] for xs in streams])
    assert [basis.shape for basis in unchanged] == [basis.shape for basis in bases]
    assert ops.grouped_incremental_svd([], []) == []


def test_rows_are_drawn_among_the_counted_ones_evenly():
    mask = torch.rand(50) < 0.4
    rows, signs = choose_rows(draw_numbers(400, torch.device("cpu"), None), 50, mask)
    assert mask[rows].all()
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    counts = torch.bincount(rows.flatten(), minlength=50)[mask].double()
    assert (counts / counts.mean() - 1).abs().max() < 0.4
    _, signs = choose_rows(draw_numbers(4, torch.device("cpu"), None), 50, torch.zeros(50, dtype=torch.bool))
    assert (signs == 0).all()


X = torch.randn(6, 4)
BAD = [
    (dict(basis=None), ValueError, r"incremental_svd: expected columns \(an int\) with the first batch"),
    (dict(basis=None, columns=0), ValueError, r"expected columns of at least 1, got 0"),
    (dict(basis=X, fresh=-1), ValueError, r"expected fresh of at least 0, got -1"),
    (dict(basis=X), ValueError, r"basis: expected shape \[4, l\], got float32\[6, 4\]"),
    (dict(basis=X.T.double()), TypeError, r"basis: expected dtype float32, got float64\[4, 6\]"),
    (dict(basis=X.T.to("meta")), ValueError, r"basis: expected a tensor on cpu, got float32\[4, 6\] on meta"),
    (dict(basis=X.T, mask=torch.ones(5) > 0), ValueError, r"mask: expected shape \[6\], got bool\[5\]"),
    (dict(basis=X.T, x=X[0]), ValueError, r"x: expected shape \[M, d\], got float32\[4\]"),
    (dict(basis=X.T, x=X.int()), TypeError, r"x: expected dtype float16, bfloat16, float32, float64, got int32"),
    (dict(basis=X.T, x=X * float("nan")), ValueError, r"expected finite counted rows and basis, got NaN or infinity"),
    (dict(basis=X.T[:, :2], x=X * float("inf")), ValueError, r"expected finite counted rows and basis"),
    (dict(basis=X.T, impl="fast"), ValueError, r"expected impl to be one of"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.incremental_svd(**{"x": X, **arguments})


def test_bad_grouped_arguments_are_named():
    with pytest.raises(ValueError, match=r"grouped_incremental_svd: bases: expected 2 entries, got 1"):
        ops.grouped_incremental_svd([None], [X, X], columns=2)
    with pytest.raises(ValueError, match=r"grouped_incremental_svd: entry 1: expected columns"):
        ops.grouped_incremental_svd([X.T, None], [X, X])
    with pytest.raises(ValueError, match=r"entry 1: basis: expected shape \[4, l\]"):
        ops.grouped_incremental_svd([X.T, X], [X, X])
