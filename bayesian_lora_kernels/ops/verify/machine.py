"""What a verdict holds for, where it is kept, and how work on a device is ordered. Nothing else here knows CUDA."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from .. import native
from ..device import interpreting

OPERATIONS = Path(__file__).resolve().parent.parent
FOLDER_VARIABLE = "BLK_CACHE"


@functools.cache
def facts(device: torch.device) -> dict[str, str]:
    """Everything that may change what a kernel computes on ``device``, as text."""
    found = {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": str(torch.version.cuda),
        "sources": _digest(OPERATIONS),
        "native": json.dumps(native.build_info(), sort_keys=True) if native.why_unavailable() is None else "none",
        "interpreter": str(interpreting()),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "driver": _driver(),
        }
    return found


def _triton_version() -> str:
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is None:
        return "none"
    from importlib.metadata import version

    return version("triton")


def _driver() -> str:
    """As the kernel module tells it, else the CUDA version that the driver knows."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except OSError:
        return str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")())


def _digest(folder: Path) -> str:
    """Of every Python file below the folder, and its name."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """``BLK_CACHE``, else ``bayesian_lora_kernels`` in the user's cache folder."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bayesian_lora_kernels"


def one_of_many() -> bool:
    """Whether this process is one of several of a launcher's."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1) > 1


class Runtime:
    """How work on a device is waited for and ordered."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for everything that was launched; errors of kernels come out here."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def now(self) -> AbstractContextManager[None]:
        """Launch as things are."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def late(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Launch on a side stream on which the tensors get their values only after a while."""
        if not self._cuda:
            yield
            return
        kept = [(tensor, tensor.clone()) for tensor in tensors]
        for tensor, _ in kept:
            tensor.zero_()
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            for tensor, value in kept:
                tensor.copy_(value)
            yield
        torch.cuda.current_stream(self.device).wait_stream(side)

    def seconds(self, call: Callable[[], None]) -> float:
        """How long a call takes, with what it launches."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start
