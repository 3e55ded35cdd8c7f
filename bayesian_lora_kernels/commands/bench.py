"""`blk bench`: how fast every operation is here, in every implementation that runs here.

Sizes are those of LoRA of rank 8. Each result is first compared with the float64 reference; the time of one that is not
right is not shown.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.adapter import choose_device
from bayesian_lora_kernels.commands.errors import FAILED, as_failures
from bayesian_lora_kernels.commands.parts import Table
from bayesian_lora_kernels.ops.dispatch import IMPLEMENTATIONS
from bayesian_lora_kernels.posterior.kronecker import Blocks, KroneckerPosterior

RANK, KEPT, OUTPUTS = 8, 32, 4
ROUNDS = 11
# Largest relative error, in the norm of the result, that is taken for rounding.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float16: 1e-4}


def run(args: Namespace) -> int:
    """Measure, print, write."""
    device = choose_device(args.device)
    size = SIZES["quick" if args.quick else "cuda" if device.type == "cuda" else "cpu"]
    with as_failures(RuntimeError):
        rows = measure(device, getattr(torch, args.dtype), size)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    result = {"command": "bench", "device": name, "torch": torch.__version__, "dtype": args.dtype, "rows": rows}
    output.write_json(args.json, result)
    output.show(args, f"{name}, PyTorch {torch.__version__}, inputs {args.dtype}", "", timings(rows))
    return FAILED if any(row["error"] is not None and row["seconds"] is None for row in rows) else 0


@dataclass(frozen=True)
class Size:
    """Examples, tokens of each, width of a layer and number of layers."""

    examples: int
    tokens: int
    width: int
    layers: int


SIZES = {"cpu": Size(8, 64, 1024, 8), "cuda": Size(8, 256, 4096, 32), "quick": Size(2, 16, 256, 2)}


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    Attributes:
        operation: its name in `blk.ops`.
        shape: in words.
        inputs: what it computes from.
        call: takes the inputs (also in float64) and `impl`; returns one tensor that tells right from wrong.
    """

    operation: str
    shape: str
    inputs: tuple[Any, ...]
    call: Callable[..., Tensor]


def measure(device: torch.device, dtype: torch.dtype, size: Size) -> list[dict[str, Any]]:
    """One row per case and implementation that can run, in values that JSON can hold.

    `seconds` holds the median and the 20th and 80th percentile; it is None, with a `reason`, where the implementation
    refuses or its result is wrong. Random inputs come from a fixed seed.
    """
    rows = []
    for case in output.bar(list(cases(device, dtype, size)), desc="bench", unit="case"):
        truth = case.call(*in_float64(case.inputs), impl="reference").double()
        for impl in reversed(IMPLEMENTATIONS):
            if case.operation not in ops.backends()[impl]["operations"]:
                continue
            row: dict[str, Any] = {"operation": case.operation, "shape": case.shape, "implementation": impl}
            row |= {"error": None, "seconds": None, "reason": None}
            rows.append(row)
            try:
                result = case.call(*case.inputs, impl=impl).double()
            except RuntimeError as refusal:
                row["reason"] = str(refusal).splitlines()[0].split("cannot run: ")[-1]
                continue
            row["error"] = float((result - truth).norm() / truth.norm())
            if not row["error"] <= TOLERANCE[dtype]:
                row["reason"] = f"wrong: relative error {row['error']:.1e}"
                continue
            row["seconds"] = timed(partial(case.call, *case.inputs, impl=impl), device)
    return rows


