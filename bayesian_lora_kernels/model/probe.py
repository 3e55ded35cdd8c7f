"""What backward passes of a random cotangent show: whose gradients are whose, and what autograd makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.model.capture import Capture
from bayesian_lora_kernels.model.layers import LinearLayer
from bayesian_lora_kernels.ops.checks import accumulate_dtype
from bayesian_lora_kernels.surroundings import callers_surroundings

FACTORS = tuple(sign * 2.0**k for k in (0, 1, -1, 2, -2, 3, -3) for sign in (1, -1))
Projections = dict[tuple[str, int], Tensor]
PROJECTIONS = 4  # of a gradient, in which passes are compared: enough to see any change, and little to keep


class Probe:
    """What backward passes show of every call of a layer.

    The same random cotangent runs with every example's share of it times a factor of its own, and, where `thorough`, as
    it is with the examples in reversed order: a model that sorts its examples has sorted one of the two. Otherwise the
    comparison is with the same order.

    Attributes:
        passes: `(factors [N], {(layer, call): [..., PROJECTIONS]})`, of output gradients in a few projections.
        reference: the projections without factors, and whether the examples are in reversed order there; or None.
        totals: `{layer: (sum over all tokens of g a^T, the same of absolute values)}`, `[d_out, d_in]`, first pass.
        expected: `{layer: [d_out, d_in]}`, autograd's gradient of the weight in the same pass.
        dtypes: `{layer: the lowest dtype}` on the way to a layer's gradient.
    """

    def __init__(self, recorded: Capture):
        self.recorded = recorded
        self.passes: list[tuple[Tensor, Projections]] = []
        self.reference: tuple[Projections, bool] | None = None
        self.totals: dict[str, tuple[Tensor, Tensor]] = {}
        self.expected: dict[str, Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._matrices: dict[Any, Tensor] = {}

    @property
    def found(self) -> Projections:
        """Of the first pass."""
        return self.passes[0][1]

    def run(self, thorough: bool) -> None:
        """The passes."""
        logits, mask = self.recorded.logits, self.recorded.result.mask
        n = len(logits)
        noise = torch.Generator().manual_seed(0)
        cotangent = torch.randn(logits.shape, generator=noise, dtype=torch.float32).to(logits.device, logits.dtype)
        if mask is not None:
            cotangent = cotangent.masked_fill(~mask[..., None].to(logits.device), 0)
        parameters = [
            (layer, p)
            for name, layer in self.recorded.layers.items()
            for p in self.recorded.parameters.get(name, layer.parameters()).values()
            if p.requires_grad
        ]
        step = 1
        while step == 1 or step < n:  # equal factors differ in the next digit of an example's number
            factors = torch.tensor([FACTORS[(i // step) % len(FACTORS)] for i in range(n)], dtype=torch.float64)
            scaled = cotangent * factors.to(cotangent).reshape(-1, *[1] * (cotangent.ndim - 1))
            wanted = parameters if step == 1 else []
            seen, gradients = self._pass(self.recorded, scaled, [p for _, p in wanted])
            self._expect([(layer, g, p) for (layer, p), g in zip(wanted, gradients, strict=True)])
            self.passes.append((factors, seen))
            step *= len(FACTORS)
        if n > 1:
            turned = self._reversed(cotangent) if thorough else None
            self.reference = (self._pass(self.recorded, cotangent, [])[0], False) if turned is None else (turned, True)

    def _reversed(self, cotangent: Tensor) -> Projections | None:
        """A pass with the examples in reversed order; None if there is no such batch, or no memory for two graphs."""
        other = self.recorded.batch.reversed()
        if other is None:
            return None
        again = Capture(list(self.recorded.layers.values()), self.recorded.forward)
        try:
            again.run(other, self.recorded.all_labels)
            return self._pass(again, cotangent.flip(0), [])[0]
        except torch.OutOfMemoryError:
            return None

    def _pass(
        self, recorded: Capture, cotangent: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Projections, tuple[Tensor | None, ...]]:
        found: Projections = {}

        def receive(name: str, call: int, g: Tensor) -> None:
            layer, a = recorded.layers[name], recorded.calls[name][call].a
            g = layer.used_rows(g.detach())
            wide = g.to(accumulate_dtype(g))
            projected = wide @ self._matrix(wide)
            found[name, call] = found[name, call] + projected if (name, call) in found else projected
            if parameters:
                self._add_total(layer, a, wide, g.dtype)

        return found, recorded.raw_backward(cotangent, receive, parameters)

    def _matrix(self, g: Tensor) -> Tensor:
        key = g.shape[-1], g.dtype, g.device
        if key not in self._matrices:
            noise = torch.Generator().manual_seed(1)
            matrix = torch.randn(g.shape[-1], PROJECTIONS, generator=noise, dtype=g.dtype)
            self._matrices[key] = matrix.to(g.device)
        return self._matrices[key]

    def _add_total(self, layer: LinearLayer, a: Tensor, g: Tensor, dtype: torch.dtype) -> None:
        a = layer.extend_input(a)
        lowest = min((dtype, a.dtype), key=lambda d: torch.finfo(d).bits)
        known = self.dtypes.get(layer.name, lowest)
        self.dtypes[layer.name] = min((known, lowest), key=lambda d: torch.finfo(d).bits)
        g, a = g.reshape(-1, g.shape[-1]), a.to(g.dtype).reshape(-1, a.shape[-1])
        total, size = g.mT @ a, g.abs().mT @ a.abs()
        if layer.name in self.totals:
            before = self.totals[layer.name]
            total, size = before[0] + total, before[1] + size
        self.totals[layer.name] = total, size

    def _expect(self, found: Sequence[tuple[LinearLayer, Tensor | None, Tensor]]) -> None:
        columns: dict[str, list[Tensor]] = {}
        layers = {layer.name: layer for layer, _, _ in found}
        for layer, g, p in found:
            g = torch.zeros_like(p) if g is None else g
            g = g if g.ndim == 2 else g[:, None]
            columns.setdefault(layer.name, []).append(g if layer.rows is None else g[layer.rows])
        for name, layer in layers.items():
            if len(columns[name]) == bool(layer.weight) + bool(layer.bias):
                self.expected[name] = torch.cat(columns[name], dim=1)


def tolerance_of(dtype: torch.dtype, double: float, single: float, half: float) -> float:
    """The one of three limits that belongs to a dtype."""
    bits = torch.finfo(dtype).bits
    return double if bits == 64 else single if bits == 32 else half


def lowest_dtype(recorded: Capture) -> torch.dtype:
    """The dtype that decides how exactly two runs of a model agree."""
    forward = recorded.forward
    dtypes = {p.dtype for p in forward.model.parameters() if p.is_floating_point()}
    dtypes |= {call.a.dtype for calls in recorded.calls.values() for call in calls}  # FSDP may cast weights and inputs
    quantised = any(not p.is_floating_point() for p in forward.model.parameters())
    with callers_surroundings():
        if quantised or torch._C._is_any_autocast_enabled():
            return torch.bfloat16
    return min(dtypes, key=lambda d: torch.finfo(d).bits, default=torch.float32)


def noting(recorded: Capture, into: dict[str, list[Tensor]]) -> list[tuple[nn.Module, Any]]:
    """Hooks that write down the inputs of the layers' calls."""

    def note(layer: LinearLayer) -> Any:
        def run(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Tensor) -> None:
            into.setdefault(layer.name, []).append((args[0] if args else kwargs["input"]).detach())

        return run

    return [(layer.module, note(layer)) for layer in recorded.layers.values()]
