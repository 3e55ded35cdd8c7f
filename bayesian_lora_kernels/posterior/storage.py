"""Posteriors on disk: one safetensors file and one JSON file that names it, checked when they are read.

The tensors are written under a name made from their content; the JSON file, which refers to it, takes its place last
and in one step. A reader therefore sees the old posterior or the new one, never half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = "bayesian_lora_kernels.laplace"
VERSION = 1
JSON_NAME = "laplace.json"


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
    before = _tensor_files(folder)
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".laplace-")
    os.close(handle)
    try:
        save_file(own, temporary)
        digest = _file_digest(Path(temporary))
        target = folder / f"laplace-{digest[:16]}.safetensors"
        _into_place(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    content = {
        "format": FORMAT,
        "version": VERSION,
        **description,
        "tensors": {"file": target.name, "sha256": digest},
    }
    content["sha256"] = _content_digest(content)
    write_text(folder / JSON_NAME, json.dumps(content, indent=1) + "\n")
    for stale in before - {target}:
        stale.unlink(missing_ok=True)
    return folder / JSON_NAME


def load(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote: tensors on the CPU, and the description.

    Raises:
        FileNotFoundError: if there is no posterior in the folder.
        ValueError: if a file is damaged, altered, of another kind, or of a newer version than this package reads.
    """
    path = Path(folder) / JSON_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no posterior here; expected a folder that save_pretrained wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged, not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a posterior ({FORMAT})")
    version = content.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"{path}: written in format version {version}, this package reads up to version {VERSION}; update it"
        )
    if content.get("sha256") != _content_digest(content):
        raise ValueError(f"{path}: damaged or altered, its content does not match its checksum")
    tensors = path.with_name(content["tensors"]["file"])
    if not tensors.is_file():
        raise FileNotFoundError(f"{tensors}: missing, {JSON_NAME} refers to it")
    if _file_digest(tensors) != content["tensors"]["sha256"]:
        raise ValueError(f"{tensors}: damaged or altered, its content does not match its checksum")
    try:
        return load_file(tensors), content
    except SafetensorError as error:
        raise ValueError(f"{tensors}: damaged: {error}") from error


def parameter_digest(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values; the same on every device."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        value = parameters[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        _into_place(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _into_place(temporary: str, target: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)  # a temporary file starts out private
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)


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