def cases(device: torch.device, dtype: torch.dtype, size: Size) -> Iterator[Case]:
    """What a fit and a prediction ask for."""
    generator = torch.Generator(device).manual_seed(0)
    n, t, d, layers = size.examples, size.tokens, size.width, size.layers

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    wide = normal(n * t, d) * torch.arange(1, d + 1, device=device).rsqrt().to(dtype)
    narrow = [normal(n * t, RANK) for _ in range(2 * layers)]
    yield Case("outer_product", f"{n * t} x {d}", (wide,), lambda x, impl: ops.outer_product(x, impl=impl))
    yield Case(
        "grouped_outer_product",
        f"{2 * layers} of {n * t} x {RANK}",
        (narrow,),
        lambda xs, impl: torch.stack(ops.grouped_outer_product(xs, impl=impl)),
    )
    yield Case(
        "grouped_square_sum",
        f"{2 * layers} of {n * t} x {RANK}",
        (narrow,),
        lambda xs, impl: ops.grouped_square_sum(xs, impl=impl),
    )
    columns = 2 * KEPT + 10
    if n * t > columns and d > columns:

        def update(x: Tensor, impl: str) -> Tensor:
            basis = ops.incremental_svd(
                None, x, columns=columns, generator=torch.Generator().manual_seed(1), impl=impl
            )[:, :KEPT]
            return basis.square().sum(0)  # leading eigenvalues

        yield Case("incremental_svd", f"{n * t} x {d}, {columns} columns", (wide,), update)
    a, g = wide.reshape(n, t, d), normal(n, OUTPUTS, t, RANK)
    basis_a = torch.linalg.qr(torch.randn(d, KEPT, generator=generator, device=device)).Q
    basis_s = torch.linalg.qr(torch.randn(RANK, RANK, generator=generator, device=device)).Q
    blocks = [
        1 + torch.rand(shape, generator=generator, device=device) for shape in ((RANK, KEPT), (RANK,), (KEPT,), ())
    ]
    yield Case(
        "grouped_jacobian_covariance",
        f"{layers} layers, {n} x {t} tokens, {d} wide, {OUTPUTS} logits",
        (a, g, basis_s, basis_a, blocks),
        lambda a, g, s, q, b, impl: ops.grouped_jacobian_covariance(
            [a] * layers, [g] * layers, [KroneckerPosterior(s, q, Blocks(*b), b[3] * 0)] * layers, impl=impl
        ),
    )
    for order in (KEPT, columns):
        half = torch.randn(layers, order, order, generator=generator, device=device)
        yield Case(
            "small_eigh",
            f"{layers} of {order} x {order}",
            ((half @ half.mT),),
            lambda matrices, impl: ops.small_eigh(matrices, impl=impl)[0],
        )


def in_float64(value: Any) -> Any:
    """Tensors, and tensors in lists and tuples, in float64."""
    if isinstance(value, Tensor):
        return value.double()
    return type(value)(in_float64(one) for one in value)


def timed(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of single calls: median, 20th and 80th percentile."""
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    fifths = quantiles(seconds[1:], n=10)
    return {"median": fifths[4], "p20": fifths[1], "p80": fifths[7]}


def timings(rows: Iterable[dict[str, Any]]) -> Table:
    """The same to read."""
    cells = [("operation", "shape", "implementation", "median", "p20 to p80", "error")]
    lines = [f"{'operation':<29}{'implementation':<16}{'median':>10}{'p20 to p80':>20}{'error':>9}  shape"]
    for row in rows:
        start = f"{row['operation']:<29}{row['implementation']:<16}"
        if row["seconds"] is None:
            lines.append(f"{start}-  {row['reason']}")
            cells.append((row["operation"], row["shape"], f"{row['implementation']}: {row['reason']}", "-", "-", "-"))
            continue
        median, p20, p80 = (1e3 * row["seconds"][key] for key in ("median", "p20", "p80"))
        spread = f"{p20:.3g} to {p80:.3g} ms"
        error, middle = f"{row['error']:.0e}", f"{median:.3g} ms"
        lines.append(f"{start}{middle:>10}{spread:>20}{error:>9}  {row['shape']}")
        cells.append((row["operation"], row["shape"], row["implementation"], middle, spread, error))
    return Table(cells, left=3, plain="\n".join(lines))
