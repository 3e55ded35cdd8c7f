"""Likelihoods, by the names that `LaplaceConfig` and files know them under: one class for each."""

from bayesian_lora_kernels.curvature.likelihood.base import MAX_EXACT_COLUMNS, Likelihood
from bayesian_lora_kernels.curvature.likelihood.classification import Classification
from bayesian_lora_kernels.curvature.likelihood.comparisons import BradleyTerry, PlackettLuce
from bayesian_lora_kernels.curvature.likelihood.regression import Regression

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "classification": Classification,
    "regression": Regression,
    "bradley-terry": BradleyTerry,
    "plackett-luce": PlackettLuce,
}

__all__ = [
    "LIKELIHOODS",
    "MAX_EXACT_COLUMNS",
    "BradleyTerry",
    "Classification",
    "Likelihood",
    "PlackettLuce",
    "Regression",
]
