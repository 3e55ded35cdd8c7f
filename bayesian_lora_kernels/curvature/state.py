"""What a fit has in hand, as JSON and tensors: sums, the random numbers that its data depend on, digests of batches."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from bayesian_lora_kernels.model.containers import is_record, items_of

UNKNOWN = b"?"  # what digests begin with of objects whose values nobody knows


class Stateful(Protocol):
    """What a checkpoint keeps of some sums.

    State is made of dicts, lists, tuples, numbers, strings, None, tensors, devices, and `GrowingRows`.
    """

    def state(self) -> Any:
        """All that has been added so far; may share its tensors."""

    def restore(self, state: Any) -> None:
        """Takes the place of everything that has been added: tensors on the devices where they were; not shared."""


@runtime_checkable
class Joining(Stateful, Protocol):
    """Sums that another number of processes can take over."""

    def join(self, state: Any) -> None:
        """The state of another process' sums is added to these."""


@dataclass(frozen=True)
class GrowingRows:
    """Rows that are only ever added, of several matrices: those that are written already are not written again.

    Attributes:
        count: of every matrix.
        since: `{name: [count - start, d]}`, those from `start` on.
    """

    count: int
    since: Callable[[int], Mapping[str, Tensor]]


class Packer:
    """Takes state apart into what JSON can hold, tensors and rows.

    Attributes:
        tensors: those met so far, by the names that stand in their place.
        rows: likewise.

    Args:
        prefix: of the names.
    """

    def __init__(self, prefix: str = ""):
        self.prefix = prefix
        self.tensors: dict[str, Tensor] = {}
        self.rows: dict[str, GrowingRows] = {}
        self._names: dict[int, str] = {}

    def pack(self, state: Any) -> Any:
        """State as JSON.

        Raises:
            TypeError: for what is no state.
        """
        if state is None or isinstance(state, (bool, int, float, str)):
            return state
        if isinstance(state, (list, tuple)):
            parts = [self.pack(part) for part in state]
            return {"tuple": parts} if isinstance(state, tuple) else parts
        if isinstance(state, dict):
            return {"dict": [[self.pack(key), self.pack(value)] for key, value in state.items()]}
        if isinstance(state, Tensor):
            name = self._names.setdefault(id(state), f"{self.prefix}{len(self.tensors)}")
            self.tensors[name] = state
            return {"tensor": name, "on": str(state.device), "strides": list(state.stride())}
        if isinstance(state, torch.device):
            return {"device": str(state)}
        if isinstance(state, GrowingRows):
            name = f"{self.prefix}{len(self.rows)}"
            self.rows[name] = state
            return {"rows": name}
        raise TypeError(f"expected numbers, strings, tensors, and lists or dicts of them, got {type(state).__name__}")


def unpack(
    packed: Any,
    tensor: Callable[[str], Tensor],
    rows: Callable[[str], Iterable[Mapping[str, Tensor]]],
    device: Callable[[str], torch.device] = torch.device,
) -> Any:
    """What `Packer.pack` took apart; of rows, an iterable of the blocks they were written in.

    Args:
        packed: JSON.
        tensor: of a name, on the CPU.
        rows: likewise.
        device: that takes the place of one with this name.
    """
    known: dict[str, Tensor] = {}

    def build(part: Any) -> Any:
        if isinstance(part, list):
            return [build(one) for one in part]
        if not isinstance(part, dict):
            return part
        if "tuple" in part:
            return tuple(map(build, part["tuple"]))
        if "dict" in part:
            return {build(key): build(value) for key, value in part["dict"]}
        if "rows" in part:
            return rows(part["rows"])
        if "device" in part:
            return device(part["device"])
        name = part["tensor"]
        if name not in known:
            known[name] = _placed(tensor(name), part["strides"], device(part["on"]))
        return known[name]

    return build(packed)


def _placed(tensor: Tensor, strides: list[int], device: torch.device) -> Tensor:
    """A copy in the order of dimensions that it had, on which the order of sums in matrix products may depend."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    if span != tensor.numel():  # a view with gaps
        return tensor.to(device, copy=True)
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=device).copy_(tensor)


def random_state(loader: Any) -> dict[str, Any]:
    """The state of all that a loader may draw its order from: torch, NumPy, `random`, and generators of its own."""
    name, words, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (name, np.asarray(words).tolist(), *rest),
        "python": random.getstate(),
        "loader": [generator.get_state() for generator in _generators(loader)],
    }


def set_random_state(state: Mapping[str, Any], loader: Any) -> None:
    """Undoes what has been drawn since `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    for generator, own in zip(_generators(loader), state["loader"], strict=False):
        generator.set_state(own)


def _generators(loader: Any) -> list[torch.Generator]:
    """Of a DataLoader and its samplers, each once."""
    batches = getattr(loader, "batch_sampler", None)
    owners = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    found = (getattr(owner, "generator", None) for owner in owners)
    return list(dict.fromkeys(one for one in found if isinstance(one, torch.Generator)))


def loader_state(loader: Any) -> Any:
    """What a loader that can say so says of where it is; None for others."""
    try:
        state = loader.state_dict()
        Packer().pack(state)
    except (AttributeError, TypeError):  # accelerate's have the method even where the loader beneath has not
        return None
    return state


def batch_digest(before: str, batch: Any) -> str:
    """Of all batches up to this one, from the digest of those before it: keys, shapes, dtypes and values."""
    digest = hashlib.blake2b(before.encode(), digest_size=16)
    for part in parts_of(batch):
        digest.update(part)
    return digest.hexdigest()


def parts_of(value: Any) -> Iterator[bytes]:
    """What a digest of a batch, or of a part of one, is of."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        yield f"array {value.dtype} {value.shape}\n".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, Tensor):
        yield f"tensor {value.dtype} {list(value.shape)}\n".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, (Mapping, list, tuple)) or is_record(value):
        items = items_of(value)
        yield f"{len(items)} items\n".encode()
        for key, part in items.items():
            yield f"{key!r}: ".encode()
            yield from parts_of(part)
    elif value is None or isinstance(value, (str, bytes, bool, int, float)):
        yield f"{value!r}\n".encode()
    else:
        yield UNKNOWN + f"{type(value).__name__}\n".encode()
