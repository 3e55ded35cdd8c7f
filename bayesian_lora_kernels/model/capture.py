"""Inputs and output gradients of the linear layers: the only place that reaches into a running model.

One forward pass records every layer's input and puts an identity node behind its output. A backward pass then runs from
the logits to those nodes and nowhere else: no weight gradient is formed and no `.grad` is touched. What this takes for
granted of a model is checked in `checks.py`.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.deferred import AT_ONCE, AtOnce
from bayesian_lora_kernels.model.forward import Forward, ForwardResult
from bayesian_lora_kernels.model.layers import LinearLayer
from bayesian_lora_kernels.model.layouts import Layout
from bayesian_lora_kernels.model.masks import Scopes, TokenMask
from bayesian_lora_kernels.model.measuring import hooked, undo_when_measured
from bayesian_lora_kernels.model.quantised import Seen, noting_quantised
from bayesian_lora_kernels.ops.checks import accumulate_dtype

WAITING_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}  # of output gradients that wait for a grouped operation
REENTRANT = (
    "under torch.no_grad() or under checkpointing with use_reentrant=True, which only loss.backward() sees through; "
    "checkpoint with use_reentrant=False"
)
Receive = Callable[[str, int, Tensor], None]
T = TypeVar("T")


class NotByExample(Exception):
    """A layer's input or gradients cannot be told apart by example; with one example at a time they need not be."""


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


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
        a: the module's input, as it came: `[..., in_features]`.
        version: of its storage then.
        key: of that tensor.
        graph: whether it ran with gradients.
        masks: that may describe its tokens, the likeliest first.
    """

    a: Tensor
    version: int
    key: tuple[Any, ...]
    graph: bool
    masks: tuple[TokenMask, ...]


class _Arrived(NamedTuple):
    """The gradient of one call of a layer.

    Attributes:
        name: of the layer.
        call: its number.
        g: `[N, t, d_out]`.
        a: the input, `[N, t, d_in]`.
        mask: `[N, t]`.
    """

    name: str
    call: int
    g: Tensor
    a: Tensor
    mask: Tensor | None


class _Mailbox:
    """Where taps deliver. It knows nothing of the capture, so that the graph does not keep the capture alive."""

    receive: Receive | None = None


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


def _taps_behind(logits: Tensor) -> dict[tuple[str, int], Any]:
    """`{(layer, number of its call): tap}` of all taps that a backward pass from the logits runs through."""
    taps = (node for node in _nodes(logits) if getattr(node, "_forward_cls", None) is _Tap)
    return {(node.name, node.call): node for node in taps}


def _nodes(logits: Tensor) -> Iterator[Any]:
    """Every node of the graph once."""
    seen, ahead = set(), [logits.grad_fn]
    while ahead:
        node: Any = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        ahead += [before for before, _ in node.next_functions]


class Capture:
    """One forward pass with its graph: layer inputs now, output gradients for any cotangent on request."""

    def __init__(self, layers: Sequence[LinearLayer], forward: Forward):
        self.layers = {layer.name: layer for layer in layers}
        self.forward = forward
        self.calls: dict[str, list[Call]] = {layer.name: [] for layer in layers}
        self._spans: dict[str, list[tuple[Layout, int, int]]] = {}  # which of a layer's tokens each call has
        self._reached: dict[str, list[bool]] = {}  # which calls the logits depend on, if it is not all of a layer's
        self._mailbox = _Mailbox()
        self._sink: Tensor | None = None
        self.parameters: dict[str, dict[str, Tensor]] = {}  # of each layer, as its call found them
        self.quantised: Seen = {}  # layers beside these, and some of their input
        self.all_labels = False
        self.batch: Batch
        self.result: ForwardResult
        self.inputs: dict[str, LayerInput] = {}

    @property
    def logits(self) -> Tensor:
        """`[N, C]` or `[N, T, C]`, with their graph."""
        return self.result.logits

    def run(self, batch: Batch, all_labels: bool, differentiable: bool = False) -> None:
        """The forward pass, with hooks that are gone when it ends.

        Args:
            batch: on the model's device.
            all_labels: see `Forward`.
            differentiable: whether autograd, too, shall be able to differentiate with respect to the layers' weights.
        """
        self.all_labels = all_labels
        scopes = Scopes(batch.masks if self.forward.masked else [])
        given: dict[int, tuple[tuple[Any, ...], tuple[TokenMask, ...]]] = {}  # key and masks of a module's input
        seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        serial = itertools.count()

        def identify(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if x is None:
                given[id(module)] = (next(serial),), ()
                return
            known = seen.get(id(x))
            if known is None or known[0]() is not x:  # an address may be used again once its tensor has gone
                known = seen[id(x)] = (weakref.ref(x), next(serial))
            given[id(module)] = (known[1], x._version), scopes.about(x)

        def recorder(layer: LinearLayer) -> Any:
            def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
                a = (args[0] if args else kwargs["input"]).detach()
                expected = (*a.shape[:-1], layer.module.out_features)
                shape = output.shape if isinstance(output, Tensor) else f"a {type(output).__name__}"
                if shape != expected or a.shape[-1] != layer.module.in_features:
                    raise ValueError(
                        f"{layer.name} ({type(layer.module).__name__}): expected [..., {layer.module.in_features}] -> "
                        f"[..., {layer.module.out_features}] as of a plain nn.Linear, got {list(a.shape)} -> {shape}; "
                        "leave this subclass out with modules=..."
                    )
                calls = self.calls[layer.name]
                key = (given[id(layer.input_source)][0], a.dtype, bool(layer.weight), bool(layer.bias))
                calls.append(Call(a, a._version, key, torch.is_grad_enabled(), given[id(layer.outer)][1]))
                if self._sink is None:
                    self._sink = torch.zeros((), device=output.device, dtype=torch.float32, requires_grad=True)
                return _Tap.apply(output, self._sink, self._mailbox, layer.name, len(calls) - 1)

            return record

        def ready(layer: LinearLayer) -> Any:
            def prepare(*_: Any) -> None:
                self.parameters[layer.name] = found = layer.parameters()
                _require_gradients([p for p in found.values() if not p.requires_grad])

            return prepare

        sourced = {id(m): m for layer in self.layers.values() for m in (layer.input_source, layer.outer)}
        enter, leave = scopes.hooks(self.forward.model) if self.forward.masked else ([], [])
        with hooked(
            [
                *enter,
                *((m, identify) for m in sourced.values()),
                *((layer.module, ready(layer)) for layer in self.layers.values() if differentiable),
            ],
            [
                *((layer.module, recorder(layer)) for layer in self.layers.values()),
                *leave,
                *(noting_quantised(self.forward.model, self.quantised) if differentiable else []),
            ],
        ):
            self.result = self.forward(batch, all_labels=all_labels)
        if self._sink is None or not self.result.logits.requires_grad:
            raise ValueError(
                "forward: the logits do not depend on any of the layers: none was called (an adapter that is merged, "
                "disabled or not active?), forward runs under torch.no_grad(), or a layer behind them has no "
                "derivative (a quantised one that is made for inference)"
            )
        self.batch = replace(batch, size=len(self.logits))  # of objects that nobody can count, the logits tell it
        self._check_graph()
        self._drop_unreached()
        self._check_unchanged()

    def release(self) -> None:
        """Lets the graph go, and with it most of the memory; no backward pass follows."""
        self.result = self.result._replace(logits=self.logits.detach())

    def of_reached(self, name: str, calls: Sequence[T]) -> Sequence[T]:
        """Of all calls of a layer, in another forward pass too, those that the logits depend on."""
        reached = self._reached.get(name)
        return calls if reached is None or len(reached) != len(calls) else list(itertools.compress(calls, reached))

    def _check_graph(self) -> None:
        """A call without gradients is a constant, unless checkpointing hides it from all but `loss.backward()`."""
        hidden = {name: calls for name, calls in self.calls.items() if not all(call.graph for call in calls)}
        checkpointed = bool(hidden) and any("CheckpointFunction" in type(n).__name__ for n in _nodes(self.logits))
        for name, calls in hidden.items():
            if checkpointed or not any(call.graph for call in calls):
                raise ValueError(f"{name}: it runs without gradients, {REENTRANT}, or leave it out with modules=...")

    def _drop_unreached(self) -> None:
        """Forget calls that the logits do not depend on, of layers with several.

        DoRA sends an identity matrix through A and B, for a norm that counts as a constant.
        """
        if all(len(calls) < 2 for calls in self.calls.values()):
            return
        taps = _taps_behind(self.logits)
        for name, calls in self.calls.items():
            reached = [(name, i) in taps for i in range(len(calls))]
            if len(calls) < 2 or all(reached):
                continue
            self._reached[name] = reached
            self.calls[name] = list(self.of_reached(name, calls))
            for new, old in enumerate(itertools.compress(range(len(calls)), reached)):
                taps[name, old].call = new

    def _check_unchanged(self) -> None:
        for name, calls in self.calls.items():
            if self.layers[name].weight and any(call.a._version != call.version for call in calls):
                raise ValueError(f"{name}: its input was changed in place after it had used it")

    def read_inputs(self) -> None:
        """Fill in `inputs`, as the checks' findings about this model say.

        Raises:
            NotByExample: if no reading of some layer's input as N examples is known.
        """
        n, findings = len(self.logits), self.forward.findings
        self.inputs, self._spans = {}, {}
        shared: dict[tuple[Any, ...], tuple[Tensor, Tensor | None]] = {}
        masks_of: dict[tuple[Any, ...], Tensor | None] = {}
        for name, calls in self.calls.items():
            if not calls:
                continue
            layer = self.layers[name]
            readings = [findings.layout(name, i, call.a.shape, n) for i, call in enumerate(calls)]
            if any(layout is None for layout in readings):
                seen = ", ".join(str(list(call.a.shape)) for call in calls[:3])
                raise NotByExample(
                    f"{name}: its input, of shape {seen}, does not have the batch's {n} examples in any of its "
                    "leading dimensions"
                )
            layouts = [layout for layout in readings if layout is not None]
            head_mask = self.result.head_mask if self.forward.in_head(name) else None
            key: tuple[Any, ...] = tuple(
                (call.key, layout, *map(id, call.masks), findings.relation(name, i).name, head_mask is not None)
                for i, (call, layout) in enumerate(zip(calls, layouts, strict=True))
            )
            ends = itertools.accumulate((call.a[..., 0].numel() // n for call in calls), initial=0)
            self._spans[name] = [(one, *span) for one, span in zip(layouts, itertools.pairwise(ends), strict=True)]
            if key not in shared:
                tokens = [layout.tokens(call.a, n) for layout, call in zip(layouts, calls, strict=True)]
                described = (
                    tokens[0].device,
                    *((part[1:], call.a.shape[:-1]) for part, call in zip(key, calls, strict=True)),
                )
                if described not in masks_of:  # one tensor for all layers whose tokens are the same
                    masks = [
                        findings.mask(name, i, call.masks, call.a.shape, layout, n) if head_mask is None else head_mask
                        for i, (call, layout) in enumerate(zip(calls, layouts, strict=True))
                    ]
                    masks_of[described] = _joined(masks, tokens)
                a = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
                shared[key] = (layer.extend_input(a), masks_of[described])
            self.inputs[name] = LayerInput(*shared[key], key)

    def backward(
        self,
        cotangent: Tensor,
        *,
        weight_gradients: Collection[str] = (),
        retain_graph: bool = True,
        checks: AtOnce = AT_ONCE,
    ) -> dict[str, Tensor]:
        """Gradients of `<cotangent, logits>` with respect to the layers' outputs, for every example at once.

        Args:
            cotangent: of the shape of the logits. Examples do not interact, so one pass serves all of them.
            weight_gradients: layers of which the per-example weight gradient `sum_t g_t a_t^T` is wanted instead; they
                are formed as the gradients arrive, a few at a time, so that wide output gradients do not pile up.
            retain_graph: whether another backward pass follows.
            checks: when to look whether what a mask leaves out had a gradient.

        Returns:
            `{name: [N, T, d_out]}`, tokens as in `inputs`, anything where the mask is False; or `[N, d_out, d_in]`
            float32 (float64 for a float64 model) for `weight_gradients`.
        """
        parts: dict[str, dict[int, Tensor]] = {name: {} for name in self.inputs}
        arrived: list[_Arrived] = []

        def receive(name: str, call: int, g: Tensor) -> None:
            a, mask, _ = self.inputs[name]
            layout, start, stop = self._spans[name][call]
            g = layout.tokens(self.layers[name].used_rows(g.detach()), len(self.logits))
            mask = None if mask is None else mask[:, start:stop]
            arrived.append(_Arrived(name, call, g, a[:, start:stop], mask))
            if sum(one.g.numel() for one in arrived) >= WAITING_ELEMENTS.get(g.device.type, WAITING_ELEMENTS["cuda"]):
                take()

        def take() -> None:
            if self.forward.checks.mode != "off":
                self._check_left_out([one for one in arrived if one.mask is not None], checks)
            for one in arrived:
                if one.name not in weight_gradients:
                    parts[one.name][one.call] = one.g
            for name, gradient in _formed([one for one in arrived if one.name in weight_gradients]):
                parts[name][0] = parts[name][0] + gradient if 0 in parts[name] else gradient
            arrived.clear()

        self.raw_backward(cotangent, receive, (), retain_graph)
        take()
        return {name: self._assemble(name, calls, name in weight_gradients) for name, calls in parts.items()}

    def _check_left_out(self, arrived: Sequence[_Arrived], checks: AtOnce) -> None:
        """Whether what was masked had no input where it had a gradient: else leaving it out would leave something out.

        Raises:
            ValueError: when `checks` look, for the first layer where it is not so.
        """
        for device in dict.fromkeys(one.g.device for one in arrived):
            here = [one for one in arrived if one.g.device == device]
            if device.type == "cpu":
                here = [one for one in here if one.mask is not None and one.g[~one.mask].any()]
            if here:
                gs, inputs, masks = ([getattr(one, part) for one in here] for part in ("g", "a", "mask"))
                names = [one.name for one in here]
                checks.add(ops.grouped_masked_gradient(gs, inputs, masks), functools.partial(_padding_counts, names))

    def without_gradient(self) -> dict[str, Tensor]:
        """Weight gradients `[N, d_out, d_in]` of the layers that were not called: zero."""
        n, dtype = len(self.logits), accumulate_dtype(self.logits)
        return {
            name: torch.zeros(n, *layer.shape, dtype=dtype, device=layer.device)
            for name, layer in self.layers.items()
            if name not in self.inputs
        }

    def raw_backward(
        self, cotangent: Tensor, receive: Receive, parameters: Sequence[Tensor], retain_graph: bool = True
    ) -> tuple[Tensor | None, ...]:
        """One backward pass.

        Args:
            cotangent: of the shape of the logits.
            receive: is called with a layer's name, the number of its call and the gradient of that call's output.
            parameters: of which autograd shall form the gradients, too.
            retain_graph: whether another pass follows.

        Returns:
            The gradients of `parameters`.
        """
        assert self._sink is not None
        self._mailbox.receive = receive
        try:
            return torch.autograd.grad(
                self.logits,
                [self._sink, *parameters],
                cotangent.to(self.logits.dtype),
                retain_graph=retain_graph,
                allow_unused=True,
            )[1:]
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise ValueError(f"the model runs partly {REENTRANT}") from error
            raise
        finally:
            self._mailbox.receive = None

    def _assemble(self, name: str, parts: dict[int, Tensor], weight_gradient: bool) -> Tensor:
        """One tensor from the calls' parts; what the logits do not depend on has gradient zero."""
        layer, a = self.layers[name], self.inputs[name].a
        n, tokens, d_in = a.shape
        if weight_gradient:
            return parts[0] if parts else a.new_zeros(n, layer.shape[0], d_in, dtype=accumulate_dtype(a))
        if len(parts) == 1 and len(self.calls[name]) == 1:
            return parts[0]
        g = a.new_zeros(n, tokens, layer.shape[0])
        for call, (_, start, stop) in enumerate(self._spans[name]):
            if call in parts:
                g[:, start:stop] = parts[call]
        return g


