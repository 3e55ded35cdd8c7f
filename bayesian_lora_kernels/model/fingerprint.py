"""Whether a model's frozen weights are those that a posterior was fitted beside: a few values of every tensor.

A posterior is that of its base model as much as of its adapter. Eight values of every frozen tensor, at fixed places
all over it, and one of every row of an embedding, tell base models apart at the cost of one gather each. A change that
touches none of these values is not seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.model.names import active_adapters, adapter_of, adapter_owner, join, unique_names
from bayesian_lora_kernels.model.sharding import is_sharded, whole

VALUES = 8
SMALLEST = 2.0**-24  # of float16 that is not zero: below it values are not told apart
LARGEST = 65504.0  # of float16: above it, infinity


def take(model: nn.Module, posterior: Iterable[Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """Sample what the model computes with beside the posterior's own parameters.

    Args:
        model: with the adapter as it was fitted.
        posterior: parameters that the posterior covers.

    Returns:
        Values `[n]` float32 of all tensors in the order of their sorted names, and what JSON says of them:
        `{"tensors": {name: {"shape", "dtype", "values"}}, "skipped": number of tensors without values at hand}`.

    Raises:
        ValueError: if an adapter is merged into the base model: its weights are not those of the fit.
    """
    name = merged(model)
    if name is not None:
        raise ValueError(
            f"base model: {name} has an adapter merged into its weight, so it is not as it was in fit; call "
            "unmerge_adapter() first"
        )
    tensors: dict[str, Any] = {}
    parts: dict[str, Tensor] = {}
    skipped = 0
    seen: set[int] = set()
    rows = _embedding_rows(model)
    for name, (_, tensor) in _frozen(model, posterior, {}).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if not at_hand(tensor):
            skipped += 1
            continue
        for part, plain in _plain_parts(name, tensor):
            count = max(VALUES, rows.get(id(tensor), 0)) if plain.numel() else 0
            tensors[part] = {"shape": list(plain.shape), "dtype": str(plain.dtype), "values": count}
            parts[part] = _gather(plain, count)
    values = torch.cat([parts[name] for name in sorted(parts)]) if parts else torch.zeros(0)
    return values, {"tensors": tensors, "skipped": skipped}


def merged(model: nn.Module) -> str | None:
    """A module that has an adapter merged into its weight, if there is one."""
    for name, module in model.named_modules():
        if active_adapters(module) is not None and getattr(module, "merged_adapters", None):
            return name
    return None


def check(
    model: nn.Module,
    posterior: Iterable[Tensor],
    adapters: Mapping[str, str],
    values: Tensor,
    description: Mapping[str, Any],
) -> None:
    """Compare a model with what `take` made of another; another float type of the same weights is the same.

    Args:
        model: the model that loads; it may hold more tensors than the other.
        posterior: its parameters that the posterior covers.
        adapters: `{its name for an adapter: the name it had}`.
        values: as from `take`.
        description: as from `take`.

    Raises:
        ValueError: for a tensor that is missing, of another shape or with other values, and for an adapter that is
            active here and was not there.
    """
    here: dict[str, tuple[str, Tensor]] = {}
    absent = 0
    posterior = list(posterior)
    for name, (own, tensor) in _frozen(model, posterior, adapters, temporary=True).items():
        parts = _plain_parts(name, tensor) if at_hand(tensor) else [(name, tensor)]
        here.update({part: (own, plain) for part, plain in parts})
    expected = description["tensors"]
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    groups: dict[tuple[str, torch.dtype], list[str]] = {}
    start = 0
    for name in sorted(expected):
        shape, count = expected[name]["shape"], expected[name]["values"]
        wanted = values[start : start + count]
        start += count
        if name not in here:
            raise _another(f"it has no {name}, which the other had with shape {shape}")
        own, tensor = here[name]
        if not at_hand(tensor):
            absent += 1
            continue
        if list(tensor.shape) != shape:
            raise _another(f"{own} is of shape {list(tensor.shape)}, expected {shape}")
        pairs[name] = _gather(tensor, count), wanted
        groups.setdefault((expected[name]["dtype"], tensor.dtype), []).append(name)
    tolerances: dict[str, float] = {}
    for group in groups.values():
        tolerances |= dict.fromkeys(group, _tolerance(*(torch.cat([pairs[name][i] for name in group]) for i in (0, 1))))
    for name, (found, wanted) in pairs.items():
        differ = (~_agree(found, wanted, tolerances[name])).nonzero().flatten().tolist()
        if differ:
            raise _another(
                f"{here[name][0]} differs in {len(differ)} of {len(found)} values, such as {float(found[differ[0]]):g} "
                f"in place of {float(wanted[differ[0]]):g}"
            )
    skipped = absent + description["skipped"]
    if skipped:
        warnings.warn(
            f"base model: compared {len(expected) - absent} of {len(expected) + description['skipped']} frozen "
            "tensors; the others are on the meta device, here or where the posterior was saved",
            stacklevel=3,
        )
    for name, (own, _) in _frozen(model, posterior, adapters).items():
        adapter = adapter_of(own)
        if adapter is not None and name not in expected:
            raise ValueError(
                f"adapter {adapter!r} is active here and was not when the posterior was fitted ({own}); make the "
                "posterior's adapter the only active one with model.set_adapter(...)"
            )


def _another(what: str) -> ValueError:
    return ValueError(
        f"the base model is not the one that the posterior was fitted with: {what}. Load that base model (same "
        "checkpoint, same quantisation), with no adapter merged into it, and the adapter on top"
    )


def _frozen(
    model: nn.Module, posterior: Iterable[Tensor], adapters: Mapping[str, str], temporary: bool = False
) -> dict[str, tuple[str, Tensor]]:
    """`{canonical name: (own name, tensor)}` of all parameters and buffers that count and are not the posterior's.

    Those of inactive adapters do not count, nor a module in whose place an adapter's copy of it runs, nor buffers that
    are not saved with the model, except if `temporary`: another version of its code may save them.
    """
    covered = {id(parameter) for parameter in posterior}
    modules = dict(model.named_modules(remove_duplicate=False))
    own: dict[str, Tensor] = {}
    ours: set[str] = set()
    for prefix, module in modules.items():
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = join(prefix, leaf)
            if id(parameter) in covered:
                ours |= {adapter for adapter in [adapter_of(name)] if adapter is not None}
            else:
                own[name] = parameter
        for leaf, buffer in module._buffers.items():
            if buffer is not None and (temporary or leaf not in module._non_persistent_buffers_set):
                own[join(prefix, leaf)] = buffer
        scaling = getattr(module, "scaling", None)
        if active_adapters(module) is not None and isinstance(scaling, Mapping):
            factors = {join(prefix, f"lora_scaling.{adapter}"): value for adapter, value in scaling.items()}
            own |= {name: torch.tensor(float(value)) for name, value in factors.items()}
    active = {name: set(found) for name, module in modules.items() if (found := active_adapters(module)) is not None}
    if ours and not any(ours & adapters for adapters in active.values()):
        active = dict.fromkeys(active, ours)  # another adapter has been activated since, or before
    kept = {name: tensor for name, tensor in own.items() if _counts(name, modules, active)}
    return {new: (name, kept[name]) for name, new in unique_names(kept, adapters).items()}


def _counts(name: str, modules: Mapping[str, nn.Module], active: Mapping[str, set[str]]) -> bool:
    adapter = adapter_of(name)
    if adapter is not None:
        return adapter in active.get(adapter_owner(name), {adapter})
    wrapper, original, _ = name.rpartition(".original_module.")
    if not original or wrapper not in active:
        return True
    copies = getattr(modules[wrapper], "modules_to_save", {})
    return not any(adapter in copies for adapter in active[wrapper])


def _embedding_rows(model: nn.Module) -> dict[int, int]:
    """`{id of weight: rows}` of embeddings."""
    return {id(m.weight): m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}


def at_hand(tensor: Tensor) -> bool:
    """Whether its numbers are here, or with the processes that share the model."""
    return tensor.device.type != "meta"


def _plain_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those that a quantised one is made of."""
    if hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _plain_parts(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor.detach()


def _gather(tensor: Tensor, count: int) -> Tensor:
    """`count` values, one of each of as many equal parts of the flattened tensor, `[count]` float32 on the CPU."""
    if count == 0:
        return torch.zeros(0)
    tensor = whole(tensor)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.view(torch.uint8)  # float8 cannot be indexed everywhere
    k = torch.arange(count)
    places = (tensor.numel() * (1024 * k + k * 619 % 1024)) // (1024 * count)
    shape = tensor.shape or (1,)
    index = torch.unravel_index(places.to(tensor.device), shape)
    return tensor.reshape(shape)[index].float().cpu()


def _tolerance(a: Tensor, b: Tensor) -> float:
    """Of values of the same weights: none, unless one side went through a narrower float type.

    All tensors that have one type here and one type there are judged together: a norm's ones are exact in every type.
    """
    finite = a.isfinite() & b.isfinite()
    precisions = [_precision(x[finite]) for x in (a, b)]
    return 4 * torch.finfo(torch.float32).eps if precisions[0] == precisions[1] else max(precisions)


def _agree(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    """Which values are the same, `[n]` bool, to a relative tolerance; what float16 cannot hold may be its infinity."""
    overflow = (a.isinf() | b.isinf()) & (a.sign() == b.sign()) & (a.abs() >= LARGEST) & (b.abs() >= LARGEST)
    return torch.isclose(a, b, rtol=tolerance, atol=SMALLEST, equal_nan=True) | overflow


def _precision(values: Tensor) -> float:
    """Machine precision of the narrowest float type that holds all the values."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).float(), values):
            return torch.finfo(dtype).eps
    return torch.finfo(torch.float32).eps
