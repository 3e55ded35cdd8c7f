"""The model up to its output head, as a function of its parameters that can be differentiated in any mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.forward import Forward, head_mask
from bayesian_lora_kernels.model.masks import last_valid
from bayesian_lora_kernels.model.measuring import hooked, undone
from bayesian_lora_kernels.surroundings import callers_surroundings

PLAIN_ATTENTION = ("eager", "sdpa")


class _Reached(Exception):
    """The output head has been reached: the forward pass ends here, with what it was handed."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


class HiddenStates:
    """The hidden states that a causal LM hands to its output head; the head itself never runs.

    Args:
        forward: of the model, which must have an output head.

    Raises:
        ValueError: if it has none.
    """

    def __init__(self, forward: Forward):
        if forward.head is None:
            raise ValueError("expected a causal LM with an output head over a vocabulary and the default forward")
        self.forward = forward
        self.head = forward.head

    def __call__(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """`[N, T, d]` of a batch on the model's device, with `parameters` in place of the model's own of those names.

        Raises:
            ValueError: if the model never calls its head, or hands it something else than `[N, T, d]`.
        """

        def stop(_: nn.Module, args: tuple[Any, ...], __: dict[str, Any]) -> None:
            raise _Reached(args[0])

        model, prefix = self.forward.model, self.forward.prefix
        swapped = {name.removeprefix(prefix): value for name, value in (parameters or {}).items()}
        kwargs = self.forward.model_inputs(batch.inputs)
        try:
            restore = undone(_own_parameters(model, swapped))
            with restore, hooked(pre=[(self.head.module, stop)]), callers_surroundings():
                torch.func.functional_call(model, swapped, (), kwargs, tie_weights=False)
        except _Reached as reached:
            hidden = reached.hidden
        else:
            raise ValueError(f"the model does not call its output head {self.head.name}")
        if hidden.ndim != 3:
            raise ValueError(f"{self.head.name}: expected an input of shape [N, T, d], got {list(hidden.shape)}")
        return hidden

    def mask(self, batch: Batch, hidden: Tensor) -> Tensor | None:
        """`[N, T]`, which positions of the hidden states are real; None: all of them."""
        return head_mask(self.forward.output_mask(self.forward.model_inputs(batch.inputs)), hidden)

    def last(self, batch: Batch, hidden: Tensor) -> Tensor:
        """`[N, d]`, the hidden state at the last valid token of each example."""
        index = last_valid(hidden, self.mask(batch, hidden))
        return hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]


def _own_parameters(model: nn.Module, names: Iterable[str]) -> Callable[[], None]:
    """Puts a model's own parameters of these names back into place, if others have been left there."""
    places = [(model.get_submodule(owner), leaf) for owner, _, leaf in (name.rpartition(".") for name in names)]
    own = [(module, leaf, module._parameters[leaf]) for module, leaf in places]

    def restore() -> None:
        for module, leaf, parameter in own:
            if module._parameters.get(leaf) is not parameter:
                module._parameters[leaf] = parameter

    return restore


def _configs(model: nn.Module) -> dict[int, Any]:
    """Configurations of a model's parts by their identity, outer ones first."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for config in list(configs.values()):
        for value in vars(config).values():
            if hasattr(value, "_attn_implementation"):
                configs[id(value)] = value
    return configs


def attention_weights_are_formed(model: nn.Module) -> bool:
    """Whether attention has a matrix of T x T, as eager attention does; also of models that do not say."""
    kinds = {kind for one in _configs(model).values() if (kind := getattr(one, "_attn_implementation", None))}
    return not kinds or "eager" in kinds


@contextmanager
def differentiable_attention(model: nn.Module) -> Iterator[None]:
    """A transformers model with attention of another make (flash, flex, its own) runs with PyTorch's inside.

    One that PyTorch's function does not serve, such as one with sinks, which would be left out in silence, runs with
    eager attention. Afterwards everything is as it was.
    """
    configs = _configs(model)
    kinds = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    changed = [key for key, kind in kinds.items() if isinstance(kind, str) and kind not in PLAIN_ATTENTION]

    def restore() -> None:
        for key in changed:  # outer configurations first: setting one sets those inside it too
            configs[key]._attn_implementation = kinds[key]

    with undone(restore):
        served = all(getattr(module, "_supports_sdpa", True) for module in model.modules())
        for key in changed:
            configs[key]._attn_implementation = "sdpa" if served else "eager"
        yield