def _require_gradients(frozen: Sequence[Tensor]) -> None:
    def freeze() -> None:
        for p in frozen:
            p.requires_grad_(False)

    if frozen:
        undo_when_measured(freeze)
    for p in frozen:
        p.requires_grad_(True)


def _joined(masks: Sequence[Tensor | None], tokens: Sequence[Tensor]) -> Tensor | None:
    """The masks of a layer's calls as one, `[N, T]`; None if every token counts."""
    if all(mask is None for mask in masks):
        return None
    parts = [
        x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.to(x.device)
        for mask, x in zip(masks, tokens, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _formed(arrived: Sequence[_Arrived]) -> Iterator[tuple[str, Tensor]]:
    """The weight gradients of calls, one grouped operation per device."""
    for device in dict.fromkeys(one.g.device for one in arrived):
        here = [one for one in arrived if one.g.device == device]
        columns = [one.g for one in here], [one.a for one in here]
        found = ops.grouped_weight_gradient(*columns, masks=[one.mask for one in here])
        yield from zip([one.name for one in here], found, strict=True)


def _padding_counts(names: Sequence[str], index: int) -> ValueError:
    return ValueError(
        f"{names[index]}: padding counts: the logits depend on positions that the attention mask excludes, in this "
        "batch and not in those before it. Let the model leave masked positions out, or pass batches without padding"
    )
