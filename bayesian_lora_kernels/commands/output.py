"""What a command gives: text, JSON beside it or instead, warnings, hints, progress; and what it must not write over."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayesian_lora_kernels.commands import terminal
from bayesian_lora_kernels.commands.errors import InputError, writing
from bayesian_lora_kernels.commands.parts import Part

if TYPE_CHECKING:
    from tqdm import tqdm

STDOUT = Path("-")  # as --json
PICTURES = (".png", ".pdf", ".svg")
# What is read, in the words of an error.
SOURCES = {
    "data": "the file of examples",
    "held_out": "the file of held-out examples",
    "test": "the file of test examples",
    "queries": "the file of queries",
    "text": "the text",
    "shift": "a file of examples",
}
MODEL_FILES = (".safetensors", ".bin", "config.json", "tokenizer.json", "tokenizer_config.json")


def show(args: Namespace, *parts: Part) -> None:
    """Print parts one below the other, unless `--json -` has stdout for itself.

    Raises:
        InputError: if stdout takes no more, as on a full disk.
        BrokenPipeError: if nobody reads it.
    """
    if args.json != STDOUT:
        for part in parts:
            write(terminal.text_of(part, sys.stdout) or f"{part}\n")


def write(text: str) -> None:
    """To stdout, at once; raises as `show` does."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        give_up_stdout()
        raise InputError(f"stdout: cannot be written: {error.strerror}") from error


def give_up_stdout() -> None:
    """What is still to be written goes nowhere, and is no second error when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_json(path: Path | None, content: Any) -> None:
    """One JSON document, if there is a place for it.

    Raises:
        InputError: if it cannot be written.
    """
    if path is None:
        return
    text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if path == STDOUT:
        write(text)
        return
    from bayesian_lora_kernels.posterior.storage import write_text

    with writing(path, "--json"):
        write_text(path, text)


def finite(value: Any) -> Any:
    """JSON knows no infinity."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def warn(message: str) -> None:
    """One line on stderr."""
    say("warning", message, "yellow")


def hint(message: str) -> None:
    """One line on stderr that is no reproach."""
    say("hint", message, "cyan")


def say(label: str, message: str, colour: str) -> None:
    """One line on stderr, which begins with a word in this colour."""
    print(terminal.labelled(label, message, colour, sys.stderr) or f"{label}: {message}", file=sys.stderr)


def watched() -> bool:
    """Whether progress has someone to see it."""
    return sys.stderr.isatty()


def bar(*args: Any, shown: bool = True, **options: Any) -> tqdm[Any]:
    """Progress on stderr, where it is watched; options are those of tqdm."""
    from tqdm.auto import tqdm

    return tqdm(*args, disable=not (shown and watched()), dynamic_ncols=True, leave=None, **options)


def check_outputs(args: Namespace) -> None:
    """Before long work: can the files be written that `--html`, `--plot`, `--plot-risk` and `--json` name?

    Raises:
        InputError: if one cannot, or is what the command reads, or what another option names.
    """
    options = vars(args)
    taken: dict[Path, str] = {}
    for name in ("html", "plot", "plot_risk", "json"):
        path, option = options.get(name), f"--{name.replace('_', '-')}"
        if path is None or (name == "json" and path == STDOUT):
            continue
        _check_file(path, option)
        if (other := taken.setdefault(path.resolve(), option)) != option:
            raise InputError(f"{option} {path}: {other} names the same file")
        for source, what in _sources(options):
            if path.exists() and source.exists() and path.samefile(source):
                raise InputError(f"{option} {path}: this is {what}")
        if not name.startswith("plot"):
            continue
        if path.suffix.lower() not in PICTURES:
            raise InputError(f"{option} {path}: expected a name that ends in {', '.join(PICTURES)}")
        if find_spec("matplotlib") is None:
            raise InputError(f"{option}: needs matplotlib; pip install matplotlib")


def _sources(options: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    for name, what in SOURCES.items():
        found = options.get(name) or []
        yield from ((path, what) for path in (found if isinstance(found, list) else [found]))


def _check_file(path: Path, option: str) -> None:
    if path.is_dir():
        raise InputError(f"{option} {path}: expected a file, this is a folder")
    if path.exists() and not path.is_file():
        raise InputError(f"{option} {path}: expected a file, this is a device or a pipe (--json - writes to stdout)")
    if path.name == "laplace.json" or (path.exists() and path.name.endswith(MODEL_FILES)):
        raise InputError(f"{option} {path}: this is a file of a model or a posterior; give another name")
    if not path.parent.is_dir():
        missing = "does not exist" if not path.parent.exists() else "is a file"
        raise InputError(f"{option} {path}: the folder {path.parent} {missing}")
    _check_writable(path.parent, f"{option} {path}")


def check_folder(path: Path, option: str) -> None:
    """Before long work: can files be written into this folder, which may not be there yet?

    Raises:
        InputError: if it, or the first of its parents that exists, is a file or read-only.
    """
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"{option}{path}: {existing} is a file, expected a folder")
    _check_writable(existing, f"{option}{path}")


def _check_writable(folder: Path, what: str) -> None:
    """By a file without a name: permissions alone say little, of a read-only file system or to root."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{what}: the folder {folder} cannot be written to: {error.strerror}") from error
