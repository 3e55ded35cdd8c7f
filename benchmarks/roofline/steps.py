"""Everything that one call of a case would put on a GPU's stream, in order: our kernels, and PyTorch's operations.

The call is made with tensors of the meta device. Every storage gets an address that stands for it, so that a table of
pointers says which tensors a kernel reaches.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode

from bayesian_lora_kernels.ops import dispatch, native
from benchmarks.cases import Case, Provider
from benchmarks.recorder import Issue, modules, recording

META = torch.device("meta")
_FIRST, _APART = 1 << 40, 1 << 9
# They give a view or memory, and launch nothing.
_SILENT = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh")


@dataclass(frozen=True)
class Operation:
    """An operation of PyTorch: what it reads and writes as (address of its storage, bytes), what its products compute,
    from which type.
    """

    name: str
    read: tuple[tuple[int, int], ...]
    written: tuple[tuple[int, int], ...]
    operations: int = 0
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Eigh:
    """A launch of the native extension: eigenvectors of ``count`` matrices ``[n, n]``; how many of each there are."""

    count: int
    n: int
    dtype: torch.dtype
    decompositions: int


Step = Issue | Operation | Eigh


class Memory:
    """Addresses of storages that have none, and what tables say."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self._address: dict[int, int] = {}
        self._starts: list[int] = []
        self._storages: list[tuple[int, Any]] = []  # bytes, and the storage itself, so that no other takes its place
        self._next = _FIRST

    def address(self, tensor: Tensor) -> int:
        """As ``data_ptr``."""
        return self.start(tensor) + tensor.storage_offset() * tensor.element_size()

    def start(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._address:
            self._address[storage._cdata] = self._next
            self._starts.append(self._next)
            self._storages.append((storage.nbytes(), storage))
            self._next += (storage.nbytes() // _APART + 2) * _APART
        return self._address[storage._cdata]

    def find(self, address: int) -> tuple[int, int] | None:
        """First byte and size of the storage that holds an address."""
        at = bisect.bisect_right(self._starts, address) - 1
        if at < 0 or address >= self._starts[at] + self._storages[at][0]:
            return None
        return self._starts[at], self._storages[at][0]

    def learn(self, table: Tensor, copied: Tensor) -> None:
        """What a table says that was copied from the host."""
        first = self.address(copied)
        self.words |= {first + 8 * i: value for i, value in enumerate(table.flatten().tolist())}


class _Operations(TorchDispatchMode):
    def __init__(self, memory: Memory, steps: list[Step], paused: Callable[[], bool]) -> None:
        super().__init__()
        self.memory, self.steps, self.paused = memory, steps, paused

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name == "index" and any(one.dtype == torch.bool for one in _tensors(args[1])):
            result = args[0].new_empty(0)  # what a check finds wrong: nothing
        else:
            result = function(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        if name in ("_to_copy", "copy_") and outputs:
            source = args[1 if name == "copy_" else 0]
            if source.device.type == "cpu" and source.dtype == torch.int64:
                self.memory.learn(source, outputs[0])
        changes = name.endswith("_") or function._schema.is_mutable
        if self.paused() or name in _SILENT or not outputs or (not changes and function.is_view):
            return result
        storages = {self.memory.start(one) for one in inputs}
        if not changes and all(self.memory.start(one) in storages for one in outputs):
            return result  # contiguous, to: nothing to do
        reading = [] if name.startswith("new_") or name.endswith("_like") else inputs  # of the first, no number
        if name in ("fill_", "zero_", "copy_"):
            reading = inputs[1:]
        work = 0
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            work = 2 * outputs[0].numel() * inputs[-1].shape[-2]
        self.steps.append(
            Operation(name, self._sizes(reading), self._sizes(outputs), work, (inputs or outputs)[-1].dtype)
        )
        return result

    def _sizes(self, tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
        sizes: dict[int, int] = {}
        for one in tensors:
            size = min(one.numel() * one.element_size(), one.untyped_storage().nbytes())
            start = self.memory.start(one)
            sizes[start] = max(sizes.get(start, 0), size)
        return tuple(sizes.items())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.device.type == "meta" else []
    if isinstance(value, dict):
        value = list(value.values())
    return [one for part in value for one in _tensors(part)] if isinstance(value, (list, tuple)) else []


@contextlib.contextmanager
def watching(
    architecture: str,
    multiprocessors: int,
    choose: Callable[..., Any] | None = None,
    paused: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[list[Step], Memory]]:
    """While it is open, what is asked of meta tensors is appended to the steps, but for PyTorch's while ``paused()``;
    ``choose``: as in ``recording``.
    """
    memory = Memory()
    data_ptr, original = Tensor.data_ptr, dispatch.choose
    with contextlib.ExitStack() as stack:
        steps: list[Step] = stack.enter_context(recording(architecture, multiprocessors, choose))  # type: ignore[arg-type]

        def solve(*arrays: Tensor, check_errors: bool = True, decompositions: int = 1) -> None:
            matrices = arrays[-1]
            steps.append(Eigh(len(matrices), matrices.shape[-1], matrices.dtype, decompositions))

        def nystrom(made: Tensor, core: Tensor, gram: Tensor, rounding: float, *, check_errors: bool = True) -> None:
            solve(core, decompositions=2)

        def choose_impl(operation: str, impl: str, *arguments: Any) -> Callable[..., None]:
            offered = dispatch._registry[operation]
            if impl == "auto":
                wide = any(one.dtype == torch.float64 for one in _tensors(arguments[1:2]))
                impl = next(name for name in ("triton", "native", "reference") if name in offered)
                impl = "reference" if wide and impl == "triton" else impl
            return offered[impl].load()

        for module in modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, CustomOpDef):  # its body, not its form for meta tensors
                    stack.enter_context(mock.patch.object(module, name, value._init_fn))
                if value is original:
                    stack.enter_context(mock.patch.object(module, name, choose_impl))
        here = {"why_unavailable": lambda: None, "refuses": lambda _: None, "refuses_device": lambda _: None}
        for name, stand_in in {**here, "small_eigh": solve, "nystrom_eigh": nystrom}.items():
            stack.enter_context(mock.patch.object(native, name, stand_in))

        def address(tensor: Tensor) -> int:
            return memory.address(tensor) if tensor.device.type == "meta" else data_ptr(tensor)

        stack.enter_context(mock.patch.object(Tensor, "data_ptr", address))
        stack.enter_context(_Operations(memory, steps, paused))
        yield steps, memory


def of_case(case: Case, provider: str, architecture: str, multiprocessors: int) -> tuple[list[Step], Memory]:
    """The steps of one call of a case's provider."""
    chosen: Provider = next(one for one in case.providers(META) if one.name == provider)
    with torch.no_grad():
        inputs = case.inputs(META, seed=0)
        with watching(architecture, multiprocessors) as (steps, memory):
            chosen.call(inputs)
            return list(steps), memory
