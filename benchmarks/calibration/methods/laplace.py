"""Laplace: over the last layer, as published, and as this package has it. All calls into the package are here."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bayesian_lora_kernels import LaplaceLoRA, LogitPosterior, crossfit
from bayesian_lora_kernels.predictive.calibrate import Calibration

from ..files import write_tensors
from ..labels.method import joined
from ..tasks import Example
from ..tasks.task import cpu_seconds, digest
from .case import SETS, Case, Cost, Outcome, measured, mutual_information

FOLDS = 2
SAMPLES = 1024
KINDS = ("last layer", "published", "ekfac", "exact")
LORA = r".*\.lora_[AB]\..*"
PUBLISHED_RANK = 10


def settings(kind: str, case: Case) -> dict[str, Any]:
    """Of `LaplaceLoRA`.

    `published` is Yang, Robeyns, Wang, Aitchison 2024, "Bayesian low-rank adaptation for large language models": LoRA's
    weights, K-FAC, ten columns of each factor as wide as the model and nothing for the rest, the last token (where the
    answer is read; an encoder has no such token, and there all of them count).
    """
    if kind == "last layer":
        return {"curvature": "exact", "modules": case.task.last_layer}
    if kind == "published":
        tokens = "expand" if case.task.class_token_ids is None else "last"
        low_rank = {"rank": PUBLISHED_RANK, "rank_threshold": 2 * PUBLISHED_RANK, "tail": False}
        return {"curvature": "kfac", "modules": LORA, "tokens": tokens, **low_rank}
    return {"curvature": kind}


@dataclass(frozen=True)
class Posterior:
    """What a fit predicts under the prior of the evidence.

    Attributes:
        predicted: `{set: ...}`.
        calibration: by the held-out labels.
        costs: of `fit`, `labels` and `predict`.
        facts: the prior precision, and more.
    """

    predicted: dict[str, LogitPosterior]
    calibration: Calibration
    costs: dict[str, Cost]
    facts: dict[str, Any]

    def outcome(self, probs: dict[str, Tensor], seconds: dict[str, float] | None = None, **others: Any) -> Outcome:
        """With the costs of fit and predictions, and others."""
        seconds = {name: self.costs[name].seconds for name in ("fit", "predict")} | (seconds or {})
        mib = max(self.costs[name].mib for name in ("fit", "predict"))
        return Outcome(probs, seconds=seconds, mib=mib, **{"facts": self.facts, **others})


def evidence(kind: str, case: Case) -> Outcome:
    """No label but those of the training set. As published: the average of the softmax over samples of the logits."""
    posterior = fitted(kind, case)
    generator = torch.Generator().manual_seed(case.seed)
    method = "mc" if kind == "published" else "pairwise"
    probs = {
        name: one.probs(method, SAMPLES, generator=generator, calibrated=False)
        for name, one in posterior.predicted.items()
    }
    information = {
        name: mutual_information(one.sample(SAMPLES, generator).softmax(dim=-1))
        for name, one in posterior.predicted.items()
    }
    return posterior.outcome(probs, mutual_information=information)


def by_labels(kind: str, case: Case) -> Outcome:
    """Calibrated by the held-out labels."""
    posterior = fitted(kind, case)
    points = {"effective points": posterior.calibration.effective_points["pairwise"]}
    return posterior.outcome(
        _calibrated(posterior, posterior.calibration),
        {"labels": posterior.costs["labels"].seconds},
        facts=posterior.facts | points,
    )


def crossfitted(kind: str, case: Case) -> Outcome:
    """Calibrated by folds of the training set. Training of their models counts, and that of the whole one does not."""
    posterior, task, train = fitted(kind, case), case.task, case.splits.train
    parts: list[Sequence[Example]] = []
    tuning = 0.0

    def fine_tune(part: Sequence[Example]) -> nn.Module:
        nonlocal tuning
        start = time.process_time()
        model = task.fine_tune(part, case.seed)
        tuning += time.process_time() - start
        parts.append(part)
        return model

    start = time.process_time()
    calibration = crossfit(
        fine_tune,
        train,
        FOLDS,
        collate=task.collate,
        batch_size=task.batch_size,
        labels=[example.label for example in train],
        groups=[example.source for example in train],
        forward=task.forward,
        class_token_ids=task.class_token_ids,
        progress=False,
        **settings(kind, case),
    ).calibration
    assert calibration is not None
    beyond = time.process_time() - start - tuning - posterior.costs["fit"].seconds  # of all data, which counts already
    folds = (calibration.report or {})["folds"]
    facts = {"folds": [{name: fold[name] for name in ("n_train", "accuracy", "nll_map")} for fold in folds]}
    return posterior.outcome(
        _calibrated(posterior, calibration),
        {
            "fine-tuning": sum(cpu_seconds(task.tuned(part, case.seed)) for part in parts[:FOLDS]),
            "labels": max(0.0, beyond),
        },
        facts=posterior.facts | facts,
    )


def fitted(kind: str, case: Case) -> Posterior:
    """The posterior of the plain model; one that was fitted before is read from the cache."""
    options = settings(kind, case)
    described = [options, case.data, case.task.tuned(case.splits.train, case.seed).name]
    path = case.task.cache / case.task.name / f"posterior-{digest(described)}.safetensors"
    if not path.exists():
        _keep(path, case, options)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        about = json.loads(file.metadata()["about"])
    predicted = {
        name: LogitPosterior(tensors[f"{name}/mean"], tensors[f"{name}/covariance"], differences=True) for name in SETS
    }
    costs = {name: Cost(**cost) for name, cost in about["costs"].items()}
    return Posterior(predicted, Calibration.from_json(about["calibration"]), costs, about["facts"])


def _keep(path: Any, case: Case, options: dict[str, Any]) -> None:
    task, splits = case.task, case.splits
    laplace = LaplaceLoRA(case.model, task.forward, task.class_token_ids, **options)
    batches = task.batches(splits.train)
    costs: dict[str, Cost] = {}
    _, costs["fit"] = measured(lambda: laplace.fit(batches, progress=False).optimize_prior_precision())
    predicted, costs["predict"] = measured(
        lambda: {name: joined(laplace, task, getattr(splits, name)) for name in SETS}
    )
    held_out = task.batches(splits.held_out)
    _, costs["labels"] = measured(lambda: laplace.calibrate(held_out, progress=False))
    assert laplace.calibration is not None
    about = {
        "calibration": laplace.calibration.as_json(),
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "facts": {
            "prior precision": float(laplace.prior[laplace.layers[0].name]),
            "variance scale": laplace.variance_scale,
            "layers": len(laplace.layers),
        },
    }
    tensors = {f"{name}/mean": one.mean for name, one in predicted.items()}
    tensors |= {f"{name}/covariance": one.covariance for name, one in predicted.items()}
    write_tensors(path, tensors, {"about": json.dumps(about)})


def _calibrated(posterior: Posterior, calibration: Calibration) -> dict[str, Tensor]:
    return {name: replace(one, calibration=calibration).probs() for name, one in posterior.predicted.items()}
