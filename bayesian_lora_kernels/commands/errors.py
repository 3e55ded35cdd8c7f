"""Why a command stops: one line that says what is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FAILED, BAD_USE = 1, 2


class CommandError(Exception):
    """The command cannot go on. The message is one line."""

    code = FAILED

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).split()))


class InputError(CommandError):
    """Something the user gave cannot be used."""

    code = BAD_USE


@contextmanager
def as_failures(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds, as a `CommandError`."""
    try:
        yield
    except kinds as error:
        raise CommandError(error) from error


@contextmanager
def as_input_errors(what: str = "") -> Iterator[None]:
    """Errors that the library raises over the user's model, data or files, as an `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}{said(error)}") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{what}{error}") from error
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        raise InputError(f"{what}the device is out of memory; try a smaller --batch-size or --max-length") from error


@contextmanager
def writing(path: Path, option: str) -> Iterator[None]:
    """Errors over a file that an option names, as an `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written: {error.strerror or error}") from error


def said(error: OSError) -> str:
    """What the system says of which file, without its number."""
    if error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def absence(path: Path) -> str:
    """Why there is no folder."""
    return "a file" if path.exists() else "no such folder"


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Errors over a file of UTF-8 text, as an `InputError`; `what` it should be, such as `a text file`."""
    if path.is_dir():
        raise InputError(f"{path}: expected {what}, got a folder")
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text: {undecodable(error)}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def undecodable(error: UnicodeDecodeError) -> str:
    """Which byte, and why."""
    return f"byte {error.object[error.start]:#04x}, {error.reason}"


@contextmanager
def loading(what: str, done: str = "loaded") -> Iterator[None]:
    """Any error at all while other packages read the user's files, as an `InputError`: those files are to blame."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # a package in Rust gives up
            raise
        if _out_of_memory(error):
            raise InputError(f"{what}: the device is out of memory") from error
        raise InputError(f"{what}: cannot be {done}: {brief(error)}") from error


def brief(error: BaseException) -> str:
    """The first lines of an error's message, and its kind where the message alone says little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    plain = isinstance(error, (OSError, ValueError, RuntimeError, AssertionError)) and lines
    return " ".join(([] if plain else [f"{type(error).__name__}:"]) + lines[:2])


def _out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)
