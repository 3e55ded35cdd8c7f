"""Which implementation of an operation runs: a registry, the user's choice, and what this machine can do.

An operation registers one loader per implementation; nothing is imported before it is needed, so that
importing the package needs neither Triton nor a compiler nor a GPU. The choice is made when the operation
runs, not when it is traced: ``impl`` travels through ``torch.compile`` as a plain string.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bayesian_lora_kernels.surroundings import in_own_surroundings

from . import native
from .device import interpreting
from .tuning import not_tuned
from .verify.problem import tensors_in
from .verify.verifier import Claim, Evidence, attribute_once, is_of_the_launch, verifier

logger = logging.getLogger("bayesian_lora_kernels")

# The order in which "auto" tries them.
IMPLEMENTATIONS = ("native", "triton", "reference")
CHOICES = ("auto", *IMPLEMENTATIONS)
ENVIRONMENT_VARIABLE = "BLK_IMPL"


def _accepts_everything(*arguments: Any) -> str | None:
    return None


def _suits_everything(*arguments: Any) -> bool:
    return True


@dataclass(frozen=True)
class Implementation:
    """One way to compute one operation: ``function`` of ``module``, imported when first used.

    ``refuses`` takes the function's arguments and returns why it cannot take them (a device, a dtype, a
    size), or None. ``suits_auto`` takes them too; False keeps it to an explicit choice (it is right, but not
    faster here). With ``evidence``, ``auto`` takes it on a CUDA device once it is verified there.
    """

    module: str
    function: str
    refuses: Callable[..., str | None] = _accepts_everything
    suits_auto: Callable[..., bool] = _suits_everything
    evidence: Evidence | None = None

    @property
    def path(self) -> str:
        """Where the function is, as ``module:name``."""
        return f"{self.module}:{self.function}"

    def load(self) -> Callable[..., None]:
        """Import the module and return the function."""
        function: Callable[..., None] = getattr(importlib.import_module(self.module), self.function)
        return function


_registry: dict[str, dict[str, Implementation]] = {}
_default: str | None = None
_logged: set[tuple[str, str, str]] = set()


def register(operation: str, name: str, implementation: Implementation) -> None:
    """Add an implementation of ``operation`` under one of the names of ``IMPLEMENTATIONS``."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{operation}: expected an implementation among {IMPLEMENTATIONS}, got {name!r}")
    _registry.setdefault(operation, {})[name] = implementation


def check_impl(operation: str, impl: str) -> str:
    """Return ``impl`` if it is one of ``auto``, ``reference``, ``triton``, ``native``; ValueError
    otherwise.
    """
    if impl not in CHOICES:
        raise ValueError(f"{operation}: expected impl to be one of {CHOICES}, got {impl!r}")
    return impl


def set_default_impl(name: str | None) -> None:
    """Choose the implementation that ``impl="auto"`` stands for in this process.

    ``name`` is ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``; None returns the choice to the
    environment variable ``BLK_IMPL`` (itself ``"auto"`` where it is not set). An operation that has no
    implementation of that name falls back as ``auto`` does; one that has it but cannot run it here raises
    RuntimeError.

    Raises ValueError for another name.
    """
    global _default
    _default = None if name is None else check_impl("set_default_impl", name)


def default_impl() -> str:
    """What ``impl="auto"`` stands for now: ``set_default_impl``, else ``BLK_IMPL`` (read at every call), else
    auto.
    """
    if _default is not None:
        return _default
    return check_impl(f"environment variable {ENVIRONMENT_VARIABLE}", os.environ.get(ENVIRONMENT_VARIABLE) or "auto")


def machine_refuses(name: str) -> str | None:
    """Why nothing of the implementation ``name`` can run on this machine, or None."""
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if not interpreting() and not torch.cuda.is_available():
            return "no CUDA device is present, and TRITON_INTERPRET=1 is not set"
    if name == "native":
        return native.why_unavailable()
    return None


def _log_once(operation: str, name: str, reason: str) -> None:
    if (operation, name, reason) not in _logged:
        _logged.add((operation, name, reason))
        logger.info("%s: %s left out: %s", operation, name, reason)


