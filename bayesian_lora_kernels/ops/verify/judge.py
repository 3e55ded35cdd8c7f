"""Solves the problems of a unit in this process, and compares with float64."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .machine import Runtime
from .problem import Arguments, Draw, Function, Problem, Suite, error, in_float64, tensors_in

State = Literal["passed", "failed", "inconclusive"]
STATES: tuple[str, ...] = get_args(State)
SEEDS = 3


@dataclass(frozen=True)
class Verdict:
    """What came of a unit.

    Args:
        state: ``passed``; ``failed``; or ``inconclusive``: no problem exercises it, or there was no memory.
        error: the largest that was found, and ``limit``, what it may be.
        problems: how many were solved.
        seconds: that it took.
        reason: why it did not pass.
        shadowed: whether a real call has been compared with the reference too.
    """

    state: State
    error: float = 0.0
    limit: float = 0.0
    problems: int = 0
    seconds: float = 0.0
    reason: str = ""
    shadowed: bool = False

    @property
    def passed(self) -> bool:
        """Whether it may be used."""
        return self.state == "passed"

    def __str__(self) -> str:
        if self.passed:
            return f"passed (error {self.error:.1e}, limit {self.limit:.0e})"
        return f"{self.state}: {self.reason}"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> Verdict:
        """What ``as_json`` gave.

        Raises:
            ValueError: for anything else.
        """
        wanted = Verdict("passed").as_json()
        if not isinstance(values, dict) or set(values) != set(wanted) or values["state"] not in STATES:
            raise ValueError(f"expected a verdict, got {values!r}")
        for name, example in wanted.items():
            kinds = (int, float) if isinstance(example, float) else type(example)
            if not isinstance(values[name], kinds):
                raise ValueError(f"expected {name} to be {type(example).__name__}, got {values[name]!r}")
        return cls(**values)


def judge(
    problems: Iterable[Problem], suite: Suite, function: Function, reference: Function, runtime: Runtime
) -> Verdict:
    """Solve each problem from several seeds, twice each, the second time on a side stream behind late inputs.

    Fails at the first error over the limit, output left unwritten, write beside an output, changed input, difference
    between the two calls, or exception. Without a problem: inconclusive.
    """
    start = time.perf_counter()
    worst, limit, solved = 0.0, 0.0, 0
    for problem in problems:
        for seed in range(SEEDS):
            try:
                found, allowed, reason = _solve(problem, suite, function, reference, runtime, seed)
            except torch.OutOfMemoryError as exception:
                return _verdict("inconclusive", start, reason=f"{problem.name}: no memory: {_line(exception)}")
            except Exception as exception:  # whatever a kernel raises is its failure
                why = f"{problem.name}: {type(exception).__name__}: {_line(exception)}"
                return _verdict("failed", start, reason=why)
            if reason:
                reason = f"{problem.name}: {reason}"
                return _verdict("failed", start, error=found, limit=allowed, problems=solved, reason=reason)
            if found * limit >= worst * allowed:  # the one that is nearest to its limit
                worst, limit = found, allowed
            solved += 1
    if not solved:
        return _verdict("inconclusive", start, reason="no problem exercises it")
    return _verdict("passed", start, error=worst, limit=limit, problems=solved)


def _solve(
    problem: Problem, suite: Suite, function: Function, reference: Function, runtime: Runtime, seed: int
) -> tuple[float, float, str]:
    """Error, limit, and what is wrong if something is."""
    untouched = problem.arguments(Draw(runtime.device, seed))
    exact = in_float64(untouched)
    reference(*exact)
    truth = suite.comparable(exact)
    limit = suite.limit(untouched)
    results = []
    for late in (False, True):
        draw = Draw(runtime.device, seed)
        arguments = problem.arguments(draw)
        with runtime.late(tensors_in(arguments)) if late else runtime.now():
            function(*arguments)
        runtime.synchronize()
        results.append(suite.comparable(arguments))
        if not draw.intact():
            return 0.0, limit, "wrote outside of its output"
        if not _same(arguments[suite.outputs :], untouched[suite.outputs :]):
            return 0.0, limit, "changed its inputs"
        found = error(results[-1], truth)
        if not found <= limit:
            left = "; an output holds NaN or infinity" if found == float("inf") else ""
            where = " behind late inputs on a side stream" if late else ""
            return found, limit, f"error {found:.1e}{where}, limit {limit:.0e}{left}"
    if not all(torch.equal(one, other) for one, other in zip(*results, strict=True)):
        return found, limit, "two calls with the same inputs differ"
    return found, limit, ""


def _same(some: Arguments, others: Arguments) -> bool:
    return all(_equal(one, other) for one, other in zip(tensors_in(some), tensors_in(others), strict=True))


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.is_floating_point():
        one, other = one.nan_to_num(nan=12345.0), other.nan_to_num(nan=12345.0)
    return torch.equal(one, other)


def _verdict(state: State, start: float, **values: Any) -> Verdict:
    return Verdict(state, seconds=round(time.perf_counter() - start, 3), **values)


def _line(exception: Exception) -> str:
    lines = [line for line in str(exception).splitlines() if line.strip()] or [""]
    return lines[0][:300]
