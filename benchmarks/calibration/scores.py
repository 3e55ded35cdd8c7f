"""How good probabilities are."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesian_lora_kernels.calibration import summary

HIGHER_IS_BETTER = {"nll": False, "ece": False, "ece_adaptive": False, "error_auroc": True, "accuracy": True}
METRICS = tuple(HIGHER_IS_BETTER)


def scores(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Every metric; `error_auroc` is NaN if all predictions are right, or all wrong."""
    found = summary(probs, labels)
    return {name: found[name] for name in (*METRICS, "ece_debiased", "aurc", "brier")}


def labels_of(examples: list) -> Tensor:
    return torch.tensor([example.label for example in examples])
