"""Milliseconds of the host for a grouped call of a whole model: `python -m benchmarks.host_time`, without a GPU.

Kernels are replaced by what does nothing, and so is the small eigensolver; tensors lie on the CPU and are few numbers
wide, so that PyTorch's own operations are mostly their calls. Beside each what it took before, on another processor.
Minimum and median of many calls: run it on a quiet machine, with Triton (`make test-interpret` sets one up).
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops import device, dispatch
from bayesian_lora_kernels.ops.incremental_svd import kernel as incremental_svd
from benchmarks.recorder import MULTIPROCESSORS, is_kernel, modules

MODULES, REPEATS = 224, 30
BF16 = torch.bfloat16


class _Nothing:
    """A kernel that is launched to no effect."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Triton's launchers take tensors on the CPU, and what they launch does nothing."""
    instead = (
        (device.architecture, lambda of: "sm_90"),
        (device.multiprocessors, lambda of: MULTIPROCESSORS),
        (device.triton_refuses, lambda *tensors: None),
    )
    with contextlib.ExitStack() as stack:
        for module in modules():
            for name, value in list(vars(module).items()):
                found = [_Nothing()] if is_kernel(name, value) else []
                for new in found + [other for original, other in instead if value is original]:
                    stack.enter_context(mock.patch.object(module, name, new))
        stack.enter_context(mock.patch.object(dispatch, "machine_refuses", return_value=None))
        stack.enter_context(mock.patch.object(incremental_svd, "_nystrom_eigh", new=lambda core, gram: core))
        yield


def milliseconds(call: Callable[[], object]) -> tuple[float, float]:
    """Minimum and median."""
    times = []
    for _ in range(REPEATS + 3):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[3:]), statistics.median(times[3:])


def calls(masked: bool) -> dict[str, tuple[float, Callable[[], object]]]:
    """The milliseconds before, and the call."""

    def masks(*shape: int, count: int) -> list[Tensor | None]:
        return [torch.ones(shape, dtype=torch.bool) if masked else None] * count

    xs = [torch.zeros(8, 8, dtype=BF16) for _ in range(256)]
    outs = [torch.zeros(8, 8) for _ in xs]
    squares = [torch.zeros(8, 8 * (1 + i % 2), dtype=BF16) for i in range(352)]
    rows = [torch.zeros(64, 64, dtype=BF16) for _ in range(MODULES)]
    bases = [torch.zeros(64, 30) for _ in rows]
    a = [torch.zeros(2, 64, 128, dtype=BF16) for _ in range(MODULES)]
    g = [torch.zeros(2, 4, 64, 8, dtype=BF16) for _ in a]
    shapes = ((8, 10), (8,), (10,), ())
    posteriors = [
        SimpleNamespace(
            basis_s=torch.eye(8), basis_a=torch.eye(128, 10), precision_blocks=tuple(map(torch.ones, shapes))
        )
        for _ in a
    ]
    state = torch.Generator()
    return {
        "grouped_square_sum of 352": (
            2.7,
            lambda: ops.grouped_square_sum(squares, masks=masks(8, count=352), impl="triton"),
        ),
        "grouped_outer_product of 256": (
            5.2,
            lambda: ops.grouped_outer_product(xs, outs=outs, masks=masks(8, count=256), impl="triton"),
        ),
        f"grouped_incremental_svd of {MODULES}": (
            23.0 if masked else 16.0,
            lambda: ops.grouped_incremental_svd(
                bases, rows, masks=masks(64, count=MODULES), generator=state, fresh=10, impl="triton"
            ),
        ),
        f"grouped_jacobian_covariance of {MODULES}": (
            10.7,
            lambda: ops.grouped_jacobian_covariance(a, g, posteriors, masks=masks(2, 64, count=MODULES), impl="triton"),
        ),
    }


def main() -> None:
    torch.set_num_threads(1)
    print("| call | minimum | median | before |\n|---|---|---|---|")
    with without_kernels():
        for masked in (False, True):
            for name, (before, call) in calls(masked).items():
                least, median = milliseconds(call)
                print(f"| {name}{', masked' * masked} | {least:.2f} | {median:.2f} | {before:g} |", flush=True)


if __name__ == "__main__":
    main()
