"""`python -m benchmarks.gpu_report --section tests|kernels|end_to_end --out DIR [--dry-run]`

Measures on this machine's GPU and writes SECTION.json, .csv and .md to DIR after every case; --dry-run goes through all
of it on the CPU with tiny shapes. A section keeps to its time: what did not fit is recorded as skipped, and every
failure is recorded and the rest goes on. It runs in a process of its own, which is started again where it left off if
a kernel brings it down. `--plot DIR` draws DIR/kernels.png from DIR/kernels.json.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from pathlib import Path

from .report import BAD, Report

SECTIONS = {"tests": "suite", "kernels": "kernels", "end_to_end": "end_to_end"}  # and their modules
MOST_RESTARTS = 6


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--section", choices=tuple(SECTIONS))
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--seconds", type=float, default=480.0, help="time of the section (default 480)")
    parser.add_argument("--only", default="", metavar="REGEX", help="the cases whose names match")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the roofline of an earlier run, and end")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # set for the process that measures
    arguments = parser.parse_args()
    if arguments.plot is None and (arguments.section is None or arguments.out is None):
        parser.error("expected --section and --out, or --plot")
    return arguments


def main() -> int:
    arguments = parse()
    if arguments.plot is not None:
        from .plot import draw

        print(draw(Report.read(arguments.plot, "kernels")))
        return 0
    if arguments.until is not None:
        measure(arguments)
        return 0
    for old in arguments.out.glob(f"{arguments.section}.*"):
        old.unlink()
    report = supervise(arguments)
    print(report.markdown(brief=True))
    return 1 if any(row.status in BAD for row in report.rows) else 0


def measure(arguments: argparse.Namespace) -> None:
    """The section itself, in the process that may be brought down."""
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is present; --dry-run goes through every case on the CPU")
    from . import plot
    from .environment import environment

    device = torch.device("cpu" if arguments.dry_run else "cuda")
    report = Report.read(arguments.out, arguments.section, arguments.until)
    report.until = arguments.until
    report.environment = environment(device) | ({"dry_run": "figures mean nothing"} if arguments.dry_run else {})
    section = importlib.import_module(f"benchmarks.gpu_report.{SECTIONS[arguments.section]}")
    section.run(report, device, arguments.dry_run, arguments.only)
    if arguments.section == "kernels":
        report.environment["plot"] = plot.draw(report)
    report.write()


def supervise(arguments: argparse.Namespace) -> Report:
    """Start the section; where a case ends its process, start it again without that case."""
    until = time.time() + arguments.seconds
    command = [sys.executable, "-m", "benchmarks.gpu_report", *sys.argv[1:], "--until", repr(until)]
    for _ in range(MOST_RESTARTS):
        reason = ""
        try:
            code = subprocess.run(command, check=False, timeout=max(10.0, until + 15 - time.time())).returncode
            if code == 0:
                break
            reason = f"the process ended with code {code}"
        except subprocess.TimeoutExpired:
            reason = "ran past the section's time and was ended"
        report = Report.read(arguments.out, arguments.section, until)
        if report.running is None:
            report.add("the section", "*", "failed", f"{reason}, between cases; see its output")
            break
        case, provider, *detail = report.running
        reason = "; ".join([*detail, reason])
        whole = provider in ("truth", "timing")
        report.excluded.append([case, "*" if whole else provider, f"{reason} (in {provider})"])
        report.rows = [row for row in report.rows if row.case != case]
        report.running = None
        if whole or time.time() > until:
            report.add(case, provider, "failed", reason)
        report.write()
        if time.time() > until:
            break
    return Report.read(arguments.out, arguments.section)


if __name__ == "__main__":
    raise SystemExit(main())
