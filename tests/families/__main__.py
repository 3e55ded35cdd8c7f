"""`make models`: measures all rows in two processes and writes docs/models.md; `--check` compares with it instead."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from pathlib import Path

import peft
import torch
import transformers

from .recipes import FAMILIES
from .run import RECIPES, all_rows
from .table import document

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="families", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if docs/models.md would change")
    parser.add_argument("--only", metavar="NAME", help="rows whose name has this in it; writes nothing")
    chosen = parser.parse_args(arguments)
    indices = [i for i, one in enumerate(RECIPES) if not chosen.only or chosen.only.lower() in one.name.lower()]
    if not indices:
        parser.error(f"--only: no row has {chosen.only!r} in its name")
    rows = all_rows(indices)
    bad = sum(one.bad for row in rows.values() for one in row.cells.values())
    if bad:
        print(f"{bad} cells are WRONG or FAILED")
    if chosen.only:
        return int(bad > 0)
    versions = {"transformers": transformers.__version__, "PEFT": peft.__version__, "PyTorch": torch.__version__}
    versions["PyTorch"] = versions["PyTorch"].split("+")[0]  # without what it was built for
    families = [rows[i] for i in range(len(FAMILIES))]
    text = document(families, [rows[i] for i in range(len(FAMILIES), len(RECIPES))], versions)
    if chosen.check:
        before = DOCUMENT.read_text() if DOCUMENT.exists() else ""
        names = ("docs/models.md", "measured")
        changes = "\n".join(difflib.unified_diff(before.splitlines(), text.splitlines(), *names, lineterm=""))
        if changes:
            print(f"{changes}\ndocs/models.md is not what was measured: run make models, and look at what changed")
        return int(bool(bad or changes))
    partial = DOCUMENT.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, DOCUMENT)
    print(f"wrote {DOCUMENT.relative_to(DOCUMENT.parents[1])}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
