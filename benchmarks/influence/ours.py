"""Scores of this package: the change of each query's loss when a training example is added, `[Q, N]`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import bayesian_lora_kernels as blk

from . import problem


def batches(data: problem.Data, size: int) -> list[dict[str, Tensor]]:
    """As this package takes them."""
    return [
        {"input_ids": ids, "labels": answers}
        for ids, answers in zip(data[0].split(size), data[1].split(size), strict=True)
    ]


def fitted(model: nn.Module, curvature: str, size: int, fisher: str = "auto") -> blk.LaplaceLoRA:
    """The posterior of the training data, with full factors."""
    laplace = blk.LaplaceLoRA(
        model,
        lambda model, batch: problem.answer_logits(model, batch["input_ids"]),
        curvature=curvature,
        fisher=fisher,
        rank=None,
        prior_precision=problem.PRIOR,
    )
    return laplace.fit(batches(problem.train_data(), size), progress=False)


def scores(laplace: blk.LaplaceLoRA, damping: float, size: int) -> Tensor:
    """With a damping on the scale of sums."""
    train, queries = problem.train_data(), problem.query_data()
    return blk.influence(laplace, batches(train, size), batches(queries, size), damping=damping, progress=False)


def from_indexes(laplace: blk.LaplaceLoRA, size: int, ranks: Sequence[int]) -> dict[int, tuple[float, Tensor]]:
    """For each rank of an index, the share of the squares that it keeps, and its scores."""
    found = {}
    for rank in ranks:
        with tempfile.TemporaryDirectory() as folder:
            train = batches(problem.train_data(), size)
            index = blk.InfluenceIndex.build(laplace, train, Path(folder) / "index", rank, progress=False)
            found[rank] = index.kept, index.influence(batches(problem.query_data(), size)).values
    return found


def gradients_only(model: nn.Module, size: int) -> Tensor:
    """Inner products of gradients: what is left of influence without a curvature."""
    return scores(fitted(model, "kfac", size), 1e9, size) * 1e9


def random_scores() -> Tensor:
    """The control."""
    return torch.randn(problem.QUERIES, problem.TRAIN, generator=torch.Generator().manual_seed(0))
