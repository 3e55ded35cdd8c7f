"""A Jacobian that looks like a dictionary of tensors and is kept as what it is made of."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence

from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.model.capture import Capture
from bayesian_lora_kernels.model.jacobians import Jacobians
from bayesian_lora_kernels.model.layers import LinearLayer
from bayesian_lora_kernels.posterior.kronecker import KroneckerPosterior


class LazyJacobian(MutableMapping[str, Tensor]):
    """`{parameter name: [N, C, *shape]}`, each tensor formed when it is looked at, and kept from then on.

    What it holds are the layers' inputs and the gradients of the logits with respect to their outputs, from which
    `covariance` goes straight to the result. An entry that is set or deleted counts as any tensor does.

    Args:
        recorded: one forward pass; its graph is used up here.
        layers: that were recorded.
        indices: `[N, C]`, the logits of each example.
    """

    def __init__(self, recorded: Capture, layers: Sequence[LinearLayer], indices: Tensor):
        self._jacobians = Jacobians(recorded, indices)
        self._layers = {layer.name: layer for layer in layers if layer.name in self._jacobians.inputs}
        self._owner = {name: layer.name for layer in self._layers.values() for name in layer.parameters()}
        self._tensors: dict[str, Tensor | None] = dict.fromkeys(self._owner)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if tensor is None:
            layer = self._layers[self._owner[name]]
            for part, value in layer.split(self._jacobians.matrix(layer.name)).items():
                if part in self._owner and self._tensors.get(part) is None:
                    self._tensors[part] = value.to(layer.parameters()[part].dtype)
            tensor = self._tensors[name]
            assert tensor is not None
        return tensor

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._owner.pop(name, None)
        self._tensors[name] = value

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]
        self._owner.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"LazyJacobian({len(self)} parameters of {len(self._layers)} layers)"

    def covariance(self, name: str, posterior: KroneckerPosterior) -> Tensor | None:
        """`[N, C, C]` of the layer that a parameter belongs to, without its Jacobian.

        None if the posterior is not over all of the layer's parameters, or one of them has been replaced.
        """
        owner = self._owner.get(name)
        if owner is None:
            return None
        layer = self._layers[owner]
        if layer.shape != posterior.shape or not set(layer.parameters()) <= self._owner.keys():
            return None
        a, g, mask = self._jacobians.contraction(owner)
        return ops.jacobian_covariance(a, g, posterior, mask=mask)
