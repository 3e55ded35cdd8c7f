"""`patch` lets an installed package's functions be ours, everywhere; `unpatch` undoes that."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

OURS = __name__.partition(".")[0]


@dataclass(frozen=True)
class _Target:
    """A package that can be patched.

    Attributes:
        ours: the module with our functions.
        functions: theirs, `{name: the module that defines it}`.
        versions: whose functions ours stand for; empty for a checkout, which has none.
        signatures: by which functions of a checkout are known, `{name: signature}`.
    """

    ours: str
    functions: Mapping[str, str]
    versions: tuple[str, ...] = ()
    signatures: Mapping[str, str] = field(default_factory=dict)


TARGETS = {
    "bayesian_lora": _Target(
        versions=("0.0.6",),
        ours="bayesian_lora_kernels.compat.bayesian_lora",
        functions={
            "calc_M": "bayesian_lora.main",
            "calculate_kronecker_factors": "bayesian_lora.kfac",
            "cholesky_decompose_small_factors": "bayesian_lora.main",
            "incremental_svd": "bayesian_lora.kfac",
            "jacobian_mean": "bayesian_lora.main",
            "model_evidence": "bayesian_lora.main",
            "stable_cholesky": "bayesian_lora.kfac",
            "variance": "bayesian_lora.main",
        },
    ),
    "bayesadapt": _Target(
        ours="bayesian_lora_kernels.compat.laplace_lora",
        functions={"Laplace": "bayesadapt.laplace.laplace"},
        signatures={
            "Laplace": "(model, likelihood, subset_of_weights='last_layer', hessian_structure='kron', *args, **kwargs)"
        },
    ),
}

# {package: [(theirs, the stand-in for it)]} of what is patched now.
_patched: dict[str, list[tuple[Callable[..., Any], Callable[..., Any]]]] = {}


def patch(package: str) -> list[str]:
    """Let an installed package's functions be ours, in the package and in every module that imported them from it.

    References that are kept elsewhere (in a class, a closure, a `functools.partial`) stay what they are. Patching again
    reaches modules that have been imported since.

    Args:
        package: `bayesian_lora`; or `bayesadapt`, in a checkout of BayesAdapt.

    Returns:
        `module.name` of everything that was replaced; it is logged too, at INFO.

    Raises:
        ValueError: for a package that is not known here.
        ModuleNotFoundError: if it is not installed, or something that it needs.
        RuntimeError: if it is of a version whose functions might differ.
    """
    target = _target(package)
    found = _known_version(package, target)
    if package not in _patched:
        source = importlib.import_module(target.ours)
        pairs = []
        for name, module in target.functions.items():
            theirs = getattr(importlib.import_module(module), name)
            signature, expected = str(inspect.signature(theirs)), target.signatures.get(name)
            if expected not in (None, signature):
                raise RuntimeError(f"patch: {module}.{name}{signature} is not known, expected {name}{expected}")
            pairs.append((theirs, _stand_in(getattr(source, name))))
        _patched[package] = pairs
    replaced = _replace({id(theirs): ours for theirs, ours in _patched[package]})
    logger.info("patched %s %s: %s", package, found, ", ".join(replaced))
    return replaced


def unpatch(package: str) -> list[str]:
    """Give a package its functions back, everywhere.

    Returns:
        `module.name` of everything that was put back; empty if nothing was patched.

    Raises:
        ValueError: for a package that is not known here.
    """
    _target(package)
    restored = _replace({id(ours): theirs for theirs, ours in _patched.get(package, [])})
    _patched.pop(package, None)
    logger.info("unpatched %s: %s", package, ", ".join(restored) or "nothing was patched")
    return restored


def _target(package: str) -> _Target:
    if package not in TARGETS:
        raise ValueError(f"patch: expected one of {', '.join(TARGETS)}, got {package!r}")
    return TARGETS[package]


def _known_version(package: str, target: _Target) -> str:
    """The installed one, if ours stand for it; of a checkout nothing is known."""
    try:
        if not target.versions:
            importlib.import_module(package)
            return "(a checkout)"
        found = version(package)
    except PackageNotFoundError:
        raise ModuleNotFoundError(f"patch: {package} is not installed") from None
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"patch: {package} cannot be imported, run where its checkout is: {error}") from None
    if found not in target.versions:
        raise RuntimeError(f"patch: {package} {found} is not known, expected {' or '.join(target.versions)}")
    return found


def _stand_in(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function or class as another object: what a user imported from us is not taken for a patched one."""

    @functools.wraps(function, updated=())
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return stand_in


def _replace(new_for: Mapping[int, Callable[..., Any]]) -> list[str]:
    changed = []
    for module_name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or module_name.partition(".")[0] == OURS:
            continue
        for name, value in list(vars(module).items()):
            if id(value) in new_for:
                setattr(module, name, new_for[id(value)])
                changed.append(f"{module_name}.{name}")
    return sorted(changed)
