"""Pictures, for a README or a paper: PNG, SVG or PDF. matplotlib is imported when one is drawn."""

from bayesian_lora_kernels.plots.curves import curve_diagram
from bayesian_lora_kernels.plots.logits import logit_diagram
from bayesian_lora_kernels.plots.posterior import (
    evidence_diagram,
    factor_diagram,
    layer_diagram,
    posterior_diagram,
    spectrum_diagram,
)
from bayesian_lora_kernels.plots.reliability import (
    draw_reliability,
    reliability_diagram,
    reliability_diagrams,
    risk_coverage_diagram,
)
from bayesian_lora_kernels.plots.style import save_figure

__all__ = [
    "curve_diagram",
    "draw_reliability",
    "evidence_diagram",
    "factor_diagram",
    "layer_diagram",
    "logit_diagram",
    "posterior_diagram",
    "reliability_diagram",
    "reliability_diagrams",
    "risk_coverage_diagram",
    "save_figure",
    "spectrum_diagram",
]
