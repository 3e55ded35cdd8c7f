"""The package's calibration, with its defaults. All calls into it are here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora_kernels import LaplaceLoRA, LogitPosterior, crossfit
from bayesian_lora_kernels.predictive.calibrate import Calibration

from ..tasks import Splits, Task

FOLDS = 2
METHODS = ("pairwise", "scalar")


@dataclass(frozen=True)
class Found:
    """What the package makes of one model.

    Attributes:
        probs: `{method: {labels used: {split: [N, C]}}}`, for the test and the shift set.
        tensors: to be kept beside them, such as `test/covariance`.
        facts: numbers, such as the prior precision and seconds.
    """

    probs: dict[str, dict[int, dict[str, Tensor]]]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def predict(task: Task, splits: Splits, model: nn.Module, seed: int, labels: Sequence[int], curvature: str) -> Found:
    """Probabilities by held-out labels, as many as are asked for, by cross-fitting, and by the evidence alone.

    Args:
        task: of the model.
        splits: its data.
        model: fine-tuned on all of `splits.train`.
        seed: of the fine-tuning, also of the folds'.
        labels: how many of the held-out labels are to be used.
        curvature: `exact` or `ekfac`.
    """
    options: dict[str, Any] = {"curvature": curvature, "class_token_ids": task.class_token_ids}
    start = perf_counter()
    laplace = LaplaceLoRA(model, task.forward, **options).fit(task.batches(splits.train), progress=False)
    laplace.optimize_prior_precision()
    fitted = perf_counter() - start
    predicted = {name: joined(laplace, task, getattr(splits, name)) for name in ("test", "shift")}
    everything = perf_counter() - start

    probs: dict[str, dict[int, dict[str, Tensor]]] = {"laplace evidence": {0: _probs(predicted, None)}}
    facts: dict[str, Any] = {
        "prior_precision": float(laplace.prior[laplace.layers[0].name]),
        "variance_scale": laplace.variance_scale,
        "seconds": {"fit": fitted, "predict": everything - fitted},
        "effective_points": {},
    }
    for n in labels:
        found = laplace.calibrate(task.batches(splits.held_out[:n]), progress=False).calibration
        assert found is not None
        facts["effective_points"][n] = found.effective_points
        for name in METHODS:
            probs.setdefault(f"laplace {name}", {})[n] = _probs(predicted, found, name)

    crossed = crossfit(
        lambda part: task.fine_tune(part, seed),
        splits.train,
        FOLDS,
        collate=task.collate,
        batch_size=32,
        labels=[example.label for example in splits.train],
        groups=[example.source for example in splits.train],
        forward=task.forward,
        progress=False,
        **options,
    ).calibration
    assert crossed is not None
    facts["crossfit"] = dict(crossed.report or {})
    for name in METHODS:
        probs[f"laplace {name}, {FOLDS} folds"] = {0: _probs(predicted, crossed, name)}
    tensors = {f"{name}/covariance": one.covariance for name, one in predicted.items()}
    return Found(probs, tensors, facts)


def joined(laplace: LaplaceLoRA, task: Task, examples: list[Any]) -> LogitPosterior:
    """Differences of logits of all examples."""
    parts = [laplace.predict(batch, differences=True) for batch in task.batches(examples)]
    return replace(
        parts[0],
        mean=torch.cat([part.mean for part in parts]).double(),
        covariance=torch.cat([part.covariance for part in parts]).double(),
    )


def _probs(
    predicted: dict[str, LogitPosterior], calibration: Calibration | None, method: str = "pairwise"
) -> dict[str, Tensor]:
    return {name: replace(one, calibration=calibration).probs(method) for name, one in predicted.items()}
