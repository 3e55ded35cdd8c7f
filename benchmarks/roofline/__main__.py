"""What the kernels should take on three GPUs, without one: `python -m benchmarks.roofline [--only REGEX] [--write]`.

A case's call is recorded on tensors without memory (`steps.py`), its kernels are compiled, and instructions, bytes and
launches counted (`program.py`); the slowest of what each kernel needs is its time (`estimate.py`), to be read with
+-30 %. Then what fits and predictions add to the passes of a 7B (`end_to_end.py`). `--write` keeps the result in
benchmarks/results/roofline.json and the tables in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, all_cases

from . import end_to_end
from .estimate import Time, limits, times
from .gpus import ALL, GPU, H100, RESULTS
from .steps import of_case

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "performance.md"
MARKS = ("<!-- made by python -m benchmarks.roofline --write -->", "<!-- end -->")
GEMMS = ("addmm", "baddbmm", "gemm alone")  # baselines whose time follows from the matmul rate


def provider(case: Case) -> str:
    """The package's own."""
    return "native" if case.operation == "small_eigh" else "triton"


def estimate(case: Case, name: str, gpu: GPU) -> list[Time]:
    """The time of every step of one call of a case's provider."""
    return times(*of_case(case, name, gpu.architecture, gpu.multiprocessors), gpu)


def microseconds(found: Sequence[Time]) -> float:
    return 1e6 * sum(one.seconds for one in found)


def target_us(case: Case, gpu: GPU) -> float | None:
    """The case's first target whose baseline the model knows."""
    for target in case.targets:
        if target.microseconds is not None:
            return target.microseconds
        if target.times is not None and target.over in GEMMS and case.gemm:
            return 1e6 * case.gemm / gpu.tensor / target.times
        if target.times is not None and target.over == "torch":
            return microseconds(estimate(case, "torch", gpu)) / target.times
    return None


def measure(case: Case) -> dict[str, Any]:
    """A case as it stands in the JSON."""
    work = case.work()
    found: dict[str, Any] = {
        "floor_us": case.floor_us or 1e6 * work.floor(H100.bandwidth, H100.tensor),
        "targets": [str(target) for target in case.targets],
        "target_us": target_us(case, H100),
    }
    for gpu in ALL:
        steps = estimate(case, provider(case), gpu)
        found[gpu.name] = {
            "us": microseconds(steps),
            "limits": {name: 1e6 * seconds for name, seconds in limits(steps)},
            "launches": len(steps),
            "device_bytes": sum(step.device_bytes for step in steps),
            "steps": _by_name(steps),
        }
    return found


def whole_passes() -> dict[str, Any]:
    """Fits and predictions of a 7B, on the H100."""
    found: dict[str, Any] = {}
    for name, adapted in end_to_end.ADAPTED.items():
        for what, added in end_to_end.added(adapted, H100).items():
            found[f"{what}, {name}"] = {
                "passes": added.passes,
                "model_us": 1e6 * added.model,
                "added_us": 1e6 * added.seconds,
                "times": 1 + added.seconds / added.model,
                "launches": len(added.steps),
                "steps": _by_name(added.steps),
            }
    return found


def _by_name(steps: Sequence[Time]) -> dict[str, Any]:
    """What takes a microsecond and more, the longest first."""
    grouped: dict[str, list[Time]] = {}
    for step in steps:
        grouped.setdefault(step.name, []).append(step)
    ordered = sorted(grouped.items(), key=lambda one: -microseconds(one[1]))
    return {name: _summary(some) for name, some in ordered if microseconds(some) > 1}


def _summary(steps: Sequence[Time]) -> dict[str, Any]:
    names = sorted({name for step in steps for name in step.bounds})
    bounds = {name: 1e6 * sum(step.bounds.get(name, 0.0) for step in steps) for name in names}
    return {
        "us": microseconds(steps),
        "launches": len(steps),
        "programs": sum(step.programs for step in steps),
        "resident": steps[0].resident,
        "bounds_us": {name: bound for name, bound in bounds.items() if bound >= 0.05},
    }


def table(cases: dict[str, Any]) -> str:
    """In Markdown: microseconds, and in brackets what bounds most of them."""
    lines = [
        f"| case | floor | target | {' | '.join(gpu.name for gpu in ALL)} |",
        "|---|---|---|" + "---|" * len(ALL),
    ]
    for name, found in cases.items():
        target = "-" if found["target_us"] is None else f"{found['target_us']:,.0f}"
        cells = [f"{found[gpu.name]['us']:,.0f} ({next(iter(found[gpu.name]['limits']))})" for gpu in ALL]
        lines.append(f"| {name} | {found['floor_us']:,.0f} | {target} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table_of_passes(found: dict[str, Any]) -> str:
    """In Markdown, milliseconds, with what takes most of the time added."""
    lines = ["| of a batch of 8 x 256 tokens, H100 | passes | the model | added | times | launches | most of it |"]
    lines.append("|---|" + "---|" * 6)
    for name, one in found.items():
        most = ", ".join(f"{step} {summary['us'] / 1e3:.1f}" for step, summary in list(one["steps"].items())[:4])
        model, added = one["model_us"] / 1e3, one["added_us"] / 1e3
        cells = f"{one['passes']} | {model:.0f} | {added:.1f} | {one['times']:.2f} | {one['launches']} | {most}"
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def document(content: dict[str, Any]) -> str:
    """The tables, as they stand in docs/performance.md."""
    tables = [table(content["cases"])]
    if content.get("end_to_end"):
        tables.append(table_of_passes(content["end_to_end"]))
    return "\n".join(tables)


def insert(document: str, text: str) -> str:
    """The document with the text between its marks."""
    before, rest = document.split(MARKS[0])
    return before + MARKS[0] + "\n\n" + text + "\n" + MARKS[1] + rest.split(MARKS[1])[1]


def chosen(cases: Sequence[Case], only: str) -> list[Case]:
    """The cases that have a floor or a target, and those of the names asked for."""
    return [case for case in cases if (re.search(only, case.name) if only else case.floor_us or case.targets)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression for names; default: cases with a target")
    parser.add_argument("--write", action="store_true", help="keep the results")
    arguments = parser.parse_args()
    if arguments.write and arguments.only:
        parser.error("--write keeps all cases: no --only with it")
    found: dict[str, Any] = {}
    for case in chosen(all_cases(), arguments.only):
        found[case.name] = measure(case)
        print(table({case.name: found[case.name]}).splitlines()[-1], flush=True)
    content: dict[str, Any] = {"triton": version("triton"), "cases": found}
    if not arguments.only and end_to_end.offered():
        content["end_to_end"] = whole_passes()
        print(table_of_passes(content["end_to_end"]))
    if arguments.write:
        content = _rounded(content)
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        DOCUMENT.write_text(insert(DOCUMENT.read_text(), document(content)))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return value


if __name__ == "__main__":
    main()
