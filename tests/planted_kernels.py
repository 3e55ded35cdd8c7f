"""The outer product kernel with faults as a compiler or a driver would make them, to be verified in the interpreter."""

from __future__ import annotations

import os
import signal
from unittest import mock

import triton
import triton.language as tl

from bayesian_lora_kernels.ops.outer_product import kernel_launch
from bayesian_lora_kernels.ops.outer_product.kernel_launch import grouped_outer_product as right


class _Changed:
    """A kernel that is launched with another grid or other constants."""

    def __init__(self, kernel, grid=lambda grid: grid, **constants):
        self.kernel, self.grid, self.constants = kernel, grid, constants

    def __getitem__(self, grid):
        launch = self.kernel[self.grid(grid)]
        return lambda *arguments, **options: launch(*arguments, **{**options, **self.constants})


def _launched(arguments, **change):
    changed = _Changed(kernel_launch.outer_product_kernel, **change)
    with mock.patch.object(kernel_launch, "outer_product_kernel", changed):
        right(*arguments)


def a_tile_is_never_launched(*arguments):
    _launched(arguments, grid=lambda grid: (max(1, grid[0] - 1), *grid[1:]))


def a_module_is_never_launched(*arguments):
    _launched(arguments, grid=lambda grid: (grid[0], max(1, grid[1] - 1), *grid[2:]))


def the_mask_is_ignored(*arguments):
    _launched(arguments, HAS_MASK=False)


def the_sum_is_not_added(*arguments):
    _launched(arguments, ACCUMULATE=False)


@triton.jit
def spin_kernel(ptr):
    while tl.load(ptr) == 0.25:
        pass


def hangs(outs, *arguments):
    right(outs, *arguments)
    outs[0][0, 0] = 0.25
    spin_kernel[(1,)](outs[0])


def crashes(*arguments):
    right(*arguments)
    os.kill(os.getpid(), signal.SIGABRT)
