"""How good probabilities are: accuracy, calibration, and whether they notice foreign inputs."""

from bayesian_lora_kernels.calibration.metrics import (
    accuracy,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    ood_auroc,
    predictive_entropy,
    summary,
)
from bayesian_lora_kernels.calibration.plots import (
    draw_reliability,
    reliability_diagram,
    reliability_diagrams,
    save_figure,
)
from bayesian_lora_kernels.calibration.reliability import ReliabilityBins, reliability_bins
from bayesian_lora_kernels.calibration.temperature import temperature_scale

__all__ = [
    "ReliabilityBins",
    "accuracy",
    "brier_score",
    "draw_reliability",
    "expected_calibration_error",
    "negative_log_likelihood",
    "ood_auroc",
    "predictive_entropy",
    "reliability_bins",
    "reliability_diagram",
    "reliability_diagrams",
    "save_figure",
    "summary",
    "temperature_scale",
]
