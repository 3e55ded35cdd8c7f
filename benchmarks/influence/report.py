"""The linear datamodelling score: how well sums of scores rank what retraining on subsets gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import scipy.stats
import torch
from torch import Tensor


def datamodelling_scores(scores: Tensor, members: Tensor, losses: Tensor) -> Tensor:
    """Spearman correlations `[Q]` over subsets, for each query.

    Args:
        scores: `[Q, N]`, the change of the query's loss with the example.
        members: `[K, N]` bool.
        losses: `[K, Q]`.
    """
    predicted = members.double() @ scores.double().mT
    return torch.tensor([scipy.stats.spearmanr(predicted[:, q], losses[:, q]).statistic for q in range(len(scores))])


def agreement(losses: Tensor) -> Tensor:
    """Spearman correlations `[Q]` of the first two starts' losses `[starts, K, Q]`: what training from another adds."""
    first, second = losses[0].mT, losses[1].mT
    return torch.tensor([scipy.stats.spearmanr(x, y).statistic for x, y in zip(first, second, strict=True)])


def best(of_dampings: Mapping[str, Tensor], key: str) -> Tensor:
    """The scores `[Q]` at a damping; `best`: at the one whose mean is highest."""
    return max(of_dampings.values(), key=lambda values: float(values.mean())) if key == "best" else of_dampings[key]


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean, and its standard error over queries."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def table(result: Mapping[str, Any]) -> str:
    """Markdown."""
    dampings = list(next(iter(result["methods"].values()))["lds"])
    lines = [
        f"# Influence against {result['subsets']} retrained models",
        "",
        f"`{result['command']}` writes this table. {result['problem']}",
        "",
        "Linear datamodelling score: Spearman's correlation of the sum of the scores of a subset's examples with the "
        f"loss after training on it (mean of {result['starts']} starts), for each of {result['queries']} queries; mean "
        "and standard error over queries. Dampings are times the precision of the training's prior. *own*: "
        "this package's is that precision, the others' a tenth of the mean eigenvalue of each module.",
        "",
        "| | " + " | ".join(dampings) + " | fit, CPU s | scores, CPU s | fit, MiB | scores, MiB |",
        "|---|" + "---|" * (len(dampings) + 4),
    ]
    for name, method in result["methods"].items():
        cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in (method["lds"][d] for d in dampings)]
        costs = method["costs"]
        numbers = [f"{costs['fit_seconds']:.2f}", f"{costs['score_seconds']:.2f}"]
        numbers += ["" if costs[k] is None else f"{costs[k] / 2**20:.0f}" for k in ("fit_bytes", "score_bytes")]
        lines.append("| " + " | ".join([name, *cells, *numbers]) + " |")
    lines += ["", "| control | |", "|---|---|"]
    lines += [f"| {name} | {mean:.3f} ± {error:.3f} |" for name, (mean, error) in result["controls"].items()]
    lines += ["", "| difference, at the same damping or at the best of each | |", "|---|---|"]
    lines += [f"| {name} | {mean:+.3f} ± {error:.3f} |" for name, (mean, error) in result["differences"].items()]
    lines += ["", "| index | share of squares kept | score |", "|---|---|---|"]
    for name, one in result["indexes"].items():
        mean, error = one["lds"]
        lines.append(f"| {name} | {one['kept']:.3f} | {mean:.3f} ± {error:.3f} |")
    return "\n".join(lines) + "\n"
