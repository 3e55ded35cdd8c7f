"""Fits that end before their time, and what must be the same when they go on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from models import Case, llama

import bayesian_lora_kernels as blk

SETTINGS: dict[str, dict[str, Any]] = {
    "kfac, exact Fisher": {"curvature": "kfac", "fisher": "exact", "rank": None},
    "kfac, sampled": {"curvature": "kfac", "fisher": "mc", "fisher_samples": 2, "rank": None},
    "kfac, low-rank": {"curvature": "kfac", "fisher": "mc", "rank": 1, "rank_threshold": 4},
    "ekfac": {"curvature": "ekfac", "fisher": "mc"},
    "ekfac, exact Fisher": {"curvature": "ekfac", "fisher": "exact", "rank": None},
    "exact": {"curvature": "exact", "fisher": "exact"},
}
PASSES = {name: 2 if name.startswith("ekfac") else 1 for name in SETTINGS}


class Stop(Exception):
    """The end of a fit before its time."""


class Batches:
    """A loader that counts what it hands out, and stops after so many batches."""

    def __init__(self, batches: list[Any], stop: int | None = None):
        self.batches, self.stop, self.given = batches, stop, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if self.given == self.stop:
                raise Stop
            self.given += 1
            yield batch


def case() -> Case:
    return llama(lengths=(50, 30, 60, 40, 50, 20, 60, 30), layers=1)  # enough rows for low-rank updates in mid-fit


def laplace(one: Case, setting: str, **settings: Any) -> blk.LaplaceLoRA:
    return blk.LaplaceLoRA(one.model, **{**one.arguments, "check": "off", **SETTINGS[setting], **settings})


def tensors(fitted: blk.LaplaceLoRA) -> dict[str, torch.Tensor]:
    """All that a fit found."""
    packed = fitted.posterior.curvature.pack()[0]
    found = {
        name: one.clone() if isinstance(one, torch.Tensor) else one.read(slice(None)) for name, one in packed.items()
    }
    found["n_examples"] = torch.tensor(fitted.n_examples)
    if fitted.log_likelihood is not None:
        found["log_likelihood"] = torch.tensor(fitted.log_likelihood, dtype=torch.float64)
    return found


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """The names of what is not the same bit for bit."""
    return [
        name
        for name in {**found, **expected}
        if name not in found or name not in expected or not torch.equal(found[name], expected[name])
    ]
