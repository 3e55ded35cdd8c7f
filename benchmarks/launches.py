"""What the Triton launchers launch, recorded without a GPU: every kernel, in every configuration that can be asked for.

Launchers are called below the dispatch, with tensors of the meta device, which have shapes and strides and no memory. A
recorder stands in for each kernel. What it saw is what `benchmarks.aot` compiles, specialised as Triton does at launch:
on arguments that are 1 and on those that are multiples of 16.

Sizes are chosen for the variant with the most code: masked, accumulating, counts that are neither. Of layouts with
tiles of their own there is one each. `tests/test_kernels_launches.py` asks for other sizes and finds no other tile.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops import device, tuning

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
MULTIPROCESSORS = 132
BF16, FP16, FP32 = DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", torch.float64: "fp64"}
_NAMES |= {torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}


@dataclass(frozen=True)
class Launch:
    """One kernel as it is launched.

    Args:
        kernel: the ``@triton.jit`` function.
        types: for each argument that is no constant its Triton type (``"*bf16"``, ``"i64"``, ``"fp32"``).
        constants: the value of every ``tl.constexpr``, and of integers that are 1.
        aligned: arguments that are multiples of 16 (pointers: 16 bytes).
        num_warps: warps per block.
        num_stages: depth of the software pipeline.
        enable_fp_fusion: whether multiplications and additions may fuse.
        max_registers: the launch's ``maxnreg``.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool
    max_registers: int | None

    @property
    def function(self) -> str:
        return self.kernel.fn.__name__

    @property
    def module(self) -> str:
        return self.kernel.fn.__module__

    @property
    def data(self) -> str:
        """Type of what it works on: the 16-bit one if there is one."""
        if "DTYPE" in self.constants:
            return str(self.constants["DTYPE"])
        return next((one for one in ("bf16", "fp16", "fp32") if f"*{one}" in self.types.values()), "")

    @property
    def name(self) -> str:
        """Everything but the alignment; flags that are not set are left out."""
        operation, kernel = self.module.split(".")[-2], self.function.removesuffix("_kernel")
        shown = [kernel if operation in kernel else f"{operation} {kernel}", self.data]
        for name, value in self.constants.items():
            if isinstance(value, bool):
                shown += [name] * value
            elif name != "DTYPE":
                shown.append(value if isinstance(value, str) else f"{name}={value}")
        shown += [f"w{self.num_warps}", f"s{self.num_stages}"]
        shown += [] if self.max_registers is None else [f"r{self.max_registers}"]
        return " ".join(filter(None, shown))


class _Recorder:
    """Stands in for a kernel."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches
        parameters = inspect.signature(kernel.fn).parameters
        self.constexpr = {name for name, one in parameters.items() if "constexpr" in str(one.annotation)}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(
        self,
        *arguments: Any,
        num_warps: int,
        num_stages: int,
        enable_fp_fusion: bool,
        maxnreg: int | None = None,
        **more: Any,
    ) -> None:
        names = self.kernel.arg_names
        values = dict(zip(names, arguments, strict=False)) | more
        if sorted(values) != sorted(names):
            raise TypeError(f"{self.kernel.fn.__name__} takes {names}, and is launched with {list(values)}")
        types, constants, aligned = {}, {}, []
        for name in names:
            value = values[name]
            if name in self.constexpr or (isinstance(value, int) and value == 1):
                constants[name] = value
                continue
            types[name] = _type(value)
            if not isinstance(value, float) and (value.data_ptr() if torch.is_tensor(value) else value) % 16 == 0:
                aligned.append(name)
        options = (num_warps, num_stages, enable_fp_fusion, maxnreg)
        self.launches.append(Launch(self.kernel, types, constants, tuple(aligned), *options))


def _type(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return f"*{_NAMES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def modules() -> list[Any]:
    """Every module of the package's operations."""
    return [importlib.import_module(one.name) for one in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}.")]


def is_kernel(name: str, value: object) -> bool:
    """Whether an attribute of a module is a kernel: by our house rule its name says so."""
    return name.endswith("_kernel") and hasattr(value, "arg_names")


