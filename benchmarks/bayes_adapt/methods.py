"""BayesAdapt's list of methods on tasks of `make study`: `python -m benchmarks.bayes_adapt.methods --out FOLDER`.

The study's command with these tasks and methods, and its resumption, tables and picture; further arguments are its own
(`--seeds N`, `--task NAME`, `--ratings FILE`, `--report-only`).
"""

from __future__ import annotations

import sys

from ..calibration.methods.__main__ import main as study
from ..calibration.tasks import CHOICES

TASKS = ("stdlib", CHOICES)
METHODS = (
    "MAP",
    "temperature scaling",
    "MC dropout",
    "ensemble",
    "TFB",
    "Laplace of BayesAdapt",
    "the same, scale corrected",
    "EKFAC, evidence",
    "EKFAC, folds",
    "EKFAC, labels",
    "exact, evidence",
    "exact, folds",
    "exact, labels",
)


def main(arguments: list[str]) -> int:
    for option, names in (("--task", TASKS), ("--method", METHODS)):
        if option not in arguments:
            arguments = [*arguments, *(word for name in names for word in (option, name))]
    return study(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
