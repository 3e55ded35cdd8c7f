"""Posteriors on disk: one safetensors file and one JSON file that names it, checked when they are read.

The tensors are written under a name made from their content; the JSON file, which refers to it, takes its place last
and in one step. A reader therefore sees the old posterior or the new one, never half of one. Of processes that write to
one folder at once, one goes after the other, where the file system knows locks; what killed ones left behind goes with
the next save.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.posterior.description import check_description
from bayesian_lora_kernels.posterior.tensor_file import Columns, TensorFile, write_tensors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = "bayesian_lora_kernels.laplace"
VERSION = 4
JSON_NAME = "laplace.json"
LOCK_NAME = ".laplace.lock"
JSON_BYTES = 100 * 10**6  # as much as safetensors allows a header
DAY = 24 * 3600
TRIES, PAUSE = 10, 0.01  # how often, and after how many seconds, a reader looks again for tensors that JSON names
TEMPORARY = re.compile(r"\.laplace(?:\.json)?-(?:([A-Za-z0-9_.]+)-(\d+)-)?\w+")


def save(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor | Columns], description: Mapping[str, Any]
) -> Path:
    """Write a posterior into a folder, whole or not at all.

    Args:
        folder: made if it is not there; other files in it stay.
        tensors: of floats, on any device; no more than one of them, or a piece of one, is copied at a time.
        description: what JSON can hold.

    Returns:
        The path of the JSON file.

    Raises:
        OSError: if it cannot be written: what was there before is there still, and nothing else.
    """
    folder = Path(folder)
    with _errors_name(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder) as alone:
            try:
                _write(folder, tensors, description)
            finally:
                _tidy(folder, alone)
    return folder / JSON_NAME


def hand_over(tensors: Mapping[str, Tensor | Columns]) -> None:
    """What `save` asks of the tensors, in the same order, for another process that saves them."""
    write_tensors(Path(os.devnull), tensors)


def _write(folder: Path, tensors: Mapping[str, Tensor | Columns], description: Mapping[str, Any]) -> None:
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".laplace-{_writer()}-")
    os.close(handle)
    try:
        write_tensors(Path(temporary), tensors)
        digest = file_digest(Path(temporary))
        target = folder / f"laplace-{digest[:16]}.safetensors"
        _into_place(temporary, target)
    finally:
        _remove(Path(temporary))
    content = {
        "format": FORMAT,
        "version": VERSION,
        **description,
        "tensors": {"file": target.name, "sha256": digest},
    }
    content["sha256"] = content_digest(content)
    write_text(folder / JSON_NAME, json.dumps(content, indent=1) + "\n")


def _tidy(folder: Path, alone: bool) -> None:
    """Remove tensors that the JSON file does not name, and temporary files of the dead.

    Who is not alone leaves tensors for a day: another process may be about to name them.
    """
    for path in _abandoned(folder):
        _remove(path)
    path = folder / JSON_NAME
    try:
        named = json.loads(path.read_bytes())["tensors"]["file"] if path.is_file() else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return  # damaged: whose tensors these are is not to be known
    for path in folder.glob("laplace-*.safetensors"):
        if len(path.stem) == len("laplace-") + 16 and path.name != named and (alone or _is_old(path)):
            _remove(path)


def load(folder: str | os.PathLike[str]) -> tuple[TensorFile, dict[str, Any]]:
    """Read what `save` wrote: the description, and tensors that are read when they are asked for.

    The checksum of the whole file is compared before, its header with its length.

    Raises:
        FileNotFoundError: if there is no posterior in the folder.
        ValueError: if a file is damaged, altered, of another kind, or of a newer version than this package reads.
        OSError: if a file cannot be read.
    """
    path, tries = Path(folder) / JSON_NAME, 0
    content = _read_description(path)
    while True:
        tensors = path.with_name(content["tensors"]["file"])
        try:
            if tensors.exists() and not tensors.is_file():
                raise ValueError(f"{tensors}: expected a file")
            if file_digest(tensors) != content["tensors"]["sha256"]:
                raise ValueError(f"{tensors}: damaged or altered, its content does not match its checksum")
            return TensorFile(tensors), content
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            # Others replaced both files meanwhile; some of them, perhaps, by those that were there before.
            seen, content = content, _read_description(path)
            tries = tries + 1 if content == seen else 0
            if tries == TRIES:
                raise FileNotFoundError(f"{tensors}: missing, {JSON_NAME} refers to it") from error
            time.sleep(PAUSE)


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no posterior here; expected a folder that save_pretrained wrote")
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > JSON_BYTES:
            raise ValueError(f"{path}: expected at most {JSON_BYTES:,} bytes of JSON, got {size:,}")
        text = file.read()
    try:
        content = json.loads(text.decode())
        digest = content_digest(content) if isinstance(content, dict) else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a posterior ({FORMAT})")
    version = content.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(
            f"{path}: written in format version {version!r:.80}, this package reads up to version {VERSION}; update it"
        )
    if content.get("sha256") != digest:
        raise ValueError(f"{path}: damaged or altered, its content does not match its checksum")
    try:
        check_description(content, version)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return content


def adapter_digest(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values; the same on every device, and in every dtype that holds the values."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        value = parameters[name].detach()
        digest.update(f"{name} {list(value.shape)}\n".encode())
        for piece in value.reshape(-1).split(2**20):
            # A copy: of a tensor that NumPy has seen the storage cannot be freed, as FSDP does.
            digest.update(piece.to("cpu", torch.float64, copy=True).numpy().data)
    return digest.hexdigest()


def parameter_digest(parameters: Mapping[str, Tensor]) -> str:
    """That of format version 1: SHA-256 over names, dtypes, shapes and values; the same on every device."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        value = parameters[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-{_writer()}-")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        _into_place(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def _errors_name(folder: Path) -> Iterator[None]:
    """Errors of the system that name no file (a full disk) name the folder."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(folder)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():  # temporary ones of earlier versions
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _into_place(temporary: str | Path, target: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)  # a temporary file starts out private
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """One writer at a time; False where platform or file system know no locks. The lock's file is gone afterwards."""
    if fcntl is None:
        yield False
        return
    path = folder / LOCK_NAME
    while True:
        with open(path, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                path.unlink(missing_ok=True)
                yield False
                return
            try:
                if not _is_same_file(file.fileno(), path):
                    continue  # its last holder has removed it
                try:
                    yield True
                finally:
                    path.unlink(missing_ok=True)
                return
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # also for children that were forked meanwhile


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _writer() -> str:
    """This process, as part of the names of its temporary files."""
    return f"{re.sub(r'[^A-Za-z0-9.]', '_', socket.gethostname())}-{os.getpid()}"


def _abandoned(folder: Path) -> set[Path]:
    """Temporary files of processes that are dead, or whose state is not to be known and that are a day old."""
    host, _, _ = _writer().rpartition("-")
    found = set()
    for path in folder.glob(".laplace*-*"):
        match = TEMPORARY.fullmatch(path.name)
        if match is None:
            continue
        ours = match[1] == host and os.name == "posix"
        if not _is_alive(int(match[2])) if ours else _is_old(path):
            found.add(path)
    return found


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > DAY
    except FileNotFoundError:
        return False


def content_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of what a JSON file says, but for its own."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
