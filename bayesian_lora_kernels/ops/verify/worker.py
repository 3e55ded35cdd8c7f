"""Judges units in a process of its own: ``python -m bayesian_lora_kernels.ops.verify.worker``.

Reads a request a line, answers a line, both JSON. A request names by import path the suite, the implementation, its
reference, the function that says which variants a call takes, and the variant that is asked for.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .judge import Verdict, judge
from .machine import Runtime
from .problem import Draw, Problem, Suite

# Problems of a unit.
MOST = 12
_CATALOGUES: dict[tuple[str, ...], list[tuple[Problem, set[str]]]] = {}


def attribute(path: str) -> Any:
    """``module:name``, or ``module:name[key]`` for an entry of a dictionary."""
    module, name = path.split(":")
    name, _, key = name.removesuffix("]").partition("[")
    value = getattr(importlib.import_module(module), name)
    return value[key] if key else value


def catalogue(
    problems: Iterable[Problem], variants: Callable[..., Iterable[Any]], runtime: Runtime
) -> Iterator[tuple[Problem, set[str]]]:
    """Every problem, with the variants that it takes."""
    for problem in problems:
        yield problem, set(map(str, variants(*problem.arguments(Draw(runtime.device, 0)))))


def answer(request: dict[str, str]) -> Verdict:
    """The verdict on one unit."""
    runtime = Runtime(torch.device(request["device"]))
    suite: Suite = attribute(request["suite"])
    known, variants, wanted = (request["device"], request["suite"]), attribute(request["variants"]), request["variant"]
    if known not in _CATALOGUES:
        _CATALOGUES[known] = list(catalogue(suite.problems(runtime.device), variants, runtime))
    found = itertools.chain(_CATALOGUES[known], catalogue(suite.near(wanted), variants, runtime))
    problems = itertools.islice((problem for problem, taken in found if wanted in taken), MOST)
    return judge(problems, suite, attribute(request["function"]), attribute(request["reference"]), runtime)


def main() -> None:
    """Answer until the input ends. What anything else prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with torch.no_grad():
        for line in sys.stdin:
            try:
                verdict = answer(json.loads(line))
            except torch.OutOfMemoryError as error:
                verdict = Verdict("inconclusive", reason=f"no memory: {error}"[:300])
            except Exception as error:  # a broken installation breaks in any way; the answer says how
                verdict = Verdict("inconclusive", reason=f"{type(error).__name__}: {error}"[:300])
            print(json.dumps(verdict.as_json()), file=answers, flush=True)
            if "CUDA error" in verdict.reason or "illegal memory access" in verdict.reason:
                return  # nothing that this process computes from now on counts


if __name__ == "__main__":
    main()
