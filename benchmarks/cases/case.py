"""What a kernel case is: its inputs, its providers, the truth, and a count of bytes and operations."""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops import native
from bayesian_lora_kernels.ops.dispatch import interpreting

HALF = (torch.float16, torch.bfloat16)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class Work:
    """The fewest bytes that must move through device memory, and the operations of the algorithm (a multiply-add is 2).

    The formulas are those of docs/performance.md.
    """

    bytes: int
    flops: int

    def floor(self, bandwidth: float, rate: float) -> float:
        """Seconds at that bandwidth (bytes/s) and rate (operations/s), whichever takes longer."""
        return max(self.bytes / bandwidth, self.flops / rate)


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Args:
        name: as it stands in the report.
        call: one set of inputs -> the result.
        absent: why it cannot run here, or None.
        share: which part of the case it does; its time is divided by it, and the report says so.
        tolerance: of the correctness gate, where it is not the case's.
        gated: False for a piece of the work that gives no result to compare, such as a GEMM alone.
        compiles: whether the first call compiles for long.
        comparable: the result as the gate compares it.
    """

    name: str
    call: Callable[[Any], Any]
    absent: str | None = None
    share: float = 1.0
    tolerance: float | None = None
    gated: bool = True
    compiles: bool = False
    comparable: Callable[[Any], Any] = lambda result: result


@dataclass(frozen=True)
class Target:
    """A figure of docs/performance.md for `provider`: at most `microseconds`, at least `times` as fast as `over`, or
    at most `memory` times the peak memory of `over`.
    """

    provider: str
    microseconds: float | None = None
    times: float | None = None
    memory: float | None = None
    over: str = ""

    def __str__(self) -> str:
        if self.microseconds is not None:
            return f"{self.provider} <= {self.microseconds:g} us"
        if self.times is not None:
            return f"{self.provider} {self.times:.3g}x {self.over}"
        return f"{self.provider} <= {self.memory:.3g} of the memory of {self.over}"


@dataclass(frozen=True)
class Case(ABC):
    """A kernel at one shape and dtype.

    Args:
        dtype: of the inputs.
        floor_us: the floor of docs/performance.md on its H100, in microseconds.
        targets: figures of docs/performance.md.
        extras: whether the slow baselines are measured too: a compiled reference, another package.
    """

    dtype: torch.dtype
    floor_us: float | None = None
    targets: tuple[Target, ...] = ()
    extras: bool = False

    operation = ""
    mutates = False  # whether a call changes its inputs

    @property
    @abstractmethod
    def shape(self) -> str: ...

    @property
    def name(self) -> str:
        return f"{self.operation} {self.shape} {NAMES[self.dtype]}"

    @property
    def tolerance(self) -> float:
        """Of the gate, on `error`: sums in float32 of products that are exact or in float32; TF32 would give 3e-4."""
        return 1e-4 if self.dtype in HALF else 2e-5

    @abstractmethod
    def dry(self) -> Case:
        """The same case, tiny."""

    @abstractmethod
    def moderate(self) -> Case:
        """The same case at a size that a CPU computes in well under a second."""

    @abstractmethod
    def work(self) -> Work: ...

    @property
    def gemm(self) -> int | None:
        """Operations of PyTorch's own matrix products of the case, where a target compares with them."""
        return None

    @abstractmethod
    def inputs(self, device: torch.device, seed: int) -> Any: ...

    @abstractmethod
    def truth(self, inputs: Any) -> Any:
        """The result in float64, from definitions, not from this package."""

    @abstractmethod
    def providers(self, device: torch.device) -> list[Provider]: ...

    def error(self, truth: Any, result: Any) -> float:
        """Largest relative error in Frobenius norm over the tensors of a result."""
        return max(relative_error(r, t) for r, t in zip(tensors(result), tensors(truth), strict=True))


def tensors(result: Any) -> Iterable[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def relative_error(result: Tensor, truth: Tensor) -> float:
    error = float((result.double() - truth).norm() / truth.norm())
    return math.inf if math.isnan(error) else error


def generator(device: torch.device, seed: int) -> torch.Generator | None:
    """None for the meta device, whose tensors hold no numbers."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


def randn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, state: torch.Generator | None) -> Tensor:
    """Made in the dtype itself: a float32 copy of the largest inputs would take twice their memory."""
    return torch.randn(shape, dtype=dtype, device=device, generator=state)


def padding(shape: tuple[int, ...], device: torch.device, masked: bool) -> Tensor | None:
    """A mask `[..., tokens]` whose last quarter does not count; None where nothing is masked."""
    if not masked:
        return None
    tokens = shape[-1]
    return (torch.arange(tokens, device=device) < tokens - tokens // 4).expand(shape).contiguous()


def poisoned(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x [..., tokens, d]` with NaN where `mask [..., tokens]` does not count: nothing may read it."""
    return x if mask is None else x.masked_fill_(~mask[..., None], math.nan)


def zeroed(x: Tensor, mask: Tensor | None) -> Tensor:
    """The same with zeros, a copy."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0)


def absent_here(operation: str, impl: str, device: torch.device) -> str | None:
    """Why `impl` of an operation cannot run on this machine, or None; arguments are the call's own affair."""
    if not hasattr(ops, operation):
        return "not in this version"
    offered = ops.backends()[impl]
    if operation not in offered["operations"]:
        return f"{operation} has no {impl} implementation"
    if not offered["available"]:
        return str(offered["reason"])
    if impl == "native" and device.type == "cuda" and native.build_info()["cuda"] is None:
        return "the native extension was built without CUDA"
    if impl == "triton" and device.type == "cpu" and not interpreting():
        return "the tensors lie on the CPU, and TRITON_INTERPRET=1 is not set"
    return None


def absent_peer(module: str, device: torch.device | None = None) -> str | None:
    """Why another package cannot be measured here, or None; with `device`, one that runs on GPUs only."""
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    return f"{module} needs a GPU" if device is not None and device.type != "cuda" else None


def package(operation: str, call: Callable[[Any, str], Any], device: torch.device, *impls: str) -> list[Provider]:
    """Providers of this package: `call(inputs, impl)`."""
    return [
        Provider(impl, lambda inputs, impl=impl: call(inputs, impl), absent_here(operation, impl, device))
        for impl in impls
    ]


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`torch.compile`; on the CPU its tracing alone, which is what can be tried there in little time."""
    return torch.compile(function, backend="inductor" if device.type == "cuda" else "aot_eager", dynamic=False)


def interpretable(case: Case) -> Case:
    """bfloat16 arithmetic is wrong in Triton's interpreter: float16 there."""
    return replace(case, dtype=torch.float16) if interpreting() and case.dtype == torch.bfloat16 else case
