"""Other packages' interfaces, answered with this package's engine: nothing here computes what the engine does not.

Each module is imported on its own, so that importing `bayesian_lora_kernels` needs none of the other packages:
`compat.bayesian_lora`, `compat.laplace_torch` (needs laplace-torch), `compat.laplace_lora`.
"""
