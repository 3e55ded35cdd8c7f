"""A pytest plugin (`-p patched_bayesian_lora`) under which bayesian_lora's functions are ours."""

import bayesian_lora_kernels as blk

PATCHED = blk.patch("bayesian_lora")
