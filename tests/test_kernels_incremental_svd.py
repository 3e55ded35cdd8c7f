"""The Triton kernels of `incremental_svd`, in the interpreter or on a GPU: invariants, and the reference."""

from __future__ import annotations

import itertools
import os
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bayesian_lora_kernels import ops

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.gpu if ON_GPU else pytest.mark.interpret
# Arithmetic in bfloat16 is wrong in the interpreter.
DTYPES = (torch.float16, torch.float32, torch.bfloat16) if ON_GPU else (torch.float16, torch.float32)
triton = pytest.importorskip("triton")

KEPT, COLUMNS, WIDTH = 3, 14, 48


def stream(kind, rows, batches, width=WIDTH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    i = torch.arange(1, width + 1).double()
    spectrum = torch.ones_like(i) if kind == "flat" else (i <= 2).double() if kind == "low rank" else 1 / i
    directions = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    xs = []
    for _ in range(batches):
        x = torch.randn(rows, width, generator=generator, dtype=torch.float64) * spectrum.sqrt() @ directions.T
        if kind == "massive":  # one row far along one direction: 1e6 times the k-th eigenvalue
            x[3] += (1e6 * spectrum[KEPT - 1] * rows).sqrt() * directions[:, 5]
        xs.append(x.to(dtype).to(DEVICE))
    return xs


def run(xs, impl="triton", columns=COLUMNS, basis=None, **options):
    generator = torch.Generator().manual_seed(0)
    for x in xs:
        basis = ops.incremental_svd(basis, x, columns=columns, generator=generator, impl=impl, fresh=6, **options)
    return basis


def ratio_to_best(basis, xs, kept=KEPT):
    """Error of the leading columns over the best possible error of that rank."""
    a = sum(x.double().T @ x.double() for x in xs)
    leading = basis[:, :kept].double()
    return float((a - leading @ leading.T).norm() / torch.linalg.eigvalsh(a)[:-kept].norm())


def assert_orthogonal_and_descending(basis):
    norms = basis.double().norm(dim=0)
    assert (norms[:-1] >= norms[1:] * (1 - 1e-5)).all()
    kept = norms > 0
    assert kept.tolist() == sorted(kept.tolist(), reverse=True)
    unit = basis.double()[:, kept] / norms[kept]
    assert ((unit.T @ unit - torch.eye(int(kept.sum()), device=DEVICE).double()).abs() < 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["flat", "1/i", "massive"])
def test_streams_are_as_good_as_the_reference(kind, dtype):
    if kind == "massive" and dtype == torch.float16:
        dtype = torch.float32  # its sums of rows pass 65504
    xs = stream(kind, 80, 4, dtype=dtype)
    basis = run(xs)
    assert basis.dtype == torch.float32
    assert ratio_to_best(basis, xs) <= max(1.01, 1.002 * ratio_to_best(run(xs, "reference"), xs))
    assert_orthogonal_and_descending(basis)


def test_exactly_low_rank_gives_zero_columns():
    xs = stream("low rank", 40, 2)
    basis = run(xs)
    assert (basis[:, :2].norm(dim=0) > 0).all()
    assert (basis[:, 2:] == 0).all()
    a = sum(x.double().T @ x.double() for x in xs)
    assert (a - basis.double() @ basis.double().T).norm() <= 1e-6 * a.norm()


def test_batches_of_zeros_take_nothing_away():
    xs = stream("1/i", 60, 1)
    zeros = torch.zeros_like(xs[0])
    basis = run(xs)
    again = run([zeros], basis=basis)
    assert (again @ again.T - basis @ basis.T).norm() <= 1e-5 * (basis @ basis.T).norm()
    assert (run([zeros]) == 0).all()


@pytest.mark.parametrize("rows", [10, 70])
def test_masked_rows_may_hold_anything(rows):
    (x,) = stream("1/i", rows, 1)
    mask = torch.arange(rows, device=DEVICE) % 4 != 1
    clean = run([x, x], mask=mask)
    x[~mask] = float("nan")
    assert torch.equal(run([x, x], mask=mask), clean)
    assert ratio_to_best(clean, [x[mask], x[mask]]) <= 1.02
    assert (run([x], mask=mask & False) == 0).all()


@pytest.mark.parametrize(
    ("rows", "width", "columns"), [(0, 7, 3), (1, 7, 3), (40, 7, 3), (40, 7, 12), (5, 7, 12), (30, 1, 2)]
)
def test_any_shape_in_every_layout(rows, width, columns):
    for x in (
        torch.randn(rows, width, device=DEVICE),
        torch.randn(2 * rows, 3 * width, device=DEVICE)[::2, ::3],
        torch.randn(1, width, device=DEVICE).expand(rows, width),
    ):
        basis = run([x, x], columns=columns)
        assert basis.shape == (width, columns)
        assert_orthogonal_and_descending(basis)
        if columns >= width:  # nothing is cut off
            truth = 2 * x.double().T @ x.double()
            assert (basis.double() @ basis.double().T - truth).norm() <= 1e-5 * (1 + truth.norm())


def test_columns_may_change_and_estimates_merge():
    xs = stream("1/i", 60, 2)
    wide = run(xs[:1], columns=20)
    narrow = run(xs[1:], columns=10, basis=wide.T.contiguous().T)
    assert ratio_to_best(narrow, xs) <= 1.02
    merged = ops.incremental_svd(run(xs[:1]), run(xs[1:], columns=18).T, impl="triton")
    assert ratio_to_best(merged, xs) <= 1.02


def test_grouped_streams_are_those_of_single_calls():
    """Widths, heights, dtypes, first and later batches, masks and short batches together."""
    shapes = [(40, 24), (70, 48), (5, 40), (33, 17), (64, 32)]
    dtypes = [torch.float32, torch.float16, torch.float32, torch.float32, torch.float16]
    xs = [torch.randn(shape, device=DEVICE).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    masks = [None, None, torch.arange(5, device=DEVICE) != 2, torch.rand(33, device=DEVICE) < 0.8, None]
    columns, bases = [12, 14, 8, 10, 9], [None] * 5
    for _ in range(2):
        options = dict(columns=columns, masks=masks, fresh=4)
        states = [torch.Generator().manual_seed(4) for _ in range(2)]
        results, expected = (
            ops.grouped_incremental_svd(bases, xs, **options, generator=state, impl=impl)
            for state, impl in zip(states, ("triton", "reference"), strict=True)
        )
        for result, truth in zip(results, expected, strict=True):
            size = (truth @ truth.T).norm()
            assert ((result @ result.T) - (truth @ truth.T)).norm() <= 2e-3 * size
            assert_orthogonal_and_descending(result)
        bases = results


@pytest.mark.parametrize("masked", [False, True])
def test_one_launch_touches_as_two_do(monkeypatch, masked):
    from bayesian_lora_kernels.ops.incremental_svd import kernel, plan

    fused = plan.Configuration(16, 32, 16, 32, 4, 2, fused=True)
    plain = plan.Configuration(16, 32, 16, 32, 4, 2)
    xs = [torch.randn(40, 48, device=DEVICE), torch.randn(20, 24, device=DEVICE), torch.randn(50, 40, device=DEVICE)]
    masks = [torch.rand(x.shape[0], device=DEVICE) < 0.7 if masked else None for x in xs]
    results = []
    for one in (plain, fused):
        monkeypatch.setattr(kernel, "choose_configuration", lambda *arguments, one=one: one)
        state = torch.Generator().manual_seed(0)
        bases = [None] * 3
        options = dict(columns=8, fresh=4, masks=masks, generator=state, impl="triton")
        results.append(ops.grouped_incremental_svd(bases, xs, **options))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_more_than_64_columns():
    """Where small matrices are multiplied in pieces of their columns."""
    x = torch.randn(90, 70, device=DEVICE)
    basis = run([x], columns=70)
    truth = x.double().T @ x.double()
    assert (basis.double() @ basis.double().T - truth).norm() <= 1e-5 * truth.norm()


def test_nan_in_a_counted_row_shows(monkeypatch):
    from bayesian_lora_kernels.ops.incremental_svd import kernel

    # PyTorch's eigensolver does not take NaN.
    monkeypatch.setattr(kernel, "_nystrom_eigh", lambda core, gram: core * gram)
    (x,) = stream("1/i", 80, 1)
    x[7, 3] = float("nan")
    assert run([x]).isnan().all()


class Launches(TorchDispatchMode):
    """Names PyTorch's operations but for those that allocate or look at memory another way."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        # `to` may be a view, or a copy.
        looks = function.is_view and (name != "to" or result.data_ptr() == args[0].data_ptr())
        if function.namespace == "aten" and not looks and not re.search("empty|detach", name):
            self.seen.append(name)
        return result


@pytest.mark.skipif(ON_GPU, reason="kernels are recorded in place of being launched")
@pytest.mark.parametrize(("masked", "first", "most"), [(0, 0, 32), (1, 0, 37), (0, 1, 38), (1, 1, 43)])
def test_launches_do_not_grow_with_the_streams(monkeypatch, masked, first, most):
    from bayesian_lora_kernels.ops.incremental_svd import kernel, op
    from benchmarks.launches import launched

    seen = []

    def counted(function):
        def run(*arguments):
            with Launches(seen):  # that around the operation does not see what is in it
                return function(*arguments)

        return run

    def nystrom_eigh(core, gram):  # one launch of the native extension
        seen.append("nystrom_eigh")
        return torch.zeros_like(core)

    choose, choose_all_rows = op.choose, op.choose_all_rows
    monkeypatch.setattr(op, "choose", lambda *arguments: counted(choose(*arguments)))
    monkeypatch.setattr(op, "choose_all_rows", counted(choose_all_rows))

    def count(streams):
        xs = [torch.randn(40, 32) for _ in range(streams)]
        bases = [None if first else torch.randn(32, 8) for _ in xs]
        masks = [torch.arange(40) % 3 > 0] * streams if masked else None
        seen.clear()

        def call():
            monkeypatch.setattr(kernel, "_nystrom_eigh", nystrom_eigh)
            with Launches(seen):
                ops.grouped_incremental_svd(bases, xs, columns=8, masks=masks, impl="triton")

        return len(launched("sm_90", call)) + len(seen)

    assert count(3) == count(224) <= most


def test_variants_are_what_is_launched(monkeypatch):
    """Two kinds of streams; X fits the cache with its neighbours, and does not."""
    from bayesian_lora_kernels.ops.incremental_svd import kernel
    from benchmarks.launches import launched

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    def arguments(height, width):
        outs, bases = ([empty(width, 64, dtype=torch.float32) for _ in range(3)] for _ in range(2))
        xs = [empty(height, width) for _ in range(3)]
        masks = [None, empty(height, dtype=torch.bool), None]
        drawn = [[empty(64, 16, dtype=dtype)] * 3 for dtype in (torch.int64, torch.float32)]
        return outs, bases, xs, masks, *drawn, 10

    for width, fused in ((128, True), (4096, False)):
        given = arguments(9000, width)
        variants = kernel.variants(*given)
        end = "BD=64 contiguous{} fused" if fused else "BD=128 contiguous{}"
        expected = [f"bfloat16 BL=64 BM=64 {end.format(masked)}" for masked in ("", " masked")]
        assert [str(one) for one in variants] == sorted(expected)
        monkeypatch.setattr(kernel, "choose_configuration", lambda key, candidates, run: candidates[0])
        found = launched("sm_90", lambda given=given: kernel.grouped_incremental_svd(*given))
        touches = {(one.constants["HAS_MASK"], one.function) for one in found if "HAS_MASK" in one.constants}
        functions = ["touch_kernel"] if fused else ["project_kernel", "back_project_kernel"]
        assert touches == set(itertools.product((False, True), functions))


def test_what_it_cannot_take_is_said():
    x = torch.randn(300, 140, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run: it takes up to 128 columns, here are 130"):
        ops.incremental_svd(None, x, columns=130, impl="triton")
