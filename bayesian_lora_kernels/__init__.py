"""Laplace posteriors over LoRA weights: fast, correct, and usable as the engine of other packages."""

from __future__ import annotations

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.crossfitting.crossfit import crossfit
from bayesian_lora_kernels.laplace import LaplaceLoRA
from bayesian_lora_kernels.ops.dispatch import backends, set_default_impl
from bayesian_lora_kernels.posterior.kronecker import KroneckerFactors, KroneckerPosterior
from bayesian_lora_kernels.posterior.posterior import Posterior
from bayesian_lora_kernels.posterior.prior import Prior
from bayesian_lora_kernels.predictive.distribution import LogitPosterior
from bayesian_lora_kernels.predictive.scoring import TokenScores
from bayesian_lora_kernels.predictive.vocabulary import VocabularyPosterior

__version__ = "0.1.0"

__all__ = [
    "KroneckerFactors",
    "KroneckerPosterior",
    "LaplaceConfig",
    "LaplaceLoRA",
    "LogitPosterior",
    "Posterior",
    "Prior",
    "TokenScores",
    "VocabularyPosterior",
    "backends",
    "crossfit",
    "ops",
    "patch",
    "set_default_impl",
    "unpatch",
]


def patch(package: str) -> list[str]:
    """Let an installed package's functions be ours, everywhere: see `compat.patching.patch`."""
    from bayesian_lora_kernels.compat import patching

    return patching.patch(package)


def unpatch(package: str) -> list[str]:
    """Undo `patch`: see `compat.patching.unpatch`."""
    from bayesian_lora_kernels.compat import patching

    return patching.unpatch(package)
