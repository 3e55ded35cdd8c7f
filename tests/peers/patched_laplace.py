"""A pytest plugin (`-p patched_laplace`) under which laplace-torch's curvlinops backends are ours.

Its tests import a model of torchvision that none of those which run uses; torchvision would bring another PyTorch.
"""

import sys
from importlib.util import find_spec
from types import ModuleType

import laplace.baselaplace
import laplace.curvature
import laplace.curvature.curvlinops

from bayesian_lora_kernels.compat.laplace_torch import BlkEF, BlkGGN

for _module in (laplace.baselaplace, laplace.curvature, laplace.curvature.curvlinops):
    for _name, _backend in (("CurvlinopsGGN", BlkGGN), ("CurvlinopsEF", BlkEF)):
        if hasattr(_module, _name):
            setattr(_module, _name, _backend)

if find_spec("torchvision") is None:
    _stub = ModuleType("torchvision.models")
    _stub.wide_resnet50_2 = None  # type: ignore[attr-defined]
    sys.modules["torchvision"] = ModuleType("torchvision")
    sys.modules["torchvision.models"] = _stub
