"""Laplace posteriors over LoRA weights: fast, correct, and usable as the engine of other packages."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayesian_lora_kernels import ops, plots
    from bayesian_lora_kernels.attribution.index import InfluenceIndex
    from bayesian_lora_kernels.attribution.scores import influence
    from bayesian_lora_kernels.config import LaplaceConfig
    from bayesian_lora_kernels.crossfitting.crossfit import crossfit
    from bayesian_lora_kernels.laplace import LaplaceLoRA
    from bayesian_lora_kernels.ops.dispatch import backends, set_default_impl
    from bayesian_lora_kernels.posterior.kronecker import KroneckerFactors, KroneckerPosterior
    from bayesian_lora_kernels.posterior.posterior import Posterior
    from bayesian_lora_kernels.posterior.prior import Prior
    from bayesian_lora_kernels.predictive.distribution import LogitPosterior
    from bayesian_lora_kernels.predictive.joint import joint_samples
    from bayesian_lora_kernels.predictive.scoring import TokenScores
    from bayesian_lora_kernels.predictive.selection import Selection, select_batch
    from bayesian_lora_kernels.predictive.vocabulary import VocabularyPosterior

__version__ = "0.2.0"

__all__ = [
    "InfluenceIndex",
    "KroneckerFactors",
    "KroneckerPosterior",
    "LaplaceConfig",
    "LaplaceLoRA",
    "LogitPosterior",
    "Posterior",
    "Prior",
    "Selection",
    "TokenScores",
    "VocabularyPosterior",
    "backends",
    "crossfit",
    "influence",
    "joint_samples",
    "ops",
    "patch",
    "plots",
    "select_batch",
    "set_default_impl",
    "unpatch",
]


# Where each name is. It is imported when it is first asked for: `blk --help` need not wait for PyTorch.
_PLACES = {
    "InfluenceIndex": "attribution.index",
    "KroneckerFactors": "posterior.kronecker",
    "KroneckerPosterior": "posterior.kronecker",
    "LaplaceConfig": "config",
    "LaplaceLoRA": "laplace",
    "LogitPosterior": "predictive.distribution",
    "Posterior": "posterior.posterior",
    "Prior": "posterior.prior",
    "Selection": "predictive.selection",
    "TokenScores": "predictive.scoring",
    "VocabularyPosterior": "predictive.vocabulary",
    "backends": "ops.dispatch",
    "crossfit": "crossfitting.crossfit",
    "influence": "attribution.scores",
    "joint_samples": "predictive.joint",
    "select_batch": "predictive.selection",
    "set_default_impl": "ops.dispatch",
}


def __getattr__(name: str) -> Any:
    if name in ("ops", "plots"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def patch(package: str) -> list[str]:
    """Let an installed package's functions be ours, everywhere: see `compat.patching.patch`."""
    from bayesian_lora_kernels.compat import patching

    return patching.patch(package)


def unpatch(package: str) -> list[str]:
    """Undo `patch`: see `compat.patching.unpatch`."""
    from bayesian_lora_kernels.compat import patching

    return patching.unpatch(package)
