"""Models whose parameters are sharded over processes (FSDP2, `fully_shard`): who must run them together, and on what.

Every pass through such a model gathers parameters, so that all its processes must make the same passes. They do if they
are given the same batches and cut them alike: everything else follows from these. `in_step` makes sure of the first,
`smallest` is for the second. Results are then the same everywhere, and after a fit whatever does not run the model may
be called by one process alone.
"""

from __future__ import annotations

import hashlib
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bayesian_lora_kernels.model.containers import is_record, items_of
from bayesian_lora_kernels.processes import ALONE, Processes

Item = TypeVar("Item")
FSDP = "torch.distributed.fsdp"
OTHER_WEIGHTS = "it runs the model with other weights in the place of its own"

# Of each model one, so that what its processes say to each other stays in step; by its outermost sharded module.
_known: weakref.WeakKeyDictionary[nn.Module, Processes] = weakref.WeakKeyDictionary()


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this process has a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached; if it is sharded, all processes that have parts of it must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharing(model: nn.Module) -> Processes:
    """The processes over which a model is sharded by FSDP2, which must all run it together; else this one alone.

    Raises:
        ValueError: for a model that is spread in another way: FSDP1, DeepSpeed ZeRO-3, tensor parallel, parameters
            that FSDP2 offloads to the CPU or shards over different meshes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    _check_others(model)
    modules = _fsdp_modules(model)
    for module in modules:
        module.reshard()  # the outermost parameters stay whole after a forward pass
    sharded = {name: p for name, p in model.named_parameters() if is_sharded(p)}
    if not sharded:
        return ALONE
    within = {id(p) for module in modules for p in module.parameters()}
    groups: set[Any] = set()
    for name, p in sharded.items():
        mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
        axes = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
        if id(p) not in within or len(axes) != 1:
            raise ValueError(
                f"{name}: it is a DTensor {placements}, as of tensor parallel (parallelize_module), and only what "
                "FSDP2 (fully_shard) shards is served; load the model without tensor parallel, or on one device"
            )
        if mesh.device_type != p.device.type:
            raise ValueError(
                f"{name}: FSDP keeps it on the {p.device.type} and runs it on {mesh.device_type}; call fully_shard "
                "without CPUOffloadPolicy"
            )
        groups.add(mesh.get_group(axes[0]))
    if len(groups) > 1:
        raise ValueError(f"FSDP shards the model over {len(groups)} different groups of processes; expected one")
    group, outermost = groups.pop(), modules[0]
    if outermost not in _known or _known[outermost].group is not group:
        _known[outermost] = Processes(group)
    return _known[outermost]


def not_sharded(model: nn.Module, what: str, why: str = OTHER_WEIGHTS) -> None:
    """Refuse what is not for a model that is sharded.

    Raises:
        ValueError: for such a model.
    """
    if sharing(model) is not ALONE:
        raise ValueError(
            f"{what}: not for a model that FSDP shards (fully_shard), because {why}; load base model and adapter "
            "without fully_shard for this"
        )


@contextmanager
def together(model: nn.Module, processes: Processes) -> Iterator[None]:
    """What one process raises inside, all raise that share the model or the data.

    Args:
        model: that is run inside.
        processes: with data of their own.

    Raises:
        ValueError: if the model is sharded over processes with data of their own, which hold parts of it, not copies.
    """
    shards = sharing(model)
    with processes.together(), shards.together():
        _check_apart(shards, processes)
        yield


def in_step(model: nn.Module, batches: Iterable[Item]) -> Iterator[Item]:
    """The batches; of a sharded model's processes all must have the same, or all of them raise.

    Raises:
        ValueError: if a process has another batch, more or fewer of them, or fails to read one.
    """
    processes = sharing(model)
    if processes is ALONE:
        yield from batches
        return
    iterator = iter(batches)
    for count in range(sys.maxsize):
        batch, seen, failure = None, "", None
        try:
            batch = next(iterator)
            seen = f"a batch ({_digest(batch)})"
        except StopIteration:
            seen = "no more"
        except Exception as error:
            seen, failure = f"{type(error).__name__}: {error}", error
        found = processes.values(seen)
        if failure is not None:
            raise failure
        if len(set(found)) > 1:
            other = next(rank for rank, one in enumerate(found) if one != seen)
            raise ValueError(
                f"batch {count}: FSDP shards the model over {processes.size} processes, which must all have the same "
                f"batches: process {processes.rank} has {seen}, process {other} {found[other]}. Give all of them the "
                "whole data in the same order (no DistributedSampler), or shard over some of them and replicate "
                "(HSDP), with the replicas as group="
            )
        if seen == "no more":
            return
        yield batch  # type: ignore[misc]


def smallest(model: nn.Module, number: int) -> int:
    """The smallest number that any of a sharded model's processes has; the number itself for any other model."""
    processes = sharing(model)
    return number if processes is ALONE else min(processes.values(number))


def _check_apart(shards: Processes, processes: Processes) -> None:
    if shards is ALONE or processes.group is None:
        return
    both = set(dist.get_process_group_ranks(shards.group)) & set(dist.get_process_group_ranks(processes.group))
    if len(both) > 1:
        raise ValueError(
            f"group: FSDP shards the model over the processes {sorted(both)} of it, which can only run it together, on "
            "the same batches. Fit without group=, with the same batches on all of them; or shard over some processes "
            "and replicate (HSDP, a mesh of two dimensions), and pass the replicas' group"
        )


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Inside, passes through the model; afterwards its parameters are sharded again, also where a pass has failed."""
    modules = _fsdp_modules(model)
    try:
        yield
    except BaseException:
        for module in modules:
            with suppress(AttributeError, RuntimeError):  # not in PyTorch 2.6, and for the outermost module only
                module.reset_iter_state()
        raise
    finally:
        for module in modules:
            module.reshard()


def _fsdp_modules(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get(FSDP)  # nothing is sharded if nobody has imported it
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def _check_others(model: nn.Module) -> None:
    kind = getattr(sys.modules.get(FSDP), "FullyShardedDataParallel", None)
    if kind is not None and any(isinstance(module, kind) for module in model.modules()):
        raise ValueError(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), which flattens its parameters; shard it by "
            "FSDP2, torch.distributed.fsdp.fully_shard, or load it whole"
        )
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id"):
            raise ValueError(
                f"{name}: DeepSpeed ZeRO-3 holds its numbers in parts; load base model and adapter without ZeRO-3 "
                "(ZeRO stages 1 and 2 leave weights whole), or shard them by FSDP2, torch.distributed.fsdp.fully_shard"
            )


def _digest(batch: Any) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().to("cpu", copy=True).contiguous()  # storage that NumPy has seen keeps its size
            digest.update(f"{value.dtype} {list(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            digest.update(f"{value.dtype} {list(value.shape)}".encode())
            digest.update(np.ascontiguousarray(value).data)
        elif isinstance(value, (Mapping, tuple, list)) or is_record(value):
            for key, part in items_of(value).items():
                digest.update(f"{key}:".encode())
                add(part)
        else:
            plain = value is None or isinstance(value, (str, bytes, int, float))
            digest.update((repr(value) if plain else type(value).__name__).encode())

    add(batch)
    return digest.hexdigest()[:16]
