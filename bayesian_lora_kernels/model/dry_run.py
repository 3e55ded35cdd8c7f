"""A model that runs without its numbers, and a count of the bytes that live meanwhile.

Its tensors are PyTorch's fake ones: a shape, a dtype, a device, and no memory. Nothing is computed with them, but
autograd records what it would record, and keeps what it would keep. Tensors that do not come from the model (token ids,
masks, labels) have their numbers, so that code which looks at those goes its usual way. What it asks of numbers that
are not there is answered as of numbers that are all zero: comparisons say so, `all` holds, `any` does not, and of flags
that are counted all are set.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

aten = torch.ops.aten
HOLDS = {op for name in ("le", "ge", "eq") for op in (getattr(aten, name).Tensor, getattr(aten, name).Scalar)}
FAILS = {op for name in ("lt", "gt", "ne") for op in (getattr(aten, name).Tensor, getattr(aten, name).Scalar)}
ALL = {aten.all.default, aten.all.dim, aten.all.dims}
NOT = {aten.bitwise_not.default, aten.logical_not.default}
SAME_NUMBERS = {
    aten.unbind.int,
    aten.select.int,
    aten.slice.Tensor,
    aten.detach.default,
    aten.view.default,
    aten._to_copy.default,
}

EIGH_SCRATCH = 2  # matrices, beside the one that becomes the eigenvectors (LAPACK's syevd)


class LiveBytes:
    """The bytes of all tensors that are alive, and what they were when they were most.

    Attributes:
        now: `{device: {label: bytes}}`.
        peak: the same, of each device at the moment when its bytes were most.
    """

    def __init__(self) -> None:
        self.now: defaultdict[torch.device, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.peak: dict[torch.device, dict[str, int]] = {}
        self._total: defaultdict[torch.device, int] = defaultdict(int)
        self._most: defaultdict[torch.device, int] = defaultdict(int)
        self._known: dict[int, weakref.ref[Any]] = {}

    def add(self, tensor: Tensor, label: Callable[[], str]) -> None:
        """Count a tensor's memory until it is gone; once, however many tensors share it."""
        storage = tensor.untyped_storage()
        key, size, device = storage._cdata, storage.nbytes(), tensor.device
        if key not in self._known and size and device.type != "meta":  # decompositions compute shapes there
            named = label()
            self._known[key] = weakref.ref(storage, partial(self._gone, key, device, named, size))
            self._change(device, named, size)

    def leave_out(self, tensor: Tensor) -> None:
        """Count nothing of a tensor's memory, whoever else shares it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._known[key] = weakref.ref(storage, partial(self._gone, key, tensor.device, "", 0))

    def touch(self, device: torch.device, label: str, size: int) -> None:
        """Count bytes that are needed for a moment."""
        self._change(device, label, size)
        self._change(device, label, -size)

    def forget_peak(self) -> None:
        """Begin anew with what is alive now."""
        self.peak = {device: dict(labels) for device, labels in self.now.items()}
        self._most = defaultdict(int, self._total)

    def _gone(self, key: int, device: torch.device, label: str, size: int, _: Any) -> None:
        del self._known[key]
        self._change(device, label, -size)

    def _change(self, device: torch.device, label: str, size: int) -> None:
        self.now[device][label] += size
        self._total[device] += size
        if self._total[device] > self._most[device]:
            self._most[device] = self._total[device]
            self.peak[device] = dict(self.now[device])


class DryRun(TorchDispatchMode):
    """Inside, what meets a fake tensor is not computed; its results are fake, and counted.

    Args:
        live: where to count.
        labels: `{source file: label}`; a tensor has the label of the innermost call that is in one of these files.
        other: the label of the rest.
        elsewhere: the label of what autograd makes in threads of its own, as it does for a GPU.
    """

    def __init__(self, live: LiveBytes, labels: Mapping[str, str], other: str, elsewhere: str):
        super().__init__()
        self.live, self.labels, self.other, self.elsewhere = live, labels, other, elsewhere
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._thread = threading.get_ident()

    def __enter__(self) -> DryRun:
        self._fake.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fake.__exit__(*error)

    def empty(self, like: Tensor, device: torch.device, label: str | None) -> Tensor:
        """A fake tensor of the shape, strides and dtype of another, counted under a label; None: not counted."""
        with _disable_current_modes(), self._fake:
            fake = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        if label is None:
            self.live.leave_out(fake)
        else:
            self.live.add(fake, lambda: label)
        return fake

    def without_numbers(self, model: nn.Module, device: torch.device | None, label: str) -> nn.Module:
        """A copy of a model with fake parameters and buffers, which are counted; on `device`, or where they are.

        Raises:
            ValueError: for parameters on the meta device, if no other is named, and for those that are no plain tensors
                (of a quantised model).
            RuntimeError: for a model that cannot be copied.
        """
        fakes: dict[int, Any] = {}
        for name, x in itertools.chain(model.named_parameters(), model.named_buffers()):
            if type(x) not in (nn.Parameter, Tensor):
                kind = type(x).__name__
                raise ValueError(f"{name}: expected a plain tensor, got a {kind}, of which no empty copy can be made")
            if x.is_meta and device is None:
                raise ValueError(f"{name}: it is on the meta device; say with device=... where it shall be")
            fake = self.empty(x, device or x.device, label)
            fakes[id(x)] = nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
        try:
            return copy.deepcopy(model, fakes)
        except Exception as error:  # what wrappers hold: process groups, locks
            raise RuntimeError(f"{type(model).__name__}: cannot be copied ({error}); pass the model inside") from error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if FakeTensor not in types and (_has_tensors(args, kwargs) or not _makes_numbers(kwargs)):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if "generator" in kwargs:
            kwargs["generator"] = None  # nothing is drawn, and not all fake operations take one
        if func is aten._local_scalar_dense.default:
            return _number(args[0])
        if func is aten.index.Tensor:
            args = (args[0], _as_positions(args[1]))
        elif func is aten.nonzero.default:
            return _every_position(args[0])
        out = func(*args, **kwargs)
        answer = _answer(func, args)
        for x in (out,) if isinstance(out, Tensor) else tree_iter(out):
            if isinstance(x, FakeTensor):
                self.live.add(x, self._label)
                if answer is not None:
                    x.answer = answer  # type: ignore[attr-defined]
        if func is aten._linalg_eigh.default:
            one = args[0].element_size() * args[0].shape[-1] ** 2
            self.live.touch(args[0].device, self._label(), EIGH_SCRATCH * one)
        return out

    def _label(self) -> str:
        frame: Any = sys._getframe(1)
        while frame is not None:
            label = self.labels.get(frame.f_code.co_filename)
            if label is not None:
                return label
            frame = frame.f_back
        return self.other if threading.get_ident() == self._thread else self.elsewhere


def _has_tensors(args: Any, kwargs: Any) -> bool:
    return any(isinstance(x, Tensor) for x in tree_iter((args, kwargs)))


def _makes_numbers(kwargs: Mapping[str, Any]) -> bool:
    """Of an operation on no tensors, whether it makes one of floating point."""
    dtype: torch.dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return dtype.is_floating_point


def _answer(func: Any, args: Sequence[Any]) -> bool | int | None:
    """What the numbers of a result are, all of them, in the sense of the module; None: zero."""
    if func in ALL or func in HOLDS:
        return True
    if func in FAILS or not args or not isinstance(args[0], Tensor):
        return None
    x = args[0]
    known: bool | int | None = getattr(x, "answer", None)
    if func in SAME_NUMBERS:
        return known
    if func in NOT:
        return None if known is None else not known
    if x.dtype == torch.bool and func is aten.sum.default:
        return x.numel()
    if x.dtype == torch.bool and func is aten.sum.dim_IntList:
        return math.prod(x.shape[d] for d in args[1])
    return None


def _number(x: Tensor) -> bool | int | float:
    answer = getattr(x, "answer", None) or 0
    return bool(answer) if x.dtype == torch.bool else float(answer) if x.is_floating_point() else int(answer)


def _as_positions(indices: Sequence[Any]) -> list[Any]:
    """Positions in the place of masks, whose number of them decides a shape."""
    found: list[Any] = []
    for index in indices:
        if not isinstance(index, Tensor) or index.dtype != torch.bool:
            found.append(index)
        elif isinstance(index, FakeTensor):
            found += _every_position(index).unbind(dim=1)
        else:
            with _disable_current_modes():
                found += index.nonzero().unbind(dim=1)
    return found


def _every_position(mask: Tensor) -> Tensor:
    return torch.empty(mask.numel(), mask.ndim, dtype=torch.long, device=mask.device)
