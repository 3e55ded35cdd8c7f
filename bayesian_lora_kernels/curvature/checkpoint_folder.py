"""Named parts of a state in a folder, replaced all at once: JSON that names tensor files, with lengths and digests.

The JSON file takes its place last and in one step: a kill leaves the parts as they were before or as they are
afterwards. Rows that only grow are in files of their own, of which every writing adds one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayesian_lora_kernels.curvature.state import Packer, unpack

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = "bayesian_lora_kernels.checkpoint"
VERSION = 2  # 1 did not count the targets of a regression
JSON_NAME, LOCK_NAME, WRITING = "checkpoint.json", ".lock", "writing"

_locks: set[int] = set()  # descriptors of the folders that this process holds
if hasattr(os, "register_at_fork"):  # a loader's workers outlive a killed fit for some seconds, and must not hold them
    os.register_at_fork(after_in_child=lambda: deque(map(os.close, _locks), maxlen=0))


class CheckpointFolder:
    """The parts of a state, as they were last written; made by `held`.

    Attributes:
        parts: the names of those that are there.
        identity: whose state it is, as JSON; None if there is none.

    Raises:
        ValueError: if a file is damaged, missing, of another kind, or of another version than this package reads.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._content: dict[str, Any] = self._read()
        self._check_files()
        self._remove_others()

    @property
    def parts(self) -> list[str]:
        """See the class."""
        return list(self._content["parts"])

    @property
    def identity(self) -> Any:
        """See the class."""
        return self._content["identity"]

    def read(self, part: str, device: Callable[[str], torch.device] = torch.device) -> Any:
        """The state of a part; of rows, an iterable of blocks `{name: [m, d]}`.

        Args:
            part: its name.
            device: that takes the place of one with this name; as it is: tensors are where they were.
        """
        packed = self._content["parts"][part]
        with safe_open(self.folder / packed["file"], framework="pt") as file:
            return unpack(packed["state"], file.get_tensor, lambda name: self._blocks(packed["rows"][name]), device)

    def write(self, identity: Any, parts: Mapping[str, Any]) -> None:
        """Replace some parts, and keep the others.

        Raises:
            OSError: if that cannot be done; everything is as it was then.
        """
        content = {**self._content, "identity": identity, "serial": self._content["serial"] + 1}
        content["parts"] = dict(self._content["parts"])
        (self.folder / WRITING).mkdir(exist_ok=True)
        try:
            for name, state in parts.items():
                content["parts"][name] = self._pack(name, state, content["serial"])
            content["digest"] = _content_digest(content)
            _sync(self.folder)
            self._put(JSON_NAME, lambda path: path.write_text(json.dumps(content), encoding="utf-8"))
            self._content = content
            _sync(self.folder)
        except SafetensorError as error:  # what it makes of the system's errors
            raise OSError(str(error)) from error
        finally:
            shutil.rmtree(self.folder / WRITING, ignore_errors=True)
        self._remove_others()

    def clear(self) -> None:
        """Remove all parts."""
        (self.folder / JSON_NAME).unlink(missing_ok=True)  # first: files that nothing names are nothing
        self._content = _nothing()
        self._remove_others()

    def _pack(self, name: str, state: Any, serial: int) -> dict[str, Any]:
        packer, label = Packer(), f"{name.replace(' ', '-')}-{serial}"
        packed: dict[str, Any] = {"state": packer.pack(state), "rows": {}, "files": {}}
        before = self._content["parts"].get(name, {"rows": {}, "files": {}})
        for key, rows in packer.rows.items():
            blocks = list(before["rows"].get(key, ()))
            packed["files"] |= {file: before["files"][file] for file, _ in blocks}
            start = sum(count for _, count in blocks)
            if rows.count > start:
                file = f"{label}-rows-{key}.safetensors"
                packed["files"][file] = self._put_tensors(file, rows.since(start))
                blocks.append([file, rows.count - start])
            packed["rows"][key] = blocks
        packed["file"] = f"{label}.safetensors"
        packed["files"][packed["file"]] = self._put_tensors(packed["file"], packer.tensors)
        return packed

    def _blocks(self, blocks: list[list[Any]]) -> Iterator[Mapping[str, Tensor]]:
        for file, _ in blocks:
            with safe_open(self.folder / file, framework="pt") as tensors:
                yield {name: tensors.get_tensor(name).clone() for name in tensors.keys()}  # noqa: SIM118

    def _put_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        own = {key: _apart(tensor) for key, tensor in tensors.items()}
        return self._put(name, lambda path: save_file(own, path))

    def _put(self, name: str, write: Callable[[Path], Any]) -> dict[str, Any]:
        """A file, whole or not at all; its length and digest."""
        temporary = self.folder / WRITING / name
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        described = _described(temporary)
        os.replace(temporary, self.folder / name)
        return described

    def _remove_others(self) -> None:
        """What was left by a writing that did not come to its end, and what a new one has replaced."""
        named = {file for part in self._content["parts"].values() for file in part["files"]}
        shutil.rmtree(self.folder / WRITING, ignore_errors=True)
        for path in self.folder.glob("*.safetensors"):
            if path.name not in named:
                with suppress(OSError):
                    path.unlink()

    def _read(self) -> dict[str, Any]:
        path = self.folder / JSON_NAME
        if not path.exists():
            return _nothing()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: damaged, not JSON: {error}; {ADVICE}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path}: expected a checkpoint ({FORMAT})")
        if content.get("version") != VERSION:
            raise ValueError(
                f"{path}: written in format version {content.get('version')}, this package reads version {VERSION}; "
                f"{ADVICE}"
            )
        if content.get("digest") != _content_digest(content):
            raise ValueError(f"{path}: damaged or altered, its content does not match its checksum; {ADVICE}")
        return content

    def _check_files(self) -> None:
        for part in self._content["parts"].values():
            for name, expected in part["files"].items():
                path = self.folder / name
                if not path.is_file():
                    raise ValueError(f"{path}: missing, {JSON_NAME} refers to it; {ADVICE}")
                found = {"bytes": path.stat().st_size}
                if found["bytes"] != expected["bytes"]:
                    raise ValueError(
                        f"{path}: damaged, expected {expected['bytes']} bytes, got {found['bytes']}; {ADVICE}"
                    )
                if _described(path) != expected:
                    raise ValueError(f"{path}: damaged or altered, its content does not match its checksum; {ADVICE}")


