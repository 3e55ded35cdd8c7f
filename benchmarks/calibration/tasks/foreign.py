"""Sentences that belong to no class of a task: from the documentation of Python's standard library."""

from __future__ import annotations

import random
from functools import cache

from bayesian_lora_kernels.demo.sentences import read_standard_library
from bayesian_lora_kernels.demo.settings import FOREIGN

from .task import Example


def library_sentences(count: int, seed: int) -> list[Example]:
    """Drawn at random; in lower case, with spaces around punctuation, as the rated sentences are."""
    return [Example(text, 0, text) for text in random.Random(seed).sample(_all(), count)]


@cache
def _all() -> list[str]:
    modules = read_standard_library(FOREIGN)
    return [" ".join(words) for one in modules.values() for document in one.docstrings for words in document]
