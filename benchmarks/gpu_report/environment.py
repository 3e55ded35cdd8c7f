"""What a measurement depends on besides the code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "peft", "numpy", "bayesian-lora")
ROOT = Path(__file__).parents[2]


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, commit, date. `BLK_COMMIT` names the commit where the tree is no repository."""
    from bayesian_lora_kernels.ops import backends

    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "commit": commit()}
    found |= {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    found["device"] = device_name(device)
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "driver": driver()}
        found["multiprocessors"] = torch.cuda.get_device_properties(device).multi_processor_count
    for name, backend in backends().items():
        found[f"{name}_backend"] = backend["reason"] or "available"
    found |= {name: value for name, value in os.environ.items() if name.startswith(("BLK_", "TRITON_"))}
    return found


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    named = os.environ.get("BLK_COMMIT")
    if named:
        return named
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    return head + (" with changes" if _output("git", "-C", str(ROOT), "status", "--porcelain") else "")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}"


def driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
