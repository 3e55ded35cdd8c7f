"""Names of a model's modules and tensors, whatever wraps the model and whatever its adapter is called.

PEFT puts `base_model.model.` before every name, DDP `module.`, `torch.compile` `_orig_mod.`; and a base weight becomes
`base_layer.weight` as soon as some adapter wraps its layer. None of this changes what the tensor is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

_WRAPPERS = re.compile(
    r"(?<![^.])(?:base_model\.model|module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer"
    r"|original_module|token_adapter)\."
)
_ADAPTER = re.compile(r"(?<![^.])(lora_\w+|modules_to_save|trainable_tokens_(?:delta|original))\.([^.]+)")


def canonical(name: str, adapters: Mapping[str, str] | None = None) -> str:
    """A name without wrappers' parts, and with `adapters[x]` in the place of an adapter's name x."""
    bare = _WRAPPERS.sub("", name + ".")[:-1]
    if not adapters:
        return bare
    return _ADAPTER.sub(lambda match: f"{match[1]}.{adapters.get(match[2], match[2])}", bare, count=1)


def unique_names(names: Iterable[str], adapters: Mapping[str, str] | None = None) -> dict[str, str]:
    """`{name: its canonical name}`; those that would be called alike keep their own."""
    renamed = {name: canonical(name, adapters) for name in names}
    count = Counter(renamed.values())
    return {name: new if count[new] == 1 else name for name, new in renamed.items()}


def adapter_of(name: str) -> str | None:
    """The adapter that a module or tensor belongs to, None for those of the base model."""
    match = _ADAPTER.search(name)
    return match[2] if match else None


def adapter_owner(name: str) -> str:
    """Name of the module that holds the adapter which the named module or tensor belongs to."""
    match = _ADAPTER.search(name)
    return name[: match.start()].removesuffix(".") if match else name


def adapters_of(names: Iterable[str]) -> list[str]:
    """The adapters that any of the names belongs to, sorted."""
    return sorted({adapter for adapter in map(adapter_of, names) if adapter is not None})


def active_adapters(module: nn.Module) -> list[str] | None:
    """Adapters that a PEFT layer applies, None for a module that is none."""
    if not (hasattr(module, "adapter_layer_names") or "modules_to_save" in module._modules):
        return None
    active: Any = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", None) or []
    return [active] if isinstance(active, str) else list(active)


def join(module: str, leaf: str) -> str:
    """Name of a module's own parameter."""
    return f"{module}.{leaf}" if module else leaf


@dataclass(frozen=True)
class Placement:
    """Where the layers of a file are in a model.

    Attributes:
        layers: `{name in the file: name in the model}`.
        adapters: `{name in the model: name in the file}` of adapters that are called otherwise; it goes both ways, so
            that the names stay distinct.
    """

    layers: dict[str, str]
    adapters: dict[str, str]

    @property
    def adapter(self) -> str | None:
        """The model's adapter, if the layers belong to one."""
        adapters = adapters_of(self.layers.values())
        return adapters[0] if len(adapters) == 1 else None


def placements(model: nn.Module, names: Sequence[str]) -> list[Placement]:
    """Every way to find all the named linear layers in a model: one for each adapter that has them.

    Layers of several adapters, and those of none, are found under their own names only.

    Raises:
        ValueError: if there is none; a layer that is missing is named.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    stored = adapters_of(names)
    options: list[dict[str, str]] = [{}]
    if len(stored) == 1:
        options = [
            {} if adapter == stored[0] else {adapter: stored[0], stored[0]: adapter} for adapter in adapters_of(linears)
        ] or options
    found: list[Placement] = []
    missing: list[str] = []
    for adapters in options:
        by_name = {new: name for name, new in unique_names(linears, adapters).items()}
        layers = {name: by_name.get(name, by_name.get(canonical(name))) for name in names}
        present = {name: here for name, here in layers.items() if here is not None}
        if len(present) == len(names):
            found.append(Placement(present, adapters))
        else:
            lacking = [name for name in names if name not in present]
            missing = lacking if not missing or len(lacking) < len(missing) else missing
    if not found:
        raise ValueError(
            f"the posterior has {len(names)} modules, of which this model lacks {len(missing)}, such as {missing[0]}"
        )
    return found


def place(name: str) -> tuple[int | None, str]:
    """The block that a layer is in, if it is in a numbered one, and the part that it plays in it: `q_proj.lora_A`."""
    parts = _ADAPTER.sub(r"\1", name).split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    block = int(parts[numbers[0]]) if numbers else None
    return block, ".".join(parts[numbers[-1] + 1 if numbers else 0 :][-2:]) or "layers"
