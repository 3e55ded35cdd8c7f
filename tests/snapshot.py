"""Everything about a model, and about torch, that must be the same before and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def snapshot(model: nn.Module) -> dict[str, object]:
    state: dict[str, object] = {"random numbers": torch.get_rng_state().tolist(), "grad": torch.is_grad_enabled()}
    for name, module in model.named_modules():
        state[f"{name}: mode"] = module.training
        state[f"{name}: hooks"] = [list(getattr(module, kind).items()) for kind in HOOKS]
        state[f"{name}: attributes"] = sorted(vars(module))
        state[f"{name}: forward"] = getattr(module.forward, "__func__", module.forward)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[f"{name}: value"] = (id(tensor), tensor.data_ptr(), tensor.detach().double().flatten().tolist())
        state[f"{name}: requires_grad"] = tensor.requires_grad
        grad = tensor.grad
        state[f"{name}: grad"] = None if grad is None else (id(grad), grad.double().flatten().tolist())
    return state


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Fails if the model is not afterwards as it was, also if the body raises what a test expects outside."""
    before = snapshot(model)
    try:
        yield
    finally:
        after = snapshot(model)
        assert list(after) == list(before)
        changed = [key for key in before if before[key] != after[key]]
        assert not changed, f"changed: {changed[:5]}"


def unusual(model: nn.Module) -> None:
    """Mixed modes, gradients that are there already, and somebody's hooks."""
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    for i, parameter in enumerate(model.parameters()):
        if parameter.requires_grad and i % 2:
            parameter.grad = torch.full_like(parameter, float(i))
    for module in list(model.modules())[::3]:
        module.register_forward_hook(lambda *_: None)
