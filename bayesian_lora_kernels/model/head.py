"""The output head of a causal LM as a module: where it is, and its maps onto the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass
class HeadModule:
    """A causal LM's output head; `linears` are its maps onto the vocabulary, by name in the model."""

    name: str
    module: nn.Module
    vocabulary: int
    linears: dict[str, nn.Linear]


def find_head(model: nn.Module, base: nn.Module) -> HeadModule | None:
    """The output head of a model that generates tokens, else None."""
    can_generate = getattr(base, "can_generate", None)
    if not (callable(can_generate) and can_generate()):
        return None
    module = base.get_output_embeddings()  # type: ignore[operator]
    if module is None:
        return None
    name = next((n for n, m in model.named_modules() if m is module), None)
    inner = module
    while not isinstance(inner, nn.Linear):
        wrapped = getattr(inner, "base_layer", None) or getattr(inner, "original_module", None)
        if wrapped is None:
            return None
        inner = wrapped
    if name is None:
        return None
    linears = {
        f"{name}.{sub}" if sub else name: m
        for sub, m in module.named_modules()
        if isinstance(m, nn.Linear) and m.out_features == inner.out_features and "lora_A" not in sub.split(".")
    }
    return HeadModule(name, module, inner.out_features, linears)
