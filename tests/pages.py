"""Runs the code blocks of a documentation page; `python -m pages FILE...` writes what they print into the page.

A page's blocks run in order in one namespace and one empty folder:

- `python`: is executed; what it prints is the `text` block right after it. `python file=NAME`: is written to that file.
- `console`, `sh`: every line `$ blk ...` or `$ torchrun ...` is that command; in `console` what it prints stands below.
- `<!-- setup`, up to `-->`: Python that a reader does not see, for pages that speak of a model of the reader's own.

A block whose info string says `no-run` is not run. Numbers may differ as `NUMBERS` says, and seconds in any way.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bayesian_lora_kernels.cli import main as blk

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(
        page for page in (ROOT / "docs").rglob("*.md") if not {"_build", "results"} & set(page.relative_to(ROOT).parts)
    ),
]
# Training on another machine ends at other numbers, closer than this.
NUMBERS: dict[str, Any] = {"rel": 0.1, "abs": 0.03}

_BLOCK = re.compile(
    r"^```(?P<language>python|console|sh)(?P<info>[^\n]*)\n(?P<code>.*?)^```\n"
    r"(?:\n```text\n(?P<printed>.*?)^```\n)?"
    r"|^<!-- setup\n(?P<setup>.*?)^-->\n",
    re.MULTILINE | re.DOTALL,
)
_PICTURE = re.compile(r"!\[[^\]]*\]\(([\w-]+\.(?:png|svg))\)")
_SECONDS = re.compile(r"\b\d+(?:\.\d+)? s\b")
_NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A piece of code of a page, where it is, and what the page says that it prints."""

    language: str
    code: str
    printed: str
    start: int
    stop: int
    line: int
    runs: bool = True
    file: str | None = None


def blocks(text: str) -> list[Block]:
    """Those of a page, in order; a console block's commands and what they print are one `code`."""
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["setup"] is not None:
            found.append(Block("setup", match["setup"], "", match.start(), match.end(), line))
            continue
        info = match["info"].split()
        file = next((word.removeprefix("file=") for word in info if word.startswith("file=")), None)
        code, printed = match["code"], match["printed"] or ""
        place = match.start(), match.end(), line
        found.append(Block(match["language"], code, printed, *place, "no-run" not in info, file))
    return found


def run(page: Path, folder: Path) -> Iterator[tuple[Block, Block]]:
    """Each block that runs, as the page has it and as it came out, in `folder`.

    Raises:
        AssertionError: if a command's exit code is not 0.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with _inside(folder):
        for block in blocks(page.read_text(encoding="utf-8")):
            if not block.runs:
                continue
            if block.file is not None:
                Path(block.file).write_text(block.code, encoding="utf-8")
                yield block, block
            elif block.language in ("python", "setup"):
                source = "\n" * block.line + block.code
                code = compile(source, str(page), "exec")
                yield block, replace(block, printed=_printed(lambda code=code: exec(code, namespace)))
            else:
                yield block, replace(block, code=_session(block, page))


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """There, as a script is: its modules are found, and forgotten afterwards, as is the default dtype."""
    before, modules, dtype = Path.cwd(), set(sys.modules), torch.get_default_dtype()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        os.chdir(before)
        torch.set_default_dtype(dtype)
        sys.path.remove(str(folder))
        for name in set(sys.modules) - modules:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == folder:
                del sys.modules[name]


def _session(block: Block, page: Path) -> str:
    """The commands of a block, each with what it prints below it."""
    lines = block.code.splitlines()
    commands = [line for line in lines if line.startswith("$ ")] if block.language == "console" else lines
    shown = []
    for command in commands:
        program, *words = shlex.split(command.removeprefix("$ "), comments=True)
        assert program in PROGRAMS, f"{page.name}:{block.line}: {program} cannot be run here; mark the block no-run"

        def call(program: str = program, words: list[str] = words, command: str = command) -> None:
            assert PROGRAMS[program](words) == 0, f"{page.name}:{block.line}: {command}"

        printed = _printed(call)
        shown.append(f"{command}\n{printed}" if block.language == "console" else f"{command}\n")
    return "".join(shown)


def _torchrun(words: list[str]) -> int:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    print(done.stdout, end="")
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return done.returncode


PROGRAMS: dict[str, Callable[[list[str]], int]] = {"blk": blk, "torchrun": _torchrun}


def _printed(call: Any) -> str:
    """What goes to stdout, without blanks at the ends of lines."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        call()
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def same(shown: str, printed: str) -> bool:
    """Whether two texts are the same but for seconds and what numbers may differ by."""
    shown, printed = (_SECONDS.sub("0 s", text) for text in (shown, printed))
    if [_NUMBER.sub("0", line).split() for line in shown.splitlines()] != [
        _NUMBER.sub("0", line).split() for line in printed.splitlines()
    ]:
        return False
    ours, theirs = ([float(x.replace(",", "")) for x in _NUMBER.findall(text)] for text in (shown, printed))
    return ours == pytest.approx(theirs, **NUMBERS)


def pictures(page: Path) -> list[str]:
    """Names of the pictures beside a page, which its code makes."""
    return _PICTURE.findall(page.read_text(encoding="utf-8"))


def write(page: Path) -> None:
    """Run a page and put into it what its blocks print; its pictures go beside it."""
    text = page.read_text(encoding="utf-8")
    out, at = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for block, found in run(page, Path(folder)):
            out.append(text[at : block.start])
            at = block.stop
            if block.language == "setup":
                out.append(text[block.start : block.stop])
                continue
            head = text[block.start :].split("\n", 1)[0]
            out.append(f"{head}\n{found.code}```\n")
            if found.printed:
                out.append(f"\n```text\n{found.printed}```\n")
        for name in pictures(page):
            if (Path(folder) / name).exists():
                shutil.copy(Path(folder) / name, page.parent / name)
    page.write_text("".join([*out, text[at:]]), encoding="utf-8")


if __name__ == "__main__":
    logging.getLogger("bayesian_lora_kernels").setLevel(logging.WARNING)
    os.environ.setdefault("MPLBACKEND", "agg")
    for name in sys.argv[1:]:
        write(Path(name).resolve())
        print(f"wrote {name}")
