"""Inputs and output gradients of the linear layers: the only place that reaches into a running model.

One forward pass records every layer's input and puts an identity node behind its output. A backward pass then runs from
the logits to those nodes and nowhere else: no weight gradient is formed and no `.grad` is touched.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.model.batches import token_masks
from bayesian_lora_kernels.model.forward import Forward, ForwardResult
from bayesian_lora_kernels.model.layers import LinearLayer


class LayerInput(NamedTuple):
    """A layer's input on one batch.

    Attributes:
        a: `[N, T, d_in]`, the tokens of every call one after the other, with a column of ones for a bias.
        mask: `[N, T]` bool, or None if every token counts.
        key: equal for two layers exactly if they saw the same tensor; they then share `a` too.
    """

    a: Tensor
    mask: Tensor | None
    key: tuple[Any, ...]


class _Call(NamedTuple):
    a: Tensor  # the module's input, as it came
    version: int  # of its storage then
    key: tuple[Any, ...]


class _Mailbox:
    """Where taps deliver. It knows nothing of the capture, so that the graph does not keep the capture alive."""

    receive: Callable[[str, int, Tensor], None] | None = None


class _Tap(torch.autograd.Function):
    """Identity that reports its gradient. The sink leads the engine here without any weight being involved."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, sink: Tensor, mailbox: _Mailbox, name: str, call: int) -> Tensor:
        ctx.mailbox, ctx.name, ctx.call = mailbox, name, call
        ctx.set_materialize_grads(False)
        return output.detach()  # no view for autograd: the model may go on in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is not None and ctx.mailbox.receive is not None:
            ctx.mailbox.receive(ctx.name, ctx.call, grads[0])
        return grads[0], None, None, None, None


