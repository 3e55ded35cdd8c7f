"""What people use: the plain model, temperatures, MC dropout, ensembles."""

from __future__ import annotations

import time
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.calibration import temperature_scale

from ..labels.baselines import scaled
from ..tasks.task import logits_of
from .case import SETS, Case, Cost, Outcome, measured, mutual_information

DROPOUT, PASSES = 0.1, 10
MEMBERS = 5
NEXT_MEMBER = 1000  # seeds of members are so far apart: no other case has them


def plain(case: Case) -> Outcome:
    """The softmax of the fine-tuned model's logits."""
    logits, cost = case.logits
    probs = {name: values.softmax(dim=1) for name, values in logits.items()}
    return Outcome(probs, seconds={"predict": cost.seconds}, mib=cost.mib)


def tempered(name: str, case: Case) -> Outcome:
    """By held-out labels: `temperature` (Guo et al. 2017), or `averaged temperatures`, which has a prior."""
    logits, predict = case.logits
    held_out, asked = case.held_out_logits
    start = time.process_time()
    probs = scaled(held_out, case.labels("held_out"), logits)[name]
    seconds = {"labels": asked.seconds + time.process_time() - start, "predict": predict.seconds}
    facts = {"temperature": temperature_scale(held_out, case.labels("held_out"))} if name == "temperature" else {}
    return Outcome(probs, seconds=seconds, mib=max(predict.mib, asked.mib), facts=facts)


def dropout_settings(case: Case) -> dict[str, Any]:
    return {"dropout": DROPOUT, "passes": PASSES}


def dropout(case: Case) -> Outcome:
    """A model trained with dropout of the adapter's inputs, averaged over passes in training mode.

    Source: Gal, Ghahramani 2016, "Dropout as a Bayesian approximation".
    """
    model, training = case.fine_tuned(dropout=DROPOUT)
    model.train()
    torch.manual_seed(case.seed)

    def samples() -> dict[str, Tensor]:
        passes = range(PASSES)
        return {
            name: torch.stack([logits_of(case.task, model, getattr(case.splits, name)).softmax(1) for _ in passes])
            for name in SETS
        }

    found, cost = measured(samples)
    seconds = {"fine-tuning": training, "predict": cost.seconds}
    return _averaged(found, seconds=seconds, mib=cost.mib)


def ensemble_settings(case: Case) -> dict[str, Any]:
    return {"members": MEMBERS, "seeds": [case.seed + NEXT_MEMBER * number for number in range(MEMBERS)]}


def ensemble(case: Case, by_labels: bool = False) -> Outcome:
    """The mean of the probabilities of models that were trained on the same data with other seeds.

    Source: Lakshminarayanan, Pritzel, Blundell 2017, "Simple and scalable predictive uncertainty estimation".

    Args:
        case: whose plain model is the first member.
        by_labels: whether the mean gets a temperature by the held-out labels.
    """
    samples, training, costs = _members(case)
    seconds = {"fine-tuning": training, "predict": sum(cost.seconds for name in SETS for cost in costs[name])}
    mib = max(cost.mib for each in costs.values() for cost in each)
    if not by_labels:
        return _averaged({name: samples[name] for name in SETS}, seconds=seconds, mib=mib)
    logs = {name: each.mean(dim=0).clamp_min(torch.finfo(each.dtype).tiny).log() for name, each in samples.items()}
    held_out = logs.pop("held_out")
    start = time.process_time()
    probs = scaled(held_out, case.labels("held_out"), logs)["temperature"]
    seconds["labels"] = sum(cost.seconds for cost in costs["held_out"]) + time.process_time() - start
    facts = {"temperature": temperature_scale(held_out, case.labels("held_out"))}
    return Outcome(probs, seconds=seconds, mib=mib, facts=facts)


@lru_cache(maxsize=1)
def _members(case: Case) -> tuple[dict[str, Tensor], float, dict[str, list[Cost]]]:
    """Probabilities `{set: [members, N, C]}`, seconds of all fine-tunings but the first, and what predictions cost."""
    probs: dict[str, list[Tensor]] = {name: [] for name in ("held_out", *SETS)}
    costs: dict[str, list[Cost]] = {name: [] for name in probs}
    training = 0.0
    for number, seed in enumerate(ensemble_settings(case)["seeds"]):
        model, seconds = case.fine_tuned(seed)
        training += seconds if number else 0.0
        for name in probs:
            logits, cost = measured(partial(logits_of, case.task, model, getattr(case.splits, name)))
            probs[name].append(logits.softmax(dim=1))
            costs[name].append(cost)
    return {name: torch.stack(each) for name, each in probs.items()}, training, costs


def _averaged(samples: dict[str, Tensor], **others: Any) -> Outcome:
    """Of probabilities `{set: [S, N, C]}`."""
    probs = {name: each.mean(dim=0) for name, each in samples.items()}
    return Outcome(probs, {name: mutual_information(each) for name, each in samples.items()}, **others)
