"""From a loader to the curvature: passes over the data, likelihoods, and the kinds of curvature that come along."""

from bayesian_lora_kernels.curvature.kfac import EigenvalueCorrectedCurvature, KroneckerCurvature  # isort: skip
from bayesian_lora_kernels.curvature.exact import FunctionSpaceCurvature
from bayesian_lora_kernels.posterior.curvature import CURVATURES

__all__ = ["CURVATURES", "EigenvalueCorrectedCurvature", "FunctionSpaceCurvature", "KroneckerCurvature"]
