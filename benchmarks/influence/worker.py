"""One method on the saved model, in a process of its own: `python -m benchmarks.influence` starts it.

What is timed is the fit (factors, eigenvalues, rows) and then the scores of all queries against all training examples,
once each, after a first round on a copy that loads what is loaded at first use.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..peak_memory import measurable, reset_peak, resident
from . import ours, problem
from .peers import Bergson, Kronfluence

BATCH = 50
# Times the prior's precision.
DAMPINGS = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
# Curvature and Fisher; the last draws a label for each example, as the peers do.
OURS = {
    "exact": ("exact", "auto"),
    "EKFAC": ("ekfac", "auto"),
    "K-FAC": ("kfac", "auto"),
    "EKFAC drawn": ("ekfac", "mc"),
}
PEERS = ("kronfluence EKFAC", "kronfluence K-FAC", "bergson EKFAC", "bergson K-FAC")
METHODS = (*OURS, *PEERS)


class _Ours:
    """This package, with the two steps of the peers."""

    def __init__(self, saved: Path, curvature: str, fisher: str):
        self.model, self.curvature, self.fisher = problem.load(saved), curvature, fisher

    def fit(self) -> None:
        self.laplace = ours.fitted(self.model, self.curvature, BATCH, self.fisher)

    def scores(self, damping: float | None) -> Tensor:
        return ours.scores(self.laplace, problem.PRIOR if damping is None else damping, BATCH)


def made(method: str, saved: Path, folder: Path) -> Any:
    """An object with `fit()` and `scores(damping)`."""
    if method in OURS:
        return _Ours(saved, *OURS[method])
    strategy = method.split()[1].replace("-", "").lower()
    if method.startswith("kronfluence"):
        return Kronfluence(problem.load(saved), strategy, folder, BATCH)
    return Bergson(saved, strategy == "ekfac", folder)


def measured(call: Callable[[], Any]) -> tuple[float, int | None, Any]:
    """Seconds of the processor, peak bytes above what was there, and the result."""
    before = reset_peak() if measurable() else 0
    start = time.process_time()
    result = call()
    seconds = time.process_time() - start
    return seconds, resident(peak=True) - before if measurable() else None, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("saved", type=Path, help="the folder of the model")
    parser.add_argument("folder", type=Path, help="where the method may write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    method = made(arguments.method, arguments.saved, arguments.folder)
    method.fit()
    method.scores(problem.PRIOR)
    fit_seconds, fit_bytes, _ = measured(method.fit)
    seconds, peak, own = measured(lambda: method.scores(None))
    found = {"own": own}
    for factor in DAMPINGS:
        found[str(factor)] = method.scores(factor * problem.PRIOR)
    torch.save({key: value.float() for key, value in found.items()}, arguments.folder / "scores.pt")
    costs = {"fit_seconds": fit_seconds, "fit_bytes": fit_bytes, "score_seconds": seconds, "score_bytes": peak}
    (arguments.folder / "costs.json").write_text(json.dumps(costs))


if __name__ == "__main__":
    main()
