"""How far each approximation's predictive covariance is from the exact one: `python -m benchmarks.fidelity`.

The model and the data are the demo's: a small language model trained here, LoRA-fine-tuned to tell four packages of
the standard library by a sentence of their documentation. The curvature is measured with the exact Fisher, so that
nothing but the approximation differs. `fidelity_report` writes it down.
"""

from __future__ import annotations

import argparse
import copy
import math
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.demo.problem import in_order
from bayesian_lora_kernels.demo.sentences import read_standard_library
from bayesian_lora_kernels.demo.settings import DemoSettings
from bayesian_lora_kernels.demo.task import Task
from bayesian_lora_kernels.demo.training import add_lora, class_logits, fine_tune, make_base_model, train_base_model

from .fidelity_report import Measurement, Method, as_json, as_markdown, as_text
from .workload import relative_error

Batches = list[dict[str, Tensor]]

# Narrower than the model, so that the wide side of every LoRA matrix becomes low-rank when a rank is asked for.
RANK_THRESHOLD = 64
RANKS = (30, 10)
SCALES = (0.1, 1.0, 10.0)  # times the prior precision at which the exact evidence is largest
TEST_PER_CLASS = 25

# The closest that any method can come that treats the modules as independent.
BLOCKS = Method("exact, each module by itself")

STOPPED, OVERFITTED = "Stopped early", "Overfitted"


