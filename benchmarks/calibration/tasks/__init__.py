"""The tasks of the study, by name."""

from __future__ import annotations

from pathlib import Path

from .cities import Cities
from .diseases import Diseases
from .majority import Majority
from .packages import Packages
from .task import Example, Splits, Task, Training
from .tumours import Tumours

NAMES = ("diseases", "packages", "cities", "majority", "majority-noisy", "tumours")

__all__ = ["NAMES", "Example", "Splits", "Task", "Training", "make_task"]


def make_task(name: str, cache: Path) -> Task:
    """The task of that name, which keeps its models in a folder.

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
    raise ValueError(f"task: expected one of {', '.join(NAMES)}, got {name!r}")
