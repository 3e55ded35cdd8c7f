"""The dtypes that the Triton kernels take."""

from __future__ import annotations

import torch
import triton.language as tl

# Triton's type of each.
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