def choose(operation: str, impl: str, *arguments: Any) -> Callable[..., None]:
    """The function that computes ``operation`` for these arguments.

    Raises RuntimeError, with the reason, if an explicit ``impl`` cannot run.
    """
    offered = _registry[operation]
    wanted = check_impl(operation, impl)
    if wanted == "auto":
        wanted = default_impl()
        if wanted not in offered and wanted != "auto":
            # A process-wide choice must not make the operations unusable that never had such an
            # implementation.
            reason = machine_refuses(wanted)
            if reason is not None:
                raise RuntimeError(f"{operation}: impl={wanted!r} (the default set) cannot run: {reason}")
            _log_once(operation, wanted, f"{operation} has no {wanted} implementation")
            wanted = "auto"
    if wanted != "auto":
        if wanted not in offered:
            reason = f"{operation} has none; it has {', '.join(sorted(offered))}"
        else:
            reason = machine_refuses(wanted) or offered[wanted].refuses(*arguments)
        if reason is not None:
            raise RuntimeError(f"{operation}: impl={wanted!r} cannot run: {reason}")
        return in_own_surroundings(offered[wanted].load())
    for name in IMPLEMENTATIONS:
        candidate = offered.get(name)
        if candidate is None or not candidate.suits_auto(*arguments):
            continue
        reason = machine_refuses(name) or candidate.refuses(*arguments)
        if reason is None:
            function, reason = _verified(operation, name, candidate, arguments)
            if reason is None:
                return in_own_surroundings(function)
        _log_once(operation, name, reason)
    raise RuntimeError(f"{operation}: no implementation takes these arguments")


def _verified(
    operation: str, name: str, implementation: Implementation, arguments: tuple[Any, ...]
) -> tuple[Callable[..., None], str | None]:
    """The function of an implementation, and why it is not taken: this machine has not seen that it is right."""
    function = implementation.load()
    if implementation.evidence is None or not (device := _device_to_verify(arguments)):
        return function, None
    claim = claim_of(operation, name)
    judge = verifier(device)
    with not_tuned():
        reason = in_own_surroundings(judge.refuses)(claim, arguments)
    if reason is not None:
        return function, reason

    def guarded(*arguments: Any) -> None:
        try:
            with not_tuned():
                function(*arguments)
        except Exception as error:
            if not is_of_the_launch(error):
                raise
            why = judge.failed(claim, arguments, error)
            _log_once(operation, name, why)
            if attribute_once(claim.evidence.suite).accumulates(arguments):
                # Some of the outputs may have been added to.
                message = f"{operation}: {why}; it is left out from now on: repeat what you did"
                raise RuntimeError(message) from error
            _registry[operation]["reference"].load()(*arguments)

    return guarded, None


def _device_to_verify(arguments: tuple[Any, ...]) -> torch.device | None:
    """Where a call runs, if that is a device on which implementations are verified first."""
    device = next(tensors_in(arguments)).device
    return device if device.type == "cuda" else None


def claim_of(operation: str, name: str) -> Claim:
    """What is verified of an implementation that has evidence."""
    offered = _registry[operation]
    evidence = offered[name].evidence
    assert evidence is not None
    return Claim(offered[name].function, name, offered[name].path, offered["reference"].path, evidence)


def claims() -> list[Claim]:
    """Those of all implementations that are verified before they are used; operations may share one."""
    found = [
        claim_of(operation, name)
        for operation, offered in sorted(_registry.items())
        for name, implementation in offered.items()
        if implementation.evidence is not None
    ]
    return list(dict.fromkeys(found))


def backends() -> dict[str, dict[str, Any]]:
    """What this machine can run, and why not the rest.

    Returns ``{name: {"available": bool, "reason": str or None, "operations": [names]}}`` for ``reference``, ``triton``
    and ``native``: ``reason`` says why ``available`` is False; ``operations`` are those that have such an
    implementation. Plain values, ready for JSON. Asks for a CUDA device, which importing the package never does.
    """
    report: dict[str, dict[str, Any]] = {}
    for name in reversed(IMPLEMENTATIONS):
        operations = sorted(operation for operation, offered in _registry.items() if name in offered)
        reason = machine_refuses(name)
        if reason is None and not operations:
            reason = f"no operation of this version has a {name} implementation"
        report[name] = {"available": reason is None, "reason": reason, "operations": operations}
    return report
