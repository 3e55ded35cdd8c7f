"""Masks and labels come from the host; there they can still be read without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# {tensor on a device: its numbers on the host, and its version then}
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def to_device(tensor: Tensor, device: torch.device | None) -> Tensor:
    """`tensor` on a device (None: where it is), without waiting for it; of integers and flags the host keeps a copy."""
    if device is None or tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device=device)
    host = tensor.contiguous()
    host = host.pin_memory() if device.type == "cuda" else host
    moved = host.to(device, non_blocking=True)
    _remember(moved, host)
    return moved


def on_host(tensor: Tensor) -> Tensor:
    """The same numbers on the host, if they are known there; else the tensor itself."""
    whole = tensor if tensor._base is None else tensor._base
    host, version = _known.get(whole, (None, 0))
    if host is None or tensor._version != version or tensor.dtype != host.dtype:
        return tensor
    return host if whole is tensor else host.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def both(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function of tensors, computed on the host as well if their numbers are known there."""
    result, hosts = function(*tensors), [on_host(tensor) for tensor in tensors]
    if result._base is None and all(host is not one for host, one in zip(hosts, tensors, strict=True)):
        _remember(result, function(*hosts).contiguous())
    return result


def _remember(tensor: Tensor, host: Tensor) -> None:
    if not tensor.is_floating_point() and tensor.is_contiguous():
        _known[tensor] = host, tensor._version
