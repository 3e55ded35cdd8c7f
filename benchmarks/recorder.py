"""What the Triton launchers launch, seen without a GPU.

Launchers are called below the dispatch, with tensors of the meta device, which have shapes and strides and no memory. A
recorder stands in for each kernel. A launch is specialised as Triton does it: on arguments that are 1 and on those that
are multiples of 16.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops import device, layouts, tuning

ARCHITECTURES = tuple(device.TABLES)
MULTIPROCESSORS = 132
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_NAMES |= {torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}


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


@dataclass(frozen=True)
class Issue:
    """A launch with its grid and the values of its arguments that are no constants."""

    launch: Launch
    grid: tuple[int, ...]
    values: Mapping[str, Any]


class _Recorder:
    """Stands in for a kernel."""

    def __init__(self, kernel: Any, issues: list[Issue]) -> None:
        self.kernel, self.issues = kernel, issues
        parameters = inspect.signature(kernel.fn).parameters
        self.constexpr = {name for name, one in parameters.items() if "constexpr" in str(one.annotation)}
        options = getattr(kernel, "kwargs", vars(kernel))  # in the interpreter, or not
        self.general = set(options.get("do_not_specialize") or ())

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(
        self,
        grid: tuple[int, ...],
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
            value, general = values[name], name in self.general
            if name in self.constexpr or (isinstance(value, int) and value == 1 and not general):
                constants[name] = value
                continue
            types[name] = _type(value)
            if isinstance(value, float) or general:
                continue
            if (value.data_ptr() if torch.is_tensor(value) else value) % 16 == 0:
                aligned.append(name)
        options = (num_warps, num_stages, enable_fp_fusion, maxnreg)
        launch = Launch(self.kernel, types, constants, tuple(aligned), *options)
        self.issues.append(Issue(launch, grid, {name: values[name] for name in types}))


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


@contextlib.contextmanager
def recording(
    architecture: str, multiprocessors: int = MULTIPROCESSORS, choose: Callable[..., Any] | None = None
) -> Iterator[list[Issue]]:
    """While it is open, kernels are not launched but appended to the list, and tensors of the meta device are taken to
    lie on a GPU of that architecture.

    ``choose`` stands in for ``tuning.choose_configuration``; None: the first candidate, as without tuning.
    """
    issues: list[Issue] = []
    instead = (
        (device.architecture, lambda of: device.TABLES[architecture]),
        (device.multiprocessors, lambda of: multiprocessors),
        (device.on_device, lambda of: contextlib.nullcontext()),
        (tuning.choose_configuration, choose or (lambda key, candidates, run: candidates[0])),
    )
    with contextlib.ExitStack() as stack:
        for module in modules():
            for name, value in list(vars(module).items()):
                found = [_Recorder(value, issues)] if is_kernel(name, value) else []
                for replaced in found + [stand_in for original, stand_in in instead if value is original]:
                    stack.enter_context(mock.patch.object(module, name, replaced))
        is_cuda = property(lambda of: of.device.type == "meta")
        stack.enter_context(mock.patch.object(Tensor, "is_cuda", is_cuda))
        # What launchers worked out for the meta device was for another architecture.
        layouts.forget()
        stack.callback(layouts.forget)
        yield issues


def launched(architecture: str, problem: Callable[[], None], multiprocessors: int = MULTIPROCESSORS) -> list[Launch]:
    """What a problem launches on a GPU of that architecture, whatever candidate tuning chooses there."""
    choice, most = 0, 1

    def choose(key: object, candidates: Sequence[Any], run: object) -> Any:
        nonlocal most
        most = max(most, len(candidates))
        return candidates[min(choice, len(candidates) - 1)]

    with recording(architecture, multiprocessors, choose) as issues:
        while choice < most:
            problem()
            choice += 1
    return [issue.launch for issue in issues]
