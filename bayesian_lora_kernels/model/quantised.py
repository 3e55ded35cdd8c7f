"""Quantised layers beside the adapters: whether gradients go through them as they do through the maps they stand for.

Some are made for inference only: their backward pass is missing, or is another map's. The adapters before them then
get gradients that miss a part, or are wrong, and nothing else of a model shows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.model.sharding import is_sharded
from bayesian_lora_kernels.surroundings import callers_surroundings

ROWS = 16  # of a layer's input, which its derivative is checked on
TOLERANCE = 0.1  # some round their inputs to 8 bits

Seen = dict[str, tuple[nn.Module, Tensor]]


def noting_quantised(model: nn.Module, seen: Seen) -> list[tuple[nn.Module, Any]]:
    """Hooks that note some rows of the input of every quantised layer that gradients go through."""

    def note(name: str) -> Any:
        def run(module: nn.Module, args: tuple[Any, ...], *_: Any) -> None:
            if args and isinstance(args[0], Tensor) and args[0].requires_grad and name not in seen:
                seen[name] = module, args[0].detach().reshape(-1, args[0].shape[-1])[:ROWS].clone()

        return run

    return [(module, note(name)) for name, module in model.named_modules() if _is_quantised(module)]


def check_derivatives(seen: Seen) -> None:
    """Whether `|W x|^2 = <W^T W x, x>` for every layer, the left side by its forward pass, the right by its backward.

    Raises:
        ValueError: for a layer where it is not so.
    """
    for name, (module, rows) in seen.items():
        x = rows.requires_grad_()
        with torch.enable_grad(), callers_surroundings():
            y = module(x)
        bias = getattr(module, "bias", None)
        product = y.detach() if bias is None else y.detach() - bias.detach()
        g = torch.autograd.grad(y, x, product, allow_unused=True)[0] if y.requires_grad else None
        forward = float(product.double().square().sum())
        backward = 0.0 if g is None else float((g.double() * x.detach().double()).sum())
        if not abs(forward - backward) <= TOLERANCE * abs(forward):
            what = "has none" if g is None else f"is not its derivative (off by {abs(1 - backward / forward):.1e})"
            raise ValueError(
                f"{name} ({type(module).__name__}): a backward pass through this quantised layer {what}. Some are made "
                "for inference only: those that quantise their inputs as well (quantise weights only), and those "
                "of bitsandbytes' 4 bits that a CPU has run in eval mode without gradients (load the model again)"
            )


def wants_training_mode(module: nn.Module) -> bool:
    """Whether it would be changed by a forward pass in eval mode, for good, into one without gradients."""
    return any(kind.__name__ == "Linear4bit" for kind in type(module).__mro__)


def _is_quantised(module: nn.Module) -> bool:
    """Whether it is a linear map whose weight is kept as whole numbers, or as a tensor of a kind of its own."""
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")) or module._modules:
        return False
    matrices = [p for p in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if p.ndim > 1]
    return any(not p.is_floating_point() or _is_of_its_own_kind(p) for p in matrices)


def _is_of_its_own_kind(tensor: Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor)
