"""From a loader to the curvature: passes over the data, likelihoods, and the kinds of curvature that come along."""

from bayesian_lora_kernels.curvature.kfac import EigenvalueCorrectedCurvature, KroneckerCurvature  # isort: skip
from bayesian_lora_kernels.curvature.exact import FunctionSpaceCurvature

__all__ = ["EigenvalueCorrectedCurvature", "FunctionSpaceCurvature", "KroneckerCurvature"]
