"""The package's calibration. All calls into it are here.

Not connected yet: the package has no `calibrate` and no `crossfit`. What is to be filled in:

    laplace = LaplaceLoRA(model, task.forward, task.class_token_ids, curvature=curvature)
    laplace.fit(task.batches(splits.train), progress=False).optimize_prior_precision()
    laplace.predict(batch, differences=True)             # mean and covariance of the held-out, test and shift sets
    laplace.calibrate(task.batches(splits.held_out[:n]))  # for each n
    blk.crossfit(task.fine_tune, splits.train, folds=2, ...)

Defaults everywhere: nothing is chosen by what comes out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .tasks import Splits, Task

NAMES = ("laplace", "calibrated", "crossfit")


class NotConnectedError(RuntimeError):
    """This version of the package has no calibration."""


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
    """Probabilities of every method in `NAMES`, `calibrated` for each number of labels, the others for 0.

    Args:
        task: of the model.
        splits: its data.
        model: fine-tuned on all of `splits.train`.
        seed: of the fine-tuning, to be used for the folds too.
        labels: how many of the held-out labels are to be used.
        curvature: `exact` or `ekfac`.
    """
    raise NotConnectedError("the package's calibration is not connected to the study yet (method.py)")