def launched(architecture: str, problem: Callable[[], None]) -> list[Launch]:
    """What a problem launches on a GPU of 132 multiprocessors, whatever candidate tuning chooses there."""
    launches: list[Launch] = []
    choice, most = 0, 1

    def choose(key: object, candidates: Sequence[Any], run: object) -> Any:
        nonlocal most
        most = max(most, len(candidates))
        return candidates[min(choice, len(candidates) - 1)]

    instead = (
        (device.architecture, lambda of: architecture),
        (device.multiprocessors, lambda of: MULTIPROCESSORS),
        (tuning.choose_configuration, choose),
    )
    with contextlib.ExitStack() as stack:
        for module in modules():
            for name, value in list(vars(module).items()):
                found = [_Recorder(value, launches)] if is_kernel(name, value) else []
                for replaced in found + [stand_in for original, stand_in in instead if value is original]:
                    stack.enter_context(mock.patch.object(module, name, replaced))
        while choice < most:
            problem()
            choice += 1
    return launches


@functools.cache
def recorded(architecture: str) -> dict[str, Launch]:
    """Everything that `PROBLEMS` launch, by name."""
    found: dict[str, Launch] = {}
    for problem in PROBLEMS:
        for one in launched(architecture, problem):
            if found.setdefault(one.name, one) != one:
                raise ValueError(f"{one.name} is launched in two ways that differ in alignment: choose other sizes")
    return found


def _empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _rows(height: int, width: int, dtype: torch.dtype, strided: bool) -> Tensor:
    return _empty(height, 2 * width, dtype=dtype)[:, ::2] if strided else _empty(height, width, dtype=dtype)


def outer_products(
    widths: Sequence[int] = (16, 32, 64, 128, 4096), height: int = 512, dtypes: Sequence[torch.dtype] = DTYPES
) -> None:
    """Every width and layout, with masks (which have a stride) and without; float16 compiles to what bfloat16 does."""
    from bayesian_lora_kernels.ops.outer_product import kernel, kernel_grouped

    for dtype, width in itertools.product(dtypes, widths):
        for masked, strided in ((False, False), (True, False), (True, True)):
            if dtype == FP16 and masked:
                continue
            size = width - strided  # one that is no multiple of 16
            x, out = _rows(height, size, dtype, strided), _empty(size, size)
            mask = _empty(2 * height, dtype=torch.bool)[::2] if masked else None
            kernel.outer_product(out, x, mask, 1.0, True)
            kernel_grouped.grouped_outer_product([out], [x], [mask], [1.0], True)


def split_outer_products() -> None:
    """So many rows that they are split, and the sums added by a kernel of its own."""
    outer_products((16, 32, 64, 128), 5120, (FP16,))


def mirrored() -> None:
    from bayesian_lora_kernels.ops.outer_product import kernel

    kernel.mirror_lower(_empty(112, 112))


def square_sums(widths: Sequence[int] = (32, 4096)) -> None:
    from bayesian_lora_kernels.ops.square_sum import kernel

    for dtype, width, strided in itertools.product(DTYPES, widths, (False, True)):
        x, mask = _rows(64, width, dtype, strided), _empty(64, dtype=torch.bool)
        kernel.grouped_square_sum(_empty(1, dtype=torch.float64), [x], [mask])


def incremental_svds(columns: Sequence[int] = (16, 30, 64, 128)) -> None:
    """Two streams of many rows, in either layout, and of few."""
    from bayesian_lora_kernels.ops.incremental_svd import kernel

    for dtype, wanted in itertools.product(DTYPES, columns):
        for height, strided in ((9000, False), (200, False), (9000, True)):
            x, mask = _rows(height, 320, dtype, strided), _empty(height, dtype=torch.bool)
            basis, out = _empty(320, wanted), _empty(320, wanted)
            rows, signs = _empty(wanted, 16, dtype=torch.int64), _empty(wanted, 16)
            kernel.grouped_incremental_svd(*([one] * 2 for one in (out, basis, x, mask, rows, signs)), fresh=10)


# Outputs, width of the narrow side, directions kept of it and of the wide side. The first for every dtype: one of each
# class that `by_jacobian` knows, and of the rows that `narrow_rows_kernel` takes. The others for the kernels that
# read the basis of the wide side.
_JACOBIANS = (
    *((1, 8, 8, 10), (4, 4, 4, 0), (4, 4, 4, 10), (4, 40, 40, 0), (4, 40, 39, 10)),
    *((30, 24, 24, 10), (60, 8, 8, 0), (60, 8, 8, 10)),
)
_SIDES = tuple((dtype, wide_input) for dtype in DTYPES for wide_input in (True, False) if dtype != FP16 or wide_input)
_JACOBIANS_OF_WIDE_BASES = tuple((outputs, 2, 2, kept) for outputs in (15, 30, 60) for kept in (30, 60))
# The rows of `token_gram_kernel`, and the columns that a basis has.
_THROUGH_TOKENS = (*((outputs, 8, 8, 5) for outputs in (1, 4)), *((30, 8, 8, kept) for kept in (5, 10, 12, 30)))


