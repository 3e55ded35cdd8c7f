"""The methods that the demo compares, each with its predictions of every set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.calibration import temperature_scale
from bayesian_lora_kernels.demo.settings import DemoSettings
from bayesian_lora_kernels.demo.task import Splits, Task, in_order
from bayesian_lora_kernels.demo.training import class_logits
from bayesian_lora_kernels.laplace import LaplaceLoRA

NAMES = {
    "map": "MAP",
    "temperature": "temperature scaling",
    "kfac": "Laplace, K-FAC",
    "ekfac": "Laplace, EKFAC",
    "exact": "Laplace, exact GGN",
    "ekfac_labels": "Laplace, EKFAC, labels",  # the prior precision by held-out labels, those of the temperature
}
LAPLACE = ("kfac", "ekfac", "exact")
SETS = ("test", "shift", "foreign")

# Both are measured; the first is what the table shows: it needs no random numbers. Which of them predicts better
# depends on the model; the JSON file has both.
PREDICTIVES = ("probit", "mc")


@dataclass(frozen=True)
class Outcome:
    """One method's predictions.

    Attributes:
        probs: `{set: [N, C]}`.
        by_sampling: the same by Monte-Carlo averaging; empty where there is no posterior.
        chosen: what was tuned: a temperature or a prior precision.
        evidence: log marginal likelihood at that precision, or None.
        seconds: that fitting, tuning and predicting took.
    """

    probs: dict[str, Tensor]
    by_sampling: dict[str, Tensor]
    chosen: float | None
    evidence: float | None
    seconds: float


def compare_methods(
    model: nn.Module,
    task: Task,
    splits: Splits,
    settings: DemoSettings,
    seed: int,
    watch: Callable[[str], None] = lambda name: None,
) -> dict[str, Outcome]:
    """Every method of `NAMES` on one fine-tuned model.

    Args:
        model: fine-tuned.
        task: for its tokens.
        splits: `train` is for the curvature, `held_out` for the temperature and for the prior precision of the one
            method that uses labels, the rest is predicted.
        settings: sizes.
        seed: of Monte-Carlo averaging.
        watch: is told the name of a method when its turn comes.
    """
    outcomes = {}
    watch(NAMES["map"])
    start = perf_counter()
    logits = {name: _logits(model, task, splits, name, settings) for name in SETS}
    probs = {name: values.softmax(dim=-1) for name, values in logits.items()}
    outcomes["map"] = Outcome(probs, {}, None, None, perf_counter() - start)

    watch(NAMES["temperature"])
    start = perf_counter()
    labels = torch.tensor([example.answer for example in splits.held_out])
    temperature = temperature_scale(_logits(model, task, splits, "held_out", settings), labels)
    probs = {name: (values / temperature).softmax(dim=-1) for name, values in logits.items()}
    outcomes["temperature"] = Outcome(probs, {}, temperature, None, perf_counter() - start)

    for curvature in LAPLACE:
        watch(NAMES[curvature])
        start = perf_counter()
        laplace = _fit(model, task, splits, settings, curvature, seed)
        laplace.optimize_prior_precision()
        outcomes[curvature] = _outcome(laplace, splits, settings, seed, start)
        if curvature == "ekfac":
            watch(NAMES["ekfac_labels"])
            start = perf_counter()
            held_out = in_order(splits.held_out, settings.predict_batch_size)
            laplace.optimize_prior_precision("nll", val_loader=held_out)
            outcomes["ekfac_labels"] = _outcome(laplace, splits, settings, seed, start)
    return outcomes


def _logits(model: nn.Module, task: Task, splits: Splits, name: str, settings: DemoSettings) -> Tensor:
    model.eval()
    with torch.no_grad():
        batches = in_order(getattr(splits, name), settings.predict_batch_size)
        return torch.cat([class_logits(model, batch, task.class_token_ids) for batch in batches])


def _fit(
    model: nn.Module, task: Task, splits: Splits, settings: DemoSettings, curvature: str, seed: int
) -> LaplaceLoRA:
    """Curvature from the training set: no label beyond those of the fine-tuning."""
    laplace = LaplaceLoRA(model, class_token_ids=task.class_token_ids, curvature=curvature, seed=seed)
    return laplace.fit(in_order(splits.train, settings.predict_batch_size), progress=False)


def _outcome(laplace: LaplaceLoRA, splits: Splits, settings: DemoSettings, seed: int, start: float) -> Outcome:
    generator = torch.Generator().manual_seed(seed)
    probs: dict[str, dict[str, Tensor]] = {method: {} for method in PREDICTIVES}
    for name in SETS:
        posteriors = [laplace.predict(b) for b in in_order(getattr(splits, name), settings.predict_batch_size)]
        for method in PREDICTIVES:
            probs[method][name] = torch.cat(
                [p.probs(method, n_samples=settings.samples, generator=generator) for p in posteriors]
            )
    precision = laplace.prior_precision
    assert isinstance(precision, Tensor)  # one for all modules
    return Outcome(
        probs["probit"], probs["mc"], float(precision), float(laplace.log_marginal_likelihood()), perf_counter() - start
    )