def methods() -> list[Method]:
    """Every Kronecker-factored approximation, in the order of the table; ranks and tails for `expand`."""
    low_rank = [(rank, tail) for rank in RANKS for tail in (True, False)]
    result = []
    for curvature in ("kfac", "ekfac"):
        result.append(Method(curvature, "expand"))
        result += [Method(curvature, "expand", rank, tail) for rank, tail in low_rank]
        result += [Method(curvature, tokens) for tokens in ("reduce", "last")]
    return result


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model, with the data that posteriors are fitted to and compared on."""

    model: nn.Module
    class_token_ids: list[int]
    train: Batches
    test: Batches

    def fit(self, curvature: str, **arguments: Any) -> LaplaceLoRA:
        laplace = LaplaceLoRA(
            self.model,
            class_token_ids=self.class_token_ids,
            curvature=curvature,
            fisher="exact",
            rank_threshold=RANK_THRESHOLD,
            **arguments,
        )
        return laplace.fit(self.train, progress=False)

    def covariances(self, laplace: LaplaceLoRA, precisions: Sequence[float]) -> list[Tensor]:
        """`[N, C, C]` float64 over the test set, for each prior precision."""
        result = []
        for precision in precisions:
            laplace.prior_precision = precision
            result.append(torch.cat([laplace.predict(batch).covariance for batch in self.test]).double())
        return result

    def blockwise(self, precisions: Sequence[float]) -> list[Tensor]:
        """The exact posterior without its correlations between modules: one exact posterior each, summed."""
        names = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module.weight.requires_grad
        ]
        parts = [self.covariances(self.fit("exact", modules=[name]), precisions) for name in names]
        return [torch.stack(each).sum(dim=0) for each in zip(*parts, strict=True)]


def fine_tuned_models(settings: DemoSettings, seeds: int) -> Iterator[tuple[str, FineTuned]]:
    """One base model; for each seed it is fine-tuned anew, on other sentences, and taken at two moments."""
    task = Task(read_standard_library(settings.modules), settings)
    base = make_base_model(settings.base, len(task.tokenizer), task.tokenizer.pad_token_id, seed=0)
    with tqdm(total=settings.base.steps, desc="base model", disable=None) as bar:

        def advance(losses: dict[str, float]) -> None:
            bar.update()

        train_base_model(base, task.base_examples, settings.base, seed=0, watch=advance)
    for seed in range(seeds):
        splits = task.splits(seed)
        train, held_out, test = (in_order(part, 50) for part in (splits.train, splits.held_out, splits.test))
        model = add_lora(copy.deepcopy(base), settings.tuning, seed)
        best = FineTuned(model, task.class_token_ids, train, test)
        lowest = math.inf

        def keep_best(losses: dict[str, float], model: nn.Module = model, held_out: Batches = held_out) -> None:
            nonlocal best, lowest
            found = nll(model, held_out, task.class_token_ids)
            if found < lowest:
                lowest, best = found, replace(best, model=copy.deepcopy(model))

        fine_tune(model, task.class_token_ids, splits.train, settings.tuning, seed, watch=keep_best)
        yield STOPPED, best
        yield OVERFITTED, replace(best, model=model)


def nll(model: nn.Module, batches: Batches, class_token_ids: list[int]) -> float:
    """Mean negative log-likelihood of the labels."""
    with torch.no_grad():
        losses = [
            F.cross_entropy(class_logits(model, batch, class_token_ids), batch["labels"], reduction="none")
            for batch in batches
        ]
    return float(torch.cat(losses).mean())


def measure(tuned: FineTuned) -> Measurement:
    """Every method against the exact posterior, at the same three prior precisions."""
    exact = tuned.fit("exact").optimize_prior_precision()
    best = exact.prior_precision
    assert isinstance(best, Tensor)
    precisions = [float(best) * scale for scale in SCALES]
    truths = tuned.covariances(exact, precisions)
    found = {BLOCKS: tuned.blockwise(precisions)}
    for method in tqdm(methods(), desc="approximations", disable=None):
        laplace = tuned.fit(method.curvature, tokens=method.tokens, rank=method.rank, tail=method.tail)
        found[method] = tuned.covariances(laplace, precisions)
    return Measurement(
        prior_precision=float(best),
        train_nll=nll(tuned.model, tuned.train, tuned.class_token_ids),
        test_nll=nll(tuned.model, tuned.test, tuned.class_token_ids),
        n_train=exact.n_examples,
        n_test=len(truths[0]),
        errors={m: [relative_error(c, t) for c, t in zip(cs, truths, strict=True)] for m, cs in found.items()},
        variances={m: [_trace(c) / _trace(t) for c, t in zip(cs, truths, strict=True)] for m, cs in found.items()},
    )


def _trace(covariance: Tensor) -> float:
    return float(covariance.diagonal(dim1=-2, dim2=-1).sum())


def average(measurements: Sequence[Measurement]) -> Measurement:
    """Mean over seeds of every number."""
    first = measurements[0]

    def mean(key: str) -> float:
        return statistics.fmean(getattr(m, key) for m in measurements)

    def means(key: str) -> dict[Method, list[float]]:
        tables = [getattr(m, key) for m in measurements]
        return {
            method: [statistics.fmean(values) for values in zip(*(t[method] for t in tables), strict=True)]
            for method in tables[0]
        }

    return replace(
        first,
        prior_precision=mean("prior_precision"),
        train_nll=mean("train_nll"),
        test_nll=mean("test_nll"),
        errors=means("errors"),
        variances=means("variances"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table as a page, for docs/fidelity.md")
    parser.add_argument("--seeds", type=int, default=1, help="fine-tuned models to average over")
    arguments = parser.parse_args()
    settings = replace(DemoSettings(), test=TEST_PER_CLASS)
    measured: dict[str, list[Measurement]] = {STOPPED: [], OVERFITTED: []}
    for moment, tuned in fine_tuned_models(settings, arguments.seeds):
        measured[moment].append(measure(tuned))
    results = {moment: average(values) for moment, values in measured.items()}
    print("\n\n".join(f"{moment}\n{as_text(result, SCALES)}" for moment, result in results.items()))
    if arguments.json:
        arguments.json.write_text(as_json(measured, SCALES), encoding="utf-8")
    if arguments.markdown:
        command = shlex.join(["python", "-m", "benchmarks.fidelity", *sys.argv[1:]])
        page = as_markdown(results, SCALES, settings, command, arguments.seeds)
        arguments.markdown.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
