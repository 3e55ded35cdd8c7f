"""How good probabilities are: accuracy, calibration, and whether they notice errors and foreign inputs."""

from typing import Any

from bayesian_lora_kernels.calibration.comparison import PairedDifference, paired_difference
from bayesian_lora_kernels.calibration.debiased import (
    CalibrationInterval,
    adaptive_calibration_error,
    calibration_error_interval,
    debiased_calibration_error,
)
from bayesian_lora_kernels.calibration.metrics import (
    accuracy,
    brier_score,
    error_auroc,
    expected_calibration_error,
    negative_log_likelihood,
    ood_auroc,
    predictive_entropy,
    summary,
)
from bayesian_lora_kernels.calibration.reliability import ReliabilityBins, reliability_bins
from bayesian_lora_kernels.calibration.selective import RiskCoverage, risk_coverage
from bayesian_lora_kernels.calibration.temperature import temperature_scale

__all__ = [
    "CalibrationInterval",
    "PairedDifference",
    "ReliabilityBins",
    "RiskCoverage",
    "accuracy",
    "adaptive_calibration_error",
    "brier_score",
    "calibration_error_interval",
    "debiased_calibration_error",
    "error_auroc",
    "expected_calibration_error",
    "negative_log_likelihood",
    "ood_auroc",
    "paired_difference",
    "predictive_entropy",
    "reliability_bins",
    "risk_coverage",
    "summary",
    "temperature_scale",
]

_DIAGRAMS = ("draw_reliability", "reliability_diagram", "reliability_diagrams", "risk_coverage_diagram", "save_figure")


def __getattr__(name: str) -> Any:
    """Diagrams by the names that they had here before `plots` was there."""
    if name not in _DIAGRAMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bayesian_lora_kernels import plots

    return getattr(plots, name)
