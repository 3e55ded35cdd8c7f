"""Tables on the screen, files, warnings, hints."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bayesian_lora_kernels.commands.errors import InputError, as_input_errors

PICTURES = (".png", ".pdf", ".svg")
SOURCES = {
    "data": "the file of examples",
    "held_out": "the file of held-out examples",
    "test": "the file of test examples",
    "text": "the text",
}


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of equal length with their columns aligned: the first `left` to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def pairs(items: Sequence[tuple[str, str]]) -> str:
    """One `name  value` per line."""
    width = max(len(name) for name, _ in items)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in items)


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"warning: {message}", file=sys.stderr)


def hint(message: str) -> None:
    """One line on stderr that is no reproach."""
    print(f"hint: {message}", file=sys.stderr)


def check_outputs(args: Namespace) -> None:
    """Before long work: can the files be written that `--html`, `--plot`, `--plot-risk` and `--json` name?

    Raises:
        InputError: if one cannot, or is what the command reads, or what another option names.
    """
    options = vars(args)
    taken: dict[Path, str] = {}
    for name in ("html", "plot", "plot_risk", "json"):
        path, option = options.get(name), f"--{name.replace('_', '-')}"
        if path is None:
            continue
        _check_file(path, option)
        if (other := taken.setdefault(path.resolve(), option)) != option:
            raise InputError(f"{option} {path}: {other} names the same file")
        for key, what in SOURCES.items():
            source = options.get(key)
            if source is not None and path.exists() and source.exists() and path.samefile(source):
                raise InputError(f"{option} {path}: this is {what}")
        if not name.startswith("plot"):
            continue
        if path.suffix.lower() not in PICTURES:
            raise InputError(f"{option} {path}: expected a name that ends in {', '.join(PICTURES)}")
        if find_spec("matplotlib") is None:
            raise InputError(f"{option}: needs matplotlib; pip install matplotlib")


def _check_file(path: Path, option: str) -> None:
    if path.is_dir():
        raise InputError(f"{option} {path}: expected a file, this is a folder")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{option} {path}: the folder {path.parent} cannot be written to")


def check_folder(path: Path, option: str) -> None:
    """Before long work: can files be written into this folder, which may not be there yet?

    Raises:
        InputError: if it, or the first of its parents that exists, is a file or read-only.
    """
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"{option}{path}: {existing} is a file, expected a folder")
    if not os.access(existing, os.W_OK):
        raise InputError(f"{option}{path}: the folder {existing} cannot be written to")


def write_json(path: Path | None, content: Any) -> None:
    """One JSON document, if there is a place for it."""
    if path is not None:
        from bayesian_lora_kernels.posterior.storage import write_text

        with as_input_errors("--json: "):
            write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