class Capture:
    """One forward pass with its graph: layer inputs now, output gradients for any cotangent on request."""

    def __init__(self, layers: Sequence[LinearLayer], forward: Forward):
        self._layers = {layer.name: layer for layer in layers}
        self._forward = forward
        self._calls: dict[str, list[_Call]] = {layer.name: [] for layer in layers}
        self._mailbox = _Mailbox()
        self._sink: Tensor | None = None
        self.result: ForwardResult
        self.inputs: dict[str, LayerInput] = {}

    @property
    def logits(self) -> Tensor:
        """`[N, C]` or `[N, T, C]`, with their graph."""
        return self.result.logits

    def run(self, batch: Any, all_labels: bool) -> None:
        """The forward pass, with hooks that are gone when it ends."""
        sources: dict[int, tuple[Any, ...]] = {}
        seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        serial = itertools.count()

        def identify(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if x is None:
                sources[id(module)] = (next(serial),)
                return
            known = seen.get(id(x))
            if known is None or known[0]() is not x:  # an address may be used again once its tensor has gone
                known = seen[id(x)] = (weakref.ref(x), next(serial))
            sources[id(module)] = (known[1], x._version)

        def record(layer: LinearLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            a = (args[0] if args else kwargs["input"]).detach()
            calls = self._calls[layer.name]
            key = (sources[id(layer.input_source)], a.dtype, bool(layer.weight), bool(layer.bias))
            calls.append(_Call(a, a._version, key))
            if self._sink is None:
                self._sink = torch.zeros((), device=output.device, requires_grad=True)
            return _Tap.apply(output, self._sink, self._mailbox, layer.name, len(calls) - 1)

        handles = []
        try:
            for layer in self._layers.values():
                handles.append(layer.input_source.register_forward_pre_hook(identify, with_kwargs=True, prepend=True))
                handles.append(
                    layer.module.register_forward_hook(
                        lambda _m, args, kwargs, output, layer=layer: record(layer, args, kwargs, output),
                        with_kwargs=True,
                    )
                )
            self.result = self._forward(batch, all_labels=all_labels)
        finally:
            for handle in handles:
                handle.remove()
        if self._sink is None or not self.result.logits.requires_grad:
            raise ValueError(
                "forward: the logits do not depend on any of the layers: none was called, or forward runs under "
                "torch.no_grad()"
            )
        self._collect_inputs([mask for mask in token_masks(batch) if not mask.all()])

    def _collect_inputs(self, masks: list[Tensor]) -> None:
        n = self.result.logits.shape[0]
        shared: dict[tuple[Any, ...], tuple[Tensor, Tensor | None]] = {}
        for name, calls in self._calls.items():
            if not calls:
                continue
            layer = self._layers[name]
            if layer.weight and any(call.a._version != call.version for call in calls):
                raise ValueError(f"{name}: its input was changed in place after it had used it")
            head_mask = self.result.head_mask if self._forward.in_head(name) else None
            key = (*(call.key for call in calls), head_mask is not None)
            if key not in shared:
                tokens = [as_tokens(call.a, n, name) for call in calls]
                counted = [_token_mask(x, masks, head_mask) for x in tokens]
                mask = counted[0].to(tokens[0].device) if len(counted) == 1 and counted[0] is not None else None
                if len(counted) > 1 and any(m is not None for m in counted):
                    mask = torch.cat(
                        [
                            x.new_ones(x.shape[:2], dtype=torch.bool) if m is None else m.to(x.device)
                            for x, m in zip(tokens, counted, strict=True)
                        ],
                        dim=1,
                    )
                a = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
                shared[key] = (layer.extend_input(a), mask)
            self.inputs[name] = LayerInput(*shared[key], key)

    def backward(
        self, cotangent: Tensor, *, weight_gradients: Collection[str] = (), retain_graph: bool = True
    ) -> dict[str, Tensor]:
        """Gradients of `<cotangent, logits>` with respect to the layers' outputs, for every example at once.

        Args:
            cotangent: of the shape of the logits. Examples do not interact, so one pass serves all of them.
            weight_gradients: layers of which the per-example weight gradient `sum_t g_t a_t^T` is wanted instead; it
                is formed as the gradients arrive, so that wide output gradients live only for a moment.
            retain_graph: whether another backward pass follows.

        Returns:
            `{name: [N, T, d_out]}`, tokens as in `inputs`, zero where the mask is False; or `[N, d_out, d_in]` float32
            (float64 for a float64 model) for `weight_gradients`.
        """
        parts: dict[str, dict[int, Tensor]] = {name: {} for name in self.inputs}
        offsets = {name: self._offsets(name) for name in self.inputs}
        n = self.result.logits.shape[0]

        def receive(name: str, call: int, g: Tensor) -> None:
            layer, (a, mask, _) = self._layers[name], self.inputs[name]
            g = as_tokens(g.detach(), n, name)
            if layer.rows is not None and g.shape[-1] != len(layer.rows):
                g = g[..., layer.rows]
            start, stop = offsets[name][call]
            if mask is not None:
                g = g.masked_fill(~mask[:, start:stop, None], 0)
            if name in weight_gradients:
                gradient = _weight_gradient(g, a[:, start:stop], None if mask is None else mask[:, start:stop])
                parts[name][0] = parts[name][0] + gradient if 0 in parts[name] else gradient
            else:
                parts[name][call] = g

        self._mailbox.receive = receive
        try:
            torch.autograd.grad(
                self.logits,
                [self._sink] if self._sink is not None else [],
                cotangent.to(self.logits.dtype),
                retain_graph=retain_graph,
                allow_unused=True,
            )
        finally:
            self._mailbox.receive = None
        return {name: self._assemble(name, calls, name in weight_gradients) for name, calls in parts.items()}

    def _offsets(self, name: str) -> list[tuple[int, int]]:
        n, bounds, start = self.result.logits.shape[0], [], 0
        for call in self._calls[name]:
            tokens = as_tokens(call.a, n, name).shape[1]
            bounds.append((start, start + tokens))
            start += tokens
        return bounds

    def _assemble(self, name: str, parts: dict[int, Tensor], weight_gradient: bool) -> Tensor:
        """One tensor from the calls' parts; what the logits do not depend on has gradient zero."""
        layer, a = self._layers[name], self.inputs[name].a
        n, tokens, d_in = a.shape
        if weight_gradient:
            return parts[0] if parts else a.new_zeros(n, layer.shape[0], d_in, dtype=accumulate_dtype(a))
        if len(parts) == 1 and len(self._calls[name]) == 1:
            return parts[0]
        g = a.new_zeros(n, tokens, layer.shape[0])
        for call, (start, stop) in enumerate(self._offsets(name)):
            if call in parts:
                g[:, start:stop] = parts[call]
        return g


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def as_tokens(x: Tensor, n: int, name: str) -> Tensor:
    """`[N, ..., d]` or `[N * T, d]` as `[N, T, d]`.

    Raises:
        ValueError: if the leading dimension cannot be the examples'.
    """
    if x.ndim >= 2 and x.shape[0] == n:
        return x.reshape(n, -1, x.shape[-1])
    if x.ndim == 2 and n and x.shape[0] % n == 0:
        return x.reshape(n, -1, x.shape[-1])
    raise ValueError(
        f"{name}: expected an input of shape [{n}, ..., d] with the batch's {n} examples first, got {list(x.shape)}; "
        "tokens that are regrouped across examples (as experts do) cannot be told apart"
    )


def _token_mask(x: Tensor, masks: list[Tensor], head_mask: Tensor | None) -> Tensor | None:
    """The mask that describes `[N, T]` tokens: of all that came with the batch, the one of this length."""
    if head_mask is not None:
        return head_mask
    return next((mask for mask in masks if mask.shape == x.shape[:2]), None)


def _weight_gradient(g: Tensor, a: Tensor, mask: Tensor | None) -> Tensor:
    dtype = accumulate_dtype(g, a)
    if mask is not None:
        a = a.masked_fill(~mask[:, :, None], 0)
    return torch.bmm(g.to(dtype).mT, a.to(dtype))


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode with gradients enabled; every module's own mode is back afterwards, whatever happens.

    transformers checkpoints activations only in training mode. Layers that do so, and have no dropout of their own,
    keep that flag, so that a model which was trained under checkpointing is also measured under it.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for module, _ in modes:
            if _checkpoints_safely(module):
                module.training = True
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _checkpoints_safely(module: nn.Module) -> bool:
    if not getattr(module, "gradient_checkpointing", False):
        return False
    function = getattr(module, "_gradient_checkpointing_func", None)
    reentrant = getattr(function, "keywords", {}).get("use_reentrant", True)
    drops = any("drop" in key and isinstance(value, float) and value > 0 for key, value in vars(module).items())
    return function is not None and not reentrant and not drops


def capture(layers: Sequence[LinearLayer], forward: Forward, batch: Any, *, all_labels: bool = False) -> Capture:
    """Run `forward` on a batch and record the layers. Call within `measuring`.

    Raises:
        ValueError: if the logits depend on no layer, or a layer's input does not have the examples first.
    """
    recorded = Capture(layers, forward)
    recorded.run(batch, all_labels)
    return recorded
