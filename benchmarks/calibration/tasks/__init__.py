"""The tasks of both studies, by name."""

from __future__ import annotations

from pathlib import Path

from .cities import Cities
from .diseases import Diseases
from .majority import Majority
from .packages import Packages
from .sentiment import SentimentChoices, SentimentEncoder, SentimentLM
from .stdlib import StandardLibrary
from .task import Example, Splits, Task, Training
from .tumours import Tumours

NAMES = ("diseases", "packages", "cities", "majority", "majority-noisy", "tumours")  # of the study of labels
COMPARED = ("stdlib", "sentiment-minilm", "diseases", "sentiment-smollm2")  # of the study of methods
CHOICES = "choices-smollm2"  # of BayesAdapt's list of methods (`benchmarks/bayes_adapt`)

__all__ = ["CHOICES", "COMPARED", "NAMES", "Example", "Splits", "Task", "Training", "make_task"]


def make_task(name: str, cache: Path, ratings: Path | None = None) -> Task:
    """The task of that name, which keeps its models in a folder.

    Args:
        name: of `NAMES` or `COMPARED`, or `CHOICES`.
        cache: the folder.
        ratings: the file that rated sentences are in (`demo/ratings.py`), for those tasks.

    Raises:
        ValueError: for another name.
        MissingPackage: if a package that the task needs is not installed.
    """
    if name == "diseases":
        return Diseases(cache)
    if name == "packages":
        return Packages(cache)
    if name == "cities":
        return Cities(cache)
    if name == "majority":
        return Majority(cache, noise=0.0)
    if name == "majority-noisy":
        return Majority(cache, noise=0.25)
    if name == "tumours":
        return Tumours(cache)
    if name == "stdlib":
        return StandardLibrary(cache)
    if name == "sentiment-minilm":
        return SentimentEncoder(cache, ratings)
    if name == "sentiment-smollm2":
        return SentimentLM(cache, ratings)
    if name == CHOICES:
        return SentimentChoices(cache, ratings)
    raise ValueError(f"task: expected one of {', '.join(dict.fromkeys((*NAMES, *COMPARED, CHOICES)))}, got {name!r}")
