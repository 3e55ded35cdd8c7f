"""The methods by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import baselines, gym, laplace, tfb
from .case import Case, Outcome


@dataclass(frozen=True)
class Method:
    """One of them.

    Attributes:
        run: what it makes of a case.
        settings: what it depends on beside the case; JSON can write it.
    """

    run: Callable[[Case], Outcome]
    settings: Callable[[Case], dict[str, Any]] = lambda case: {}


def _laplace(
    run: Callable[[str, Case], Outcome],
    kind: str,
    settings: Callable[[str, Case], dict[str, Any]] = laplace.settings,
) -> Method:
    return Method(partial(run, kind), partial(settings, kind))


REFERENCE = "temperature scaling"
METHODS = {
    "MAP": Method(baselines.plain),
    REFERENCE: Method(partial(baselines.tempered, "temperature")),
    "averaged temperatures": Method(partial(baselines.tempered, "averaged temperatures")),
    "MC dropout": Method(baselines.dropout, baselines.dropout_settings),
    "ensemble": Method(baselines.ensemble, baselines.ensemble_settings),
    "ensemble, labels": Method(partial(baselines.ensemble, by_labels=True), baselines.ensemble_settings),
    "TFB": Method(tfb.run, tfb.settings),
    "last layer, evidence": _laplace(laplace.evidence, "last layer"),
    "last layer, labels": _laplace(laplace.by_labels, "last layer"),
    "Laplace as published": _laplace(laplace.evidence, "published"),
    "Laplace of BayesAdapt": _laplace(gym.run, "published", gym.settings),
    "the same, scale corrected": _laplace(gym.run, "correct", gym.settings),
    "EKFAC, evidence": _laplace(laplace.evidence, "ekfac"),
    "EKFAC, folds": _laplace(laplace.crossfitted, "ekfac"),
    "EKFAC, labels": _laplace(laplace.by_labels, "ekfac"),
    "exact, evidence": _laplace(laplace.evidence, "exact"),
    "exact, folds": _laplace(laplace.crossfitted, "exact"),
    "exact, labels": _laplace(laplace.by_labels, "exact"),
}
