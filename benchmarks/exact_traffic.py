"""What the processes of an exact fit hold and send, modelled and measured: `python -m benchmarks.exact_traffic`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed import ProcessGroup

from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.curvature.passes import Passes, fit_curvature
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.forward import Forward
from bayesian_lora_kernels.model.layers import find_layers
from bayesian_lora_kernels.posterior.posterior import Posterior
from bayesian_lora_kernels.posterior.prior import Prior
from bayesian_lora_kernels.predictive.logits import LogitPredictor
from bayesian_lora_kernels.processes import Processes

from .traffic import LINKS, MODELS, Chain, run

ROWS, EXAMPLES, ITEMSIZE = 1000, 8, 2  # of the table: two classes, so that each example is one row, in bfloat16
STRETCHES = ("fit", "evidence by module", "prediction", "samples", "saving")


def sent(
    size: int, own: int, rows: int, columns: int, itemsize: int, layers: int, mine: int, all_of: int
) -> list[float]:
    """Bytes that one of `size` processes sends in each of `STRETCHES`.

    Args:
        size: how many there are.
        own: rows that this one measured.
        rows: those of all.
        columns: weights of the posterior.
        itemsize: bytes of a stored number.
        layers: of the posterior.
        mine: rows of the Jacobian of this one's batch, examples times logits; and as many samples.
        all_of: those of everybody's batches.
    """
    others = (size - 1) / size
    return [
        others * (own * columns * itemsize + 2 * 8 * rows**2),
        others * 2 * 8 * layers * rows**2,
        others * 8 * mine * columns + 8 * (all_of - mine) * rows,
        others * 8 * mine * (2 * rows + columns),
        rows * columns * itemsize / size,
    ]


def modelled() -> Iterator[str]:
    """A table for large models."""
    yield "| model | GPUs | rows held | sent at the end of the fit | at IB | sent in a prediction | at NVLink | at IB |"
    yield "|---|---|---|---|---|---|---|---|"
    fast, slow = LINKS.values()
    for name, layers in MODELS.items():
        columns = sum(one.d_out * one.d_in for one in layers)
        for size in (8, 64):
            own = ROWS // size
            fit, _, prediction, *_ = sent(size, own, ROWS, columns, ITEMSIZE, 0, EXAMPLES, EXAMPLES * size)
            held = ROWS * columns * ITEMSIZE / size
            yield (
                f"| {name} | {size} | {held / 1e9:.1f} GB | {fit / 1e9:.2f} GB | {1e3 * fit / slow:.0f} ms | "
                f"{prediction / 1e9:.2f} GB | {1e3 * prediction / fast:.0f} ms | {1e3 * prediction / slow:.0f} ms |"
            )


def measured(group: ProcessGroup, batches: int) -> tuple[list[int], list[float]]:
    """Bytes that this process sends, and those of the model; its 24 examples come in so many batches."""
    torch.manual_seed(0)
    model, processes, examples, mine = Chain(), Processes(group), 24, 4
    config = LaplaceConfig(curvature="exact", fisher="empirical", check="off")
    generator = torch.Generator().manual_seed(processes.rank)
    x, y = torch.randn(examples, 300, generator=generator), torch.randint(0, 3, (examples,), generator=generator)
    loader = [*zip(x.chunk(batches), y.chunk(batches), strict=True)]
    forward, layers = Forward(model, None, None, True, config.check), find_layers(model)
    totals = [0]
    curvature: Any = fit_curvature(Passes(model, layers, forward, loader, config, False, processes)).curvature
    totals.append(processes.sent)
    curvature.logdet(Prior({layer.name: 1.0 + i for i, layer in enumerate(layers)}))
    totals.append(processes.sent)
    posterior = Posterior(curvature, Prior(1.0))
    LogitPredictor(model, layers, forward, True, None).predict(Batch.of((x[:mine], None)), [0], [posterior])
    totals.append(processes.sent)
    posterior.sample(mine)
    totals.append(processes.sent)
    for name in curvature.store.names:
        curvature.store.rows(name)
    totals.append(processes.sent)
    n, columns = examples * processes.size, curvature.store.n_columns
    model_of_it = sent(processes.size, examples, n, columns, 4, len(layers), mine, mine * processes.size)
    return [after - before for before, after in itertools.pairwise(totals)], model_of_it


def _rows(group: ProcessGroup) -> None:
    for batches in (2, 12):
        found, expected = measured(group, batches)
        for what, one, other in zip(STRETCHES, found, expected, strict=True):
            if Processes(group).rank == 0:
                print(f"| {Processes(group).size} | {batches} | {what} | {one} | {other:.0f} | {one / other:.3f} |")


def main() -> None:
    print("\n".join(modelled()))
    print("\n| processes | batches of each | what | bytes sent | modelled | ratio |\n|---|---|---|---|---|---|")
    for size in (2, 3):
        run(_rows, size)


if __name__ == "__main__":
    main()
