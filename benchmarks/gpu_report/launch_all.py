"""Every kernel once at a small shape: what compute-sanitizer watches. `python -m benchmarks.gpu_report.launch_all`"""

from __future__ import annotations

import sys

import torch

from benchmarks.cases import all_cases, interpretable


def launch_all(device: torch.device) -> list[str]:
    """Names of what was launched: the package's own kernels of every case, tiny, against the truth."""
    launched = []
    for case in all_cases():
        small = interpretable(case.dry())
        for provider in small.providers(device):
            if provider.absent or not provider.name.startswith(("triton", "native")):
                continue
            inputs = small.inputs(device, seed=0)
            truth = small.truth(inputs)
            error = small.error(truth, provider.comparable(provider.call(inputs)))
            if not error <= small.tolerance:
                raise RuntimeError(f"{case.name}, {provider.name}: error {error:.2e}, allowed {small.tolerance:.0e}")
            launched.append(f"{case.name}, {provider.name}")
    return launched


if __name__ == "__main__":
    names = launch_all(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
    print("\n".join(names), f"launched {len(names)}", sep="\n")
