"""What a stream of 64 columns loses against one of 74 at rank 32: `python -m benchmarks.stream_columns`.

Error of the leading 32 columns over the best possible error of that rank, the worst of three seeds, for streams of 16
batches of 1,024 rows of width 512 in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bayesian_lora_kernels import ops

WIDTH, ROWS, BATCHES, RANK, FRESH = 512, 1024, 16, 32, 10
KINDS = {"1/i": 1.0, "1/sqrt(i)": 0.5, "1/i^2": 2.0, "flat": 0.0, "massive activations": 1.0, "drift": 1.0}


def stream(kind: str, seed: int) -> Iterator[Tensor]:
    """Batches `[ROWS, WIDTH]` whose second moments have the spectrum of a kind, in directions that drift if it does."""
    state = torch.Generator().manual_seed(seed)
    deviation = torch.arange(1, WIDTH + 1).float().pow(-KINDS[kind] / 2)
    axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=state)).Q
    for batch in range(BATCHES):
        if kind == "drift" and batch and batch % (BATCHES // 3 + 1) == 0:
            axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=state)).Q
        x = torch.randn(ROWS, WIDTH, generator=state) * deviation @ axes.T
        if kind == "massive activations":
            x[3] += (1e6 * ROWS * deviation[RANK - 1] ** 2).sqrt() * axes[:, 0]
        yield x


def excess(kind: str, columns: int, seed: int) -> float:
    """The error over the best possible."""
    state, basis = torch.Generator().manual_seed(seed), None
    total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for x in stream(kind, seed):
        basis = ops.incremental_svd(basis, x, columns=columns, fresh=FRESH, generator=state, impl="reference")
        total += x.double().T @ x.double()
    assert basis is not None
    leading = basis[:, :RANK].double()
    best = torch.linalg.eigvalsh(total)[:-RANK].norm()
    return float((total - leading @ leading.T).norm() / best)


def main() -> None:
    print("| spectrum | 74 columns | 64 columns |\n|---|---|---|")
    for kind in KINDS:
        cells = [f"{max(excess(kind, columns, seed) for seed in range(3)):.4f}" for columns in (74, 64)]
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
