"""TFB: noise of one scale on LoRA's A, as much as the loss on the training set tolerates.

Source: Shi, Wang, Han, Zhang, Wang 2025, "Training-free Bayesianization for low-rank adapters of large language
models". With `B = U diag(s) V^T`, row i of `V^T A` gets noise of standard deviation `sigma / s_i`, so that the product
`B A` has that of `sigma` on every direction of U. One `sigma` serves all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.calibration import negative_log_likelihood

from ..tasks import Example, Task
from ..tasks.task import logits_of
from .case import SETS, Case, Outcome, measured, mutual_information

TOLERANCE = 0.003  # of the loss, relative: that of BayesAdapt
LOWEST, HIGHEST, STEPS = 1e-4, 1.0, 7  # to 8 %
SAMPLES = 10
TINY = 1e-6  # beside singular values


def settings(case: Case) -> dict[str, Any]:
    return {"tolerance": TOLERANCE, "range": [LOWEST, HIGHEST], "steps": STEPS, "samples": SAMPLES}


def run(case: Case) -> Outcome:
    """The largest sigma that is tolerated, and averages of the softmax over samples of the weights."""
    sigma, search = measured(lambda: largest_tolerated(case.task, case.model, case.splits.train, case.seed))

    def samples() -> dict[str, Tensor]:
        return {name: sampled(case.task, case.model, getattr(case.splits, name), sigma, case.seed) for name in SETS}

    found, predict = measured(samples)
    return Outcome(
        {name: each.mean(dim=0) for name, each in found.items()},
        {name: mutual_information(each) for name, each in found.items()},
        seconds={"fit": search.seconds, "predict": predict.seconds},
        mib=max(search.mib, predict.mib),
        facts={"sigma": sigma},
    )


def largest_tolerated(task: Task, model: nn.Module, anchor: Sequence[Example], seed: int) -> float:
    """Of the anchor's loss: bisection in log sigma."""
    labels = torch.tensor([example.label for example in anchor])
    plain = negative_log_likelihood(logits_of(task, model, anchor).softmax(dim=1), labels)

    def tolerated(sigma: float) -> bool:
        loss = negative_log_likelihood(sampled(task, model, anchor, sigma, seed).mean(dim=0), labels)
        return abs(loss - plain) <= TOLERANCE * plain

    return bisect(tolerated)


def bisect(tolerated: Callable[[float], bool]) -> float:
    """The largest sigma of the range that is tolerated, to `STEPS` halvings; the lowest is taken on trust."""
    low, high = math.log(LOWEST), math.log(HIGHEST)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if tolerated(math.exp(middle)) else (low, middle)
    return math.exp(low)


def sampled(task: Task, model: nn.Module, examples: Sequence[Example], sigma: float, seed: int) -> Tensor:
    """Probabilities `[S, N, C]` under samples of the weights; the same noise for every sigma."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(SAMPLES):
        with noisy(model, sigma, generator):
            rows.append(logits_of(task, model, examples).softmax(dim=1))
    return torch.stack(rows)


@contextmanager
def noisy(model: nn.Module, sigma: float, generator: torch.Generator) -> Iterator[None]:
    """A sample of the weights, while it lasts."""
    from peft.tuners.lora import LoraLayer

    kept = []
    try:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    for name in module.lora_A:
                        a, b = module.lora_A[name].weight, module.lora_B[name].weight
                        _, s, vt = torch.linalg.svd(b, full_matrices=False)
                        noise = torch.randn(len(s), a.shape[1], generator=generator, dtype=a.dtype)
                        kept.append((a, a.clone()))
                        a += vt.T @ (sigma / (s[:, None] + TINY) * noise)
        yield
    finally:
        with torch.no_grad():
            for a, before in kept:
                a.copy_(before)
