"""The Triton kernels of `outer_product`, `mirror_lower` and `grouped_outer_product`, in the interpreter or on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from bayesian_lora_kernels import ops

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.gpu if ON_GPU else pytest.mark.interpret
# Arithmetic in bfloat16 is wrong in the interpreter.
DTYPES = (torch.float16, torch.float32, torch.bfloat16) if ON_GPU else (torch.float16, torch.float32)
triton = pytest.importorskip("triton")


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def assert_within_budget(result, x, mask=None, scale=1.0, start=None):
    """At most twice the error of PyTorch from the same inputs, per element, plus rounding.

    That allows for sums added in order, 16 rows at a time, as a matrix instruction does.
    """
    rows = x if mask is None else x[mask]
    truth = scale * (rows.double().T @ rows.double())
    plain = scale * (rows.float().T @ rows.float())
    size = abs(scale) * (rows.double().abs().T @ rows.double().abs())
    if start is not None:
        truth, plain, size = truth + start.double(), plain + start, size + start.double().abs()
    rounding = (4 + len(rows) / 16) * torch.finfo(torch.float32).eps
    budget = 2 * (plain.double() - truth).abs() + rounding * size
    assert ((result.double() - truth).abs() <= budget).all()


def layouts(rows, width, dtype):
    yield randn(rows, width, dtype=dtype)
    yield randn(width, rows, dtype=dtype).T
    yield randn(2 * rows, 3 * width, dtype=dtype)[::2, ::3]
    yield randn(1, width, dtype=dtype).expand(rows, width)
    yield randn(rows, 1, dtype=dtype).expand(rows, width)


def launch(x, mask=None, scale=1.0, out=None, lower=False):
    from bayesian_lora_kernels.ops.outer_product import kernel_launch

    accumulate = out is not None
    if out is None:
        out = torch.full((x.shape[1], x.shape[1]), float("nan"), device=DEVICE)  # nothing may be left unwritten
    kernel_launch.grouped_outer_product([out], [x], [mask], [scale], accumulate, lower)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(33, 17), (1, 9), (0, 5), (21, 1), (7, 0), (70, 64), (40, 256)])
def test_equals_float64_in_every_layout(rows, width, dtype):
    for x in layouts(rows, width, dtype):
        result = launch(x)
        assert torch.equal(result, result.T)
        assert_within_budget(result, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4, 8, 12, 50, 140, 200, 256])
def test_split_over_rows_with_a_mask(monkeypatch, width, dtype):
    from bayesian_lora_kernels.ops.outer_product import kernel_launch

    monkeypatch.setattr(kernel_launch, "_ROWS_PER_SPLIT", 40)
    rows = 4200 // width + 101  # several parts of a step, the last one shorter, and not whole where rows are packed
    x, mask = randn(rows, width, dtype=dtype), torch.rand(rows, device=DEVICE) < 0.7
    before = randn(width, width)
    before = before + before.T
    clean = launch(x, mask, 0.3)
    out = launch(x, mask, 0.3, before.clone())
    assert torch.equal(clean, clean.T)
    assert torch.equal(out, out.T)
    assert_within_budget(clean, x, mask, 0.3)
    assert_within_budget(out, x, mask, 0.3, before)
    x[~mask] = float("nan")
    assert torch.equal(launch(x, mask, 0.3), clean)  # deterministic, and rows that do not count are never read
    assert (launch(x, mask & False) == 0).all()


@pytest.mark.parametrize("width", [20, 140])
def test_accumulates_into_any_layout(width):
    x = randn(30, width)
    for start in (randn(width, width), randn(width, width).T, randn(2 * width, 3 * width)[::2, ::3]):
        out, before = start, start.clone()
        launch(x, scale=-0.5, out=out)
        assert_within_budget(out, x, scale=-0.5, start=before)


@pytest.mark.parametrize("width", [9, 150, 256])
def test_lower_triangle_of_a_stream_and_one_mirror_at_the_end(width):
    xs, out = [randn(40, width), randn(25, width)], torch.zeros(width, width, device=DEVICE)
    whole = torch.zeros(width, width, device=DEVICE)
    for x in xs:
        ops.outer_product(x, out=out, lower=True, impl="triton")
        ops.outer_product(x, out=whole, impl="triton")
    assert (out.triu(1) == 0).all()  # neither read nor written
    assert ops.mirror_lower(out, impl="triton") is out
    assert torch.equal(out, whole)
    assert torch.equal(ops.mirror_lower(whole.tril().T.contiguous().T, impl="triton"), whole)


@pytest.mark.parametrize("tiles", [1, 3, 8, 9, 30])
def test_every_tile_of_the_triangle_comes_once(tiles):
    from bayesian_lora_kernels.ops.outer_product import tiles as mapping

    count = tiles * (tiles + 1) // 2
    found = torch.zeros(count, 2, dtype=torch.int32, device=DEVICE)
    tile_numbers_kernel(mapping)[(count,)](found, tiles, BAND=8)
    expected = {(i, j) for i in range(tiles) for j in range(i + 1)}
    assert {tuple(pair) for pair in found.tolist()} == expected


def tile_numbers_kernel(mapping):
    import importlib.util
    import tempfile
    from pathlib import Path

    source = (
        "import triton\nimport triton.language as tl\n"
        "from bayesian_lora_kernels.ops.outer_product.tiles import lower_tile_in_bands\n"
        "@triton.jit\ndef kernel(found_ptr, tiles, BAND: tl.constexpr):\n"
        "    p = tl.program_id(0)\n"
        "    i, j = lower_tile_in_bands(p, tiles, BAND)\n"
        "    tl.store(found_ptr + 2 * p, i)\n"
        "    tl.store(found_ptr + 2 * p + 1, j)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tile_numbers.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("tile_numbers", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [False, True])
def test_grouped_equals_float64_for_ragged_widths(monkeypatch, dtype, split):
    from bayesian_lora_kernels.ops.outer_product import kernel_launch

    if split:
        monkeypatch.setattr(kernel_launch, "_ROWS_PER_SPLIT", 10)
        monkeypatch.setattr(kernel_launch, "multiprocessors", lambda device: 40)
    shapes = [(30, 8), (0, 3), (1, 17), (64, 4), (30, 1), (20, 0), (40, 100), (600, 16), (50, 8), (40, 150), (90, 64)]
    xs = [randn(*shape, dtype=dtype) for shape in shapes]
    xs += [randn(12, 40, dtype=dtype).T, randn(60, 40, dtype=dtype)[::3, ::2], randn(1, 24, dtype=dtype).expand(30, 24)]
    xs += [randn(40, 24, dtype=dtype)[:, 8:16]]  # aligned pieces of longer rows
    masks = [torch.rand(x.shape[0], device=DEVICE) < 0.5 if i % 3 == 1 else None for i, x in enumerate(xs)]
    scales = [0.5 * i - 1 for i in range(len(xs))]
    for x, mask in zip(xs, masks, strict=True):
        if mask is not None and x.stride(0) > 0:
            x[~mask] = float("inf")
    results = [torch.full((x.shape[1], x.shape[1]), float("nan"), device=DEVICE) for x in xs]
    kernel_launch.grouped_outer_product(results, xs, masks, scales, False)
    for x, mask, scale, result in zip(xs, masks, scales, results, strict=True):
        assert torch.equal(result, result.T)
        assert_within_budget(result, x, mask, scale)
    outs = [result.clone().T for result in results]
    ops.grouped_outer_product(xs, masks=masks, scales=scales, outs=outs, impl="triton")
    for x, mask, scale, out, start in zip(xs, masks, scales, outs, results, strict=True):
        assert_within_budget(out, x, mask, scale, start)


def test_variants_are_what_is_launched(monkeypatch):
    from bayesian_lora_kernels.ops.outer_product import kernel_launch

    launched = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: launched.append(constants)

    monkeypatch.setattr(kernel_launch, "outer_product_kernel", Recorder())
    monkeypatch.setattr(kernel_launch, "sum_splits_kernel", Recorder())
    half = torch.float16
    xs = [randn(rows, width, dtype=half) for rows, width in ((9, 8), (9000, 8), (7, 8), (40, 256), (5, 200), (3, 0))]
    xs += [randn(9, 16, dtype=half)[:, ::2], randn(40, 256)]
    outs = [torch.zeros(x.shape[1], x.shape[1], device=DEVICE) for x in xs]
    masks = [torch.ones(len(x), dtype=torch.bool, device=DEVICE) if i == 2 else None for i, x in enumerate(xs)]
    arguments = outs, xs, masks, [1.0] * len(xs), True, True
    variants = kernel_launch.variants(*arguments)
    assert [str(one) for one in variants] == [
        "float16 BD=128 vectors accumulate",
        "float16 BD=128 vectors whole accumulate",
        "float16 BD=16 PACK=2 vectors masked accumulate",
        "float16 BD=16 PACK=2 vectors split accumulate",
        "float16 BD=16 accumulate",
        "float32 BD=64 vectors accumulate",
    ]
    kernel_launch.grouped_outer_product(*arguments)
    names = ("BD", "PACK", "VECTORS", "WHOLE", "HAS_MASK", "SPLIT")
    found = {tuple(constants[name] for name in names) for constants in launched if "SPLIT" in constants}
    assert found == {(one.block, one.pack, one.vectors, one.whole, one.masked, one.split) for one in variants}
    sums = [constants for constants in launched if "SPLIT" not in constants]
    assert [(one["BD"], one["PACK"], one["ACCUMULATE"], one["MIRROR"]) for one in sums] == [(16, 2, True, False)]


def test_what_it_cannot_take_is_said():
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run: it sums in float32, and the input is float64"):
        ops.outer_product(randn(4, 3).double(), impl="triton")
    assert ops.outer_product(randn(4, 3).double()).dtype == torch.float64
