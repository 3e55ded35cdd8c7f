"""Posteriors on disk: one safetensors file and one JSON file that names it, checked when they are read.

The tensors are written under a name made from their content; the JSON file, which refers to it, takes its place last
and in one step. A reader therefore sees the old posterior or the new one, never half of one. Of processes that write to
one folder at once, one goes after the other, where the file system knows locks; what killed ones left behind goes with
the next save.
"""

from __future__ import annotations

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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayesian_lora_kernels.posterior.description import check_description

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = "bayesian_lora_kernels.laplace"
VERSION = 3
JSON_NAME = "laplace.json"
LOCK_NAME = ".laplace.lock"
DAY = 24 * 3600
TEMPORARY = re.compile(r"\.laplace(?:\.json)?-(?:([A-Za-z0-9_.]+)-(\d+)-)?\w+")


def save(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> Path:
    """Write a posterior into a folder, whole or not at all.

    Args:
        folder: made if it is not there; other files in it stay.
        tensors: any device and dtype.
        description: what JSON can hold.

    Returns:
        The path of the JSON file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _locked(folder):
        before = _tensor_files(folder)
        # A folder, because safetensors, too, makes temporary files beside the one that it writes.
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f".laplace-{_writer()}-"))
        try:
            save_file(own, temporary / "tensors")
            digest = _file_digest(temporary / "tensors")
            target = folder / f"laplace-{digest[:16]}.safetensors"
            _into_place(temporary / "tensors", target)
        finally:
            _remove(temporary)
        content = {
            "format": FORMAT,
            "version": VERSION,
            **description,
            "tensors": {"file": target.name, "sha256": digest},
        }
        content["sha256"] = _content_digest(content)
        write_text(folder / JSON_NAME, json.dumps(content, indent=1) + "\n")
        for stale in {*(before - {target, folder / _named(folder)}), *_abandoned(folder)}:
            _remove(stale)
    return folder / JSON_NAME


def load(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote: tensors on the CPU, and the description.

    Raises:
        FileNotFoundError: if there is no posterior in the folder.
        ValueError: if a file is damaged, altered, of another kind, or of a newer version than this package reads.
    """
    path = Path(folder) / JSON_NAME
    content = _read_description(path)
    while True:
        tensors = path.with_name(content["tensors"]["file"])
        try:
            if _file_digest(tensors) != content["tensors"]["sha256"]:
                raise ValueError(f"{tensors}: damaged or altered, its content does not match its checksum")
            return load_file(tensors), content
        except FileNotFoundError as error:
            seen, content = content, _read_description(path)
            if content == seen:  # else it was replaced between the two readings
                raise FileNotFoundError(f"{tensors}: missing, {JSON_NAME} refers to it") from error
        except SafetensorError as error:
            raise ValueError(f"{tensors}: damaged: {error}") from error


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no posterior here; expected a folder that save_pretrained wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged, not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a posterior ({FORMAT})")
    version = content.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(
            f"{path}: written in format version {version}, this package reads up to version {VERSION}; update it"
        )
    if content.get("sha256") != _content_digest(content):
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


def _remove(path: Path) -> None:
    if path.is_dir():
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
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time, as far as platform and file system know locks. The file is gone afterwards."""
    if fcntl is None:
        yield
        return
    path = folder / LOCK_NAME
    while True:
        with open(path, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                path.unlink(missing_ok=True)
                yield
                return
            try:
                if not _is_same_file(file.fileno(), path):
                    continue  # its last holder has removed it
                try:
                    yield
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
        if match[1] == host and os.name == "posix":
            stale = not _is_alive(int(match[2]))
        else:
            try:
                stale = time.time() - path.stat().st_mtime > DAY
            except FileNotFoundError:
                continue
        if stale:
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


def _named(folder: Path) -> str:
    """The tensor file that the JSON file names: our own, unless another process came in between for want of a lock."""
    content = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    return str(content["tensors"]["file"])


def _tensor_files(folder: Path) -> set[Path]:
    return {path for path in folder.glob("laplace-*.safetensors") if len(path.stem) == len("laplace-") + 16}


def _content_digest(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
