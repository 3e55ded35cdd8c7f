"""What a section found, kept on disk after every step: JSON, CSV and a markdown table."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# In the order in which a reader should see them.
STATUSES = ("measured", "passed", "red", "failed", "skipped")
BAD = ("red", "failed")
# Exit code of a process whose CUDA context an error has ruined: every later call in it would fail too.
DEVICE_LOST = 75


@dataclass
class Row:
    """One provider of one case, or one step.

    Args:
        case: the name of the case.
        provider: who computed it.
        status: of STATUSES; red: the correctness gate did not pass, and no speed was taken.
        detail: the reason of a skip, the last lines of a traceback, what a reader must know.
        values: figures by name, units in the name.
    """

    case: str
    provider: str
    status: str
    detail: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """A section's results.

    Args:
        folder: where the files go.
        section: their name.
        until: `time.time()` at which the section should be over.
        environment: versions, device, commit.
        roofs: `bytes_per_second` and `operations_per_second` of this run.
        cases: what is known of each case beforehand.
        rows: the results.
        excluded: `[case, provider, reason]`, what ended the process in an earlier attempt; provider `*` is all.
        running: `[case, provider]` at work now; found in the file, it did not end well, for the reason that may follow.
    """

    folder: Path
    section: str
    until: float
    environment: dict[str, Any] = field(default_factory=dict)
    roofs: dict[str, float] = field(default_factory=dict)
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    excluded: list[list[str]] = field(default_factory=list)
    running: list[str] | None = None

    @property
    def path(self) -> Path:
        return self.folder / f"{self.section}.json"

    @classmethod
    def read(cls, folder: Path, section: str, until: float = 0.0) -> Report:
        """What an earlier process of the section left, or an empty report."""
        report = cls(folder, section, until)
        if report.path.exists():
            content = json.loads(report.path.read_text(encoding="utf-8"))
            content["rows"] = [Row(**row) for row in content["rows"]]
            del content["section"]
            vars(report).update(content)
        return report

    def left(self) -> float:
        """Seconds left of the section's budget."""
        return self.until - time.time()

    def add(self, case: str, provider: str, status: str, detail: str = "", **values: Any) -> Row:
        """Record a row, and write all files."""
        assert status in STATUSES, status
        row = Row(case, provider, status, detail, values)
        self.rows.append(row)
        self.write()
        return row

    def done(self, case: str) -> bool:
        return any(row.case == case for row in self.rows)

    def why_excluded(self, case: str, provider: str) -> str | None:
        return next((why for c, p, why in self.excluded if c == case and p in (provider, "*")), None)

    @contextmanager
    def attempt(self, case: str, provider: str) -> Iterator[None]:
        """Mark what runs; an error becomes a row, and the section goes on."""
        before, self.running = self.running, [case, provider]
        self.write()
        try:
            yield
        except Exception as error:  # whatever it is, the other cases must go on
            if device_is_lost():
                self.running = [case, provider, last_lines(error)]
                self.write()
                raise SystemExit(DEVICE_LOST) from error
            self.add(case, provider, "failed", last_lines(error))
        self.running = before
        self.write()

    def write(self) -> None:
        """All files, each moved into place whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {key: value for key, value in vars(self).items() if key not in ("folder", "until", "rows")}
        content["rows"] = [asdict(row) for row in self.rows]
        _replace(self.path, json.dumps(content, indent=1) + "\n")
        _replace(self.path.with_suffix(".md"), self.markdown())
        names = ["case", "provider", "status", "detail", *self.columns()]
        temporary = self.path.with_suffix(".csv.part")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row in self.rows:
                writer.writerow({key: value for key, value in asdict(row).items() if key != "values"} | row.values)
        os.replace(temporary, self.path.with_suffix(".csv"))

    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row.values))

    def markdown(self, brief: bool = False) -> str:
        """A table, where it comes from, and what was said of rows without figures; brief: without the skipped."""
        shown = [row for row in self.rows if not brief or row.status != "skipped"]
        columns = self.columns()
        lines = [f"# {self.section}", "", "; ".join(f"{key} {value}" for key, value in self.environment.items())]
        if self.roofs:
            bandwidth, rate = self.roofs["bytes_per_second"] / 1e12, self.roofs["operations_per_second"] / 1e12
            lines.append(f"\nThis run's copy bandwidth: {bandwidth:.3g} TB/s; bf16 matrix product: {rate:.4g} TFLOP/s.")
        titles = ["case", "provider", "status", *(column.replace("_", " ") for column in columns)]
        lines += ["", "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        for row in shown:
            cells = [row.case, row.provider, row.status, *(_cell(row.values.get(column)) for column in columns)]
            lines.append("| " + " | ".join(cells) + " |")
        details = [f"- {row.case}, {row.provider}: {row.detail}" for row in shown if row.detail]
        if brief and len(shown) < len(self.rows):
            details.append(f"- skipped: {len(self.rows) - len(shown)}, with the reasons in {self.section}.md")
        return "\n".join([*lines, "", *details]).rstrip() + "\n"


def last_lines(error: BaseException, count: int = 3) -> str:
    """The end of a traceback: the last frames of it, and the message."""
    text = "".join(traceback.format_exception(error)).strip().splitlines()
    return " / ".join(line.strip() for line in text[-2 * count :])[-800:]


def device_is_lost() -> bool:
    """Whether CUDA is in use in this process and does not answer any more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except torch.OutOfMemoryError:
        return False
    except RuntimeError:
        return True
    return False


def each(report: Report, names: list[str], run: Callable[[str], None], reserve: float = 20.0) -> None:
    """Run every case in order while there is time; the rest is skipped, and that is said."""
    for name in names:
        if report.done(name):
            continue
        if report.left() < reserve:
            report.add(name, "*", "skipped", "the section's time was over")
            continue
        run(name)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
