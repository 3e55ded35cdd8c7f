"""Finished runs: one JSON line each, of a task, a seed and a method."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayesian_lora_kernels.calibration import ood_auroc, predictive_entropy

from ..files import write_text
from ..scores import scores
from ..tables import or_none
from .case import Case, Outcome

Run = Mapping[str, Any]
MEASURED = ("test", "shift")


class StudyError(RuntimeError):
    """The folder cannot be used."""


class Runs:
    """A file of them, which is written anew, whole, with each.

    Args:
        path: of the file; it need not be there yet.

    Raises:
        StudyError: for a line that is no run.
    """

    def __init__(self, path: Path):
        self.path = path
        self.all: list[Run] = []
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                run = json.loads(line)
                self._key(run)
            except (ValueError, KeyError, TypeError) as error:
                raise StudyError(f"{path}, line {number}: expected a run as JSON, {error!r}") from None
            self.all.append(run)

    def has(self, task: str, seed: int, method: str, settings: Mapping[str, Any]) -> bool:
        """Whether it is finished.

        Raises:
            StudyError: if it was made with other settings.
        """
        for run in self.all:
            if self._key(run) == (task, seed, method):
                asked = json.loads(json.dumps(settings))
                changed = sorted(
                    name for name in {*asked, *run["settings"]} if asked.get(name) != run["settings"].get(name)
                )
                if changed:
                    name = changed[0]
                    raise StudyError(
                        f"{self.path}: {task}, seed {seed}, {method}: made with {name} = {run['settings'].get(name)}, "
                        f"now asked for {asked.get(name)}; use another folder for --out"
                    )
                return True
        return False

    def add(self, run: Run) -> None:
        self.all.append(run)
        write_text(self.path, "".join(json.dumps(one, allow_nan=False) + "\n" for one in self.all))

    @staticmethod
    def _key(run: Run) -> tuple[str, int, str]:
        return run["task"], run["seed"], run["method"]


def record(case: Case, method: str, outcome: Outcome, settings: Mapping[str, Any], environment: Any) -> Run:
    """One line: numbers that are not defined, such as the AUROC of errors where there are none, are null."""
    judged = {name: _plain(scores(outcome.probs[name], case.labels(name))) for name in MEASURED}
    entropy = {name: predictive_entropy(outcome.probs[name]) for name in ("test", "foreign")}
    foreign = {"entropy": ood_auroc(entropy["test"], entropy["foreign"])}
    information = outcome.mutual_information
    foreign["mutual information"] = ood_auroc(information["test"], information["foreign"]) if information else math.nan
    return {
        "task": case.task.name,
        "seed": case.seed,
        "method": method,
        "scores": judged | {"foreign": _plain(foreign)},
        "seconds": {name: round(value, 2) for name, value in outcome.seconds.items()},
        "mib": or_none(round(outcome.mib, 1)),
        "facts": dict(outcome.facts),
        "settings": dict(settings),
        "environment": environment,
    }


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    """Without NaN, which JSON has not; eight digits."""
    return {name: None if math.isnan(value) else float(f"{value:.8g}") for name, value in values.items()}
