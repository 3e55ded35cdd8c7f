"""Laplace as the Bayesian Adaptation Gym has it, through `compat.laplace_lora`, and with the scale corrected.

K-FAC of LoRA's weights with full factors, one prior precision by the evidence, averages of the softmax over samples of
the logits. The head has a row for each class and runs at every position, as its trainer has it. `published` divides A
by examples in place of tokens, and lets padding into it (docs/bayes-adapt.md).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora_kernels import LogitPosterior
from bayesian_lora_kernels.compat.laplace_lora import Laplace

from ..tasks import Task
from ..tasks.causal import NextToken
from .case import SETS, Case, Outcome, measured, mutual_information

SAMPLES = 1024
SCALES = {"published": {"scale": "published"}, "correct": {"rank": None}}


class Wrapped(nn.Module):
    """A copy of the model of a task, with keywords in and logits `[N, C]` of the classes out.

    Of a causal LM's head it has the rows of the classes, and no others.
    """

    def __init__(self, task: Task, model: nn.Module):
        super().__init__()
        self.task, self.model = task, copy.deepcopy(model)
        if isinstance(task, NextToken):
            _keep_rows(self.model, list(task.class_token_ids or ()))

    def forward(self, **inputs: Any) -> Tensor:
        inputs.pop("labels", None)
        if not isinstance(self.task, NextToken):
            return self.task.logits(self.model, inputs)
        return self.model(**inputs, use_cache=False).logits[:, -1]


def _keep_rows(model: Any, rows: list[int]) -> None:
    """Of the head's matrices onto the vocabulary: its own, and LoRA's B."""
    head = model.get_base_model().get_output_embeddings()
    vocabulary = head.weight.shape[0]
    for module in head.modules():
        if isinstance(module, nn.Linear) and module.weight.shape[0] == vocabulary:
            kept = module.weight.detach()[rows].clone()
            module.weight = nn.Parameter(kept, requires_grad=module.weight.requires_grad)
            module.out_features = len(rows)


def fitted(task: Task, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], **settings: Any) -> Laplace:
    """Under the prior precision of the evidence.

    Args:
        settings: of `compat.laplace_lora.Laplace`.
    """
    la = Laplace(Wrapped(task, model), "classification", prior_precision=1.0, **settings)
    la.fit(batches)
    la.optimize_prior_precision(method="marglik")
    return la


def predicted(la: Laplace, batches: Iterable[Mapping[str, Tensor]]) -> LogitPosterior:
    """Of all batches together."""
    parts = [la.predict(batch) for batch in batches]
    return LogitPosterior(torch.cat([p.mean for p in parts]), torch.cat([p.covariance for p in parts]))


def settings(scale: str, case: Case) -> dict[str, Any]:
    return {"samples": SAMPLES, **SCALES[scale]}


def run(scale: str, case: Case) -> Outcome:
    """One of `SCALES`."""
    task, splits = case.task, case.splits
    la, fit = measured(lambda: fitted(task, case.model, task.batches(splits.train), **SCALES[scale]))
    posteriors, predict = measured(lambda: {name: predicted(la, task.batches(getattr(splits, name))) for name in SETS})
    generator = torch.Generator().manual_seed(case.seed)
    samples = {name: one.sample(SAMPLES, generator).softmax(dim=-1) for name, one in posteriors.items()}
    return Outcome(
        {name: each.mean(dim=0) for name, each in samples.items()},
        {name: mutual_information(each) for name, each in samples.items()},
        seconds={"fit": fit.seconds, "predict": predict.seconds},
        mib=max(fit.mib, predict.mib),
        facts={"prior precision": float(la.prior_precision)},
    )
