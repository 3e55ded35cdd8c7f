"""The model while it is measured, and how it comes back as it was: whatever happens, and at whatever moment.

Everything that is changed about a model is undone by a step that was written down before the change. A step may run
twice. A Python signal handler (Ctrl-C) runs in the main thread and between any two instructions, also inside a
`finally`; signals are therefore held back during the last undoing.
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bayesian_lora_kernels.model.quantised import wants_training_mode
from bayesian_lora_kernels.model.sharding import resharded

CHECKPOINT = "_gradient_checkpointing_func"  # where transformers keeps it
Step = Callable[[], None]
R = TypeVar("R")


class _Current(threading.local):
    steps: list[Step] | None = None


_current = _Current()
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode with gradients enabled, one thread at a time, compiled code run as it was written.

    Every module's own mode is back afterwards, and so is all that `undone` wrote down inside.

    transformers checkpoints activations only in training mode. Layers that do so, and have no dropout of their own,
    keep that flag, so that a model which was trained under checkpointing is also measured under it; without reentry,
    which only `loss.backward()` sees through.
    """
    with _lock(model):
        outer, left = _current.steps, True
        steps: list[Step] = []

        def undo() -> None:
            for step in reversed(steps):
                step()

        try:
            try:
                _current.steps = steps
                steps.append(lambda: _uncompiled.leave(steps))
                _uncompiled.enter(steps)
                modes = [(module, module.training) for module in model.modules()]
                steps.append(lambda: _set_modes(modes))
                inference_mode(model)
                checkpointed = [module for module, _ in modes if _checkpoints(module)]
                functions = [(module, vars(module)[CHECKPOINT]) for module in checkpointed]
                steps.append(lambda: _set_functions(functions))
                for module, function in functions:
                    module.training = True
                    setattr(module, CHECKPOINT, functools.partial(function, use_reentrant=False))
                caches = [(m, m._dora_cache) for m, _ in modes if isinstance(getattr(m, "_dora_cache", None), dict)]
                steps.append(lambda: _set_caches(caches))
                for module, _ in caches:
                    module._dora_cache = _NoCache()  # type: ignore[assignment]
                with torch.inference_mode(False), torch.enable_grad(), resharded(model):
                    yield
            finally:
                uninterrupted(undo)
                left = False
        finally:
            if left:  # a second interrupt, or one just before the first attempt
                uninterrupted(undo)
            _current.steps = outer
            steps.clear()  # they hold the model, and one of them holds them


def inference_mode(model: nn.Module) -> None:
    """Eval mode, of all that is not changed for good by running in it."""
    model.eval()
    for module in model.modules():
        if wants_training_mode(module):
            module.training = True


@contextmanager
def undone(step: Step) -> Iterator[None]:
    """Runs `step` when the block ends; if an interrupt prevents that, when `measuring` ends.

    Args:
        step: undoes a change that is made inside the block; may run twice.
    """
    steps = _current.steps if _current.steps is not None else []
    steps.append(step)
    try:
        yield
    finally:
        step()
        if step in steps:
            steps.remove(step)


def undo_when_measured(step: Step) -> None:
    """Writes down a step for the end of `measuring`, for a change that outlives the block which makes it."""
    if _current.steps is not None:
        _current.steps.append(step)


@contextmanager
def hooked(pre: Iterable[tuple[nn.Module, Any]] = (), post: Iterable[tuple[nn.Module, Any]] = ()) -> Iterator[None]:
    """Hooks on modules, inside the block and for this thread alone, closest to the module's own forward.

    Args:
        pre: `(module, hook(module, args, kwargs) -> (args, kwargs) or None)`, before its forward. The last of a
            module's pre-hooks, so that it sees what the forward will get.
        post: `(module, hook(module, args, kwargs, output) -> output or None)`, the first of its hooks.
    """
    thread = threading.get_ident()

    def own(hook: Any) -> Any:
        def run(*args: Any) -> Any:
            return hook(*args) if threading.get_ident() == thread else None

        return run

    befores, afters = [(m, own(hook)) for m, hook in pre], [(m, own(hook)) for m, hook in post]

    def remove() -> None:
        for module, hook in befores:
            _forget(hook, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        for module, hook in afters:
            _forget(hook, module._forward_hooks, module._forward_hooks_with_kwargs)

    with undone(remove):
        for module, hook in befores:
            module.register_forward_pre_hook(hook, with_kwargs=True)
        for module, hook in afters:
            module.register_forward_hook(hook, with_kwargs=True, prepend=True)
        yield


def uninterrupted(work: Callable[[], R]) -> R:
    """The result of `work`, which runs to its end; a signal that comes meanwhile is handled afterwards.

    Only the main thread runs Python's signal handlers, so that elsewhere there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    handlers = {number: handler for number in signal.valid_signals() if callable(handler := signal.getsignal(number))}
    late: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        late.append((number, frame))

    def release() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    try:
        try:
            for number in handlers:
                signal.signal(number, hold)
            return work()
        finally:
            release()
    finally:
        release()  # a signal may have come between two of the first
        for came, frame in late:
            handlers[signal.Signals(came)](came, frame)


class _Uncompiled:
    """`torch.compile` runs the code as it was written, in the whole process, as long as anybody measures.

    Hooks on a compiled module are not called, or only those that were compiled with it.
    """

    def __init__(self) -> None:
        self._users: set[int] = set()
        self._stance: Any = None
        self._lock = threading.Lock()

    def enter(self, user: object) -> None:
        if "torch._dynamo" not in sys.modules:  # nothing has been compiled; importing it takes a second
            return
        with self._lock:
            self._users.add(id(user))
            if self._stance is None:
                self._stance = torch.compiler.set_stance("force_eager")

    def leave(self, user: object) -> None:
        with self._lock:
            self._users.discard(id(user))
            if not self._users and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


_uncompiled = _Uncompiled()


def _lock(model: nn.Module) -> threading.RLock:
    """Of the model that a PeftModel wraps: two wrappers share it."""
    get_base: Any = getattr(model, "get_base_model", None)
    with _guard:
        return _locks.setdefault(model if get_base is None else get_base(), threading.RLock())


def _forget(hook: Any, hooks: dict[int, Any], *flags: dict[int, Any]) -> None:
    for key in [key for key, value in list(hooks.items()) if value is hook]:
        for flag in flags:
            flag.pop(key, None)
        hooks.pop(key, None)


class _NoCache(dict[str, Any]):
    """Keeps nothing: what PEFT caches of DoRA in eval mode has a graph, and is of the weights of an earlier call."""

    def __setitem__(self, key: str, value: Any) -> None:
        pass


def _set_caches(caches: Iterable[tuple[nn.Module, Any]]) -> None:
    for module, cache in caches:
        module._dora_cache = cache


def _set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _set_functions(functions: Iterable[tuple[nn.Module, Any]]) -> None:
    for module, function in functions:
        setattr(module, CHECKPOINT, function)


def _checkpoints(module: nn.Module) -> bool:
    """Whether it runs under PyTorch's checkpointing in training mode, and that mode changes nothing else about it."""
    function = vars(module).get(CHECKPOINT)
    known = getattr(function, "func", None) is checkpoint
    drops = any("drop" in key and isinstance(value, float) and value > 0 for key, value in vars(module).items())
    return bool(getattr(module, "gradient_checkpointing", False)) and known and not drops
