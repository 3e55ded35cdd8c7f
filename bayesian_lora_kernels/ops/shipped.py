"""The kernel configurations that this package ships, as data: what `make aot` compiles without a GPU.

Each kernel module has ``shipped(architecture)``, which lists what its launcher can ask for on that architecture, from
the same configuration objects. Imports no Triton; the modules below do, when the tool imports them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Compute capability and shared memory per block, in bytes.
ARCHITECTURES = {"sm_80": (80, 166912), "sm_90": (90, 232448), "sm_100": (100, 232448)}

# Modules with a function ``shipped(architecture: str) -> list[Shipped]``.
KERNEL_MODULES: tuple[str, ...] = (
    "bayesian_lora_kernels.ops.outer_product.kernel",
    "bayesian_lora_kernels.ops.outer_product.kernel_grouped",
    "bayesian_lora_kernels.ops.incremental_svd.kernel",
    "bayesian_lora_kernels.ops.jacobian_covariance.kernel_shipped",
    "bayesian_lora_kernels.ops.square_sum.kernel",
    "bayesian_lora_kernels.ops.vocabulary.kernel_shipped",
)


@dataclass(frozen=True)
class Shipped:
    """One kernel as it is launched.

    Args:
        name: operation, dtype and tile, e.g. ``"outer_product bf16 128x128x64"``; unique.
        kernel: the ``@triton.jit`` function.
        types: for each argument that is no constant its Triton type (``"*bf16"``, ``"i64"``, ``"fp32"``).
        constants: the value of every ``tl.constexpr``, and of arguments that the launch makes constant (a stride of 1).
        num_warps: warps per block.
        num_stages: depth of the software pipeline.
        aligned: arguments that are multiples of 16 (pointers: 16 bytes), as Triton finds out at launch.
        matrix: ``"best"``: the architecture's own matrix instruction is meant (wgmma on sm_90, tcgen05 on sm_100);
            ``"mma"``: any matrix instruction; ``"fma"``: none may be there, since it would round to TF32; ``"none"``:
            none is needed.
        stack: per architecture (or ``"all"``), why bytes on the stack are accepted.
        enable_fp_fusion: whether multiplications and additions may fuse.
        max_registers: the launch's ``maxnreg``.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()
    matrix: str = "none"
    stack: Mapping[str, str] = field(default_factory=dict)
    enable_fp_fusion: bool = True
    max_registers: int | None = None