ADVICE = "remove the folder to start the fit again"


@contextmanager
def held(folder: Path) -> Iterator[CheckpointFolder]:
    """A folder, made if it is not there, for this process alone, until it ends or is killed.

    Raises:
        OSError: if another fit holds it, or it cannot be made or written to.
        ValueError: as `CheckpointFolder`.
    """
    with locked(folder):
        yield CheckpointFolder(folder)
    with suppress(OSError):  # something is in it
        folder.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A folder, made if it is not there, in which no other process is inside such a block.

    Raises:
        OSError: if one is, or the folder cannot be made or written to.
    """
    descriptor = _locked(folder)
    try:
        yield
    finally:
        (folder / LOCK_NAME).unlink(missing_ok=True)
        _release(descriptor)


def _locked(folder: Path) -> int:
    """A descriptor of the lock file, held by this process alone."""
    path = folder / LOCK_NAME
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _locks.add(descriptor)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _release(descriptor)
            raise BlockingIOError(
                f"{folder}: another fit writes its checkpoints there; pass another folder, or wait for its end"
            ) from None
        except OSError:  # a file system without locks
            return descriptor
        if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
        _release(descriptor)  # of a file that the fit before has just removed


def _release(descriptor: int) -> None:
    _locks.discard(descriptor)
    os.close(descriptor)


def _sync(folder: Path) -> None:
    """Names of files, too, outlive a loss of power."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _nothing() -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "serial": 0, "identity": None, "parts": {}}


def _apart(tensor: Tensor) -> Tensor:
    """On the CPU, with memory of its own."""
    own = tensor.detach().cpu().contiguous()
    whole = own.untyped_storage().nbytes() == own.numel() * own.element_size()
    return own if whole and own.numel() > 1 else own.clone()


def _described(path: Path) -> dict[str, Any]:
    digest, length = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            length += len(block)
    return {"bytes": length, "digest": digest.hexdigest()}


def _content_digest(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