def jacobians(
    sizes: Sequence[tuple[int, int, int, int]] = _JACOBIANS,
    sides: Sequence[tuple[torch.dtype, bool]] = _SIDES,
    tokens: int = 64,
    route: str = "by_jacobian",
) -> None:
    """The wide side is the input or the output; as the latter, float16 compiles to what bfloat16 does."""
    from bayesian_lora_kernels.ops.jacobian_covariance import kernel_launch, variants

    def variant(shape: Any, inputs: int, entries: int, architecture: str) -> Any:
        return variants.by_tokens(shape, architecture) if route == "by_tokens" else variants.by_jacobian(shape)

    examples = 18
    for (dtype, wide_input), (outputs, narrow, kept_narrow, kept) in itertools.product(sides, sizes):
        wide = 3968 if outputs > 32 else 7936  # 124 tiles, two to a program
        d_in, d_out = (wide, narrow) if wide_input else (narrow, wide)
        k_in, k_out = (kept, kept_narrow) if wide_input else (kept_narrow, kept)
        a, g = _empty(examples, tokens, d_in, dtype=dtype), _empty(examples, outputs, tokens, d_out, dtype=dtype)
        mask = _empty(examples, tokens, dtype=torch.bool)
        bases = _empty(d_out, k_out), _empty(d_in, k_in)
        precisions = _empty(k_out, k_in), _empty(k_out), _empty(k_in), _empty()
        with mock.patch.object(kernel_launch, "variant", variant):
            kernel_launch.jacobian_covariance(_empty(examples, outputs, outputs), a, g, *bases, *precisions, mask)


def jacobians_of_wide_bases() -> None:
    jacobians(_JACOBIANS_OF_WIDE_BASES, ((FP32, False),))


def jacobians_of_few_tokens() -> None:
    """Of a wide output: gradients of its weight."""
    sizes = ((1, 8, 8, 0), (1, 8, 8, 10), (4, 8, 8, 0), (4, 8, 8, 10), (4, 40, 39, 10), (15, 8, 8, 10))
    jacobians(sizes, ((BF16, False), (FP32, False)), tokens=2)


def jacobians_through_tokens(
    sizes: Sequence[tuple[int, int, int, int]] = _THROUGH_TOKENS, dtypes: Sequence[torch.dtype] = (BF16, FP32)
) -> None:
    """Of few tokens and of many; float16 compiles to what bfloat16 does."""
    for dtype, tokens in itertools.product(dtypes, (64, 256)):
        jacobians(sizes, ((dtype, True),), tokens, "by_tokens")


_VOCABULARIES = ((BF16, BF16), (BF16, FP32), (FP32, FP32), (FP16, FP32))  # float16 alone compiles to what bfloat16 does


def vocabularies(
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]] = _VOCABULARIES, examples: int = 8, samples: int = 60
) -> None:
    """With bias, soft cap and targets; exponentials stored, and (``means_kernel``) not."""
    from bayesian_lora_kernels.ops.vocabulary import kernel_launch

    tokens, width, head = 50257, 4096, (_empty(50257), 30.0)
    on_gpu = mock.patch.object(kernel_launch, "_as_planes", lambda weight: weight.dtype == BF16)
    for of_weight, of_hidden in dtypes:
        weight, hidden = _empty(tokens, width, dtype=of_weight), _empty(examples, samples, width, dtype=of_hidden)
        statistics, targets = (_empty(examples) for _ in range(3)), _empty(examples, dtype=torch.int64)
        out, known = _empty(examples, tokens), _empty(examples, samples, dtype=torch.float64)
        with on_gpu:
            kernel_launch.vocabulary_variance(out, weight, hidden.mT)
            kernel_launch.vocabulary_statistics(*statistics, weight, hidden, *head, targets, None, None)
            for logsumexp in (None, known):
                kernel_launch.vocabulary_probs(out, weight, hidden, *head, logsumexp, None)


PROBLEMS: tuple[Callable[[], None], ...] = (
    *(outer_products, split_outer_products, mirrored, square_sums, incremental_svds),
    *(jacobians, jacobians_of_wide_bases, jacobians_of_few_tokens, jacobians_through_tokens, vocabularies),
)
