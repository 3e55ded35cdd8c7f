"""What capturing takes for granted of a model, checked on the batch at hand; `docs/method.md` has the list.

A random cotangent runs backward with every example's share of it scaled by a power of two of its own. Whatever belongs
to an example then has changed by exactly its factor, in every layer; and autograd forms the weights' gradients beside
ours. Where a padded token would take a gradient with it, and where a layer has tokens that no mask describes, one more
forward pass with noise on the padding shows which tokens hold it. Last, one example runs alone, without padding and
through nothing but the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.model.batches import DECODER_MASK, batch_size, inputs_and_labels, reversed_batch, slice_batch
from bayesian_lora_kernels.model.capture import NOTHING, Call, Capture, NotByExample, accumulate_dtype
from bayesian_lora_kernels.model.containers import rebuilt
from bayesian_lora_kernels.model.forward import IGNORED_LABEL, Forward, is_left_padded
from bayesian_lora_kernels.model.layers import LinearLayer
from bayesian_lora_kernels.model.layouts import Layout, layouts
from bayesian_lora_kernels.model.masks import MASK, RELATIONS, Scopes, TokenMask, by_example, parameters_of
from bayesian_lora_kernels.model.measuring import hooked
from bayesian_lora_kernels.surroundings import callers_surroundings

LABELS = "labels"
FACTORS = tuple(sign * 2.0**k for k in (0, 1, -1, 2, -2, 3, -3) for sign in (1, -1))
Projections = dict[tuple[str, int], Tensor]
PROJECTIONS = 4  # of a gradient, in which the two passes are compared: enough to see any change, and little to keep


def kind_of(batch: Any, all_labels: bool) -> Any:
    """What two batches must have in common for a check of one to speak for the other."""
    inputs, labels = inputs_and_labels(batch)
    columns: list[Any] = []
    padding: list[Any] = []
    several = inputs if isinstance(inputs, (Mapping, tuple, list)) else [inputs]
    for key, value in several.items() if isinstance(several, Mapping) else enumerate(several):
        columns.append((key, value.ndim, value.dtype) if isinstance(value, Tensor) else (key, type(value)))
        if isinstance(key, str) and MASK in key and isinstance(value, Tensor) and value.ndim == 2:
            padding.append((key, bool(value.all()), is_left_padded(value)))
    shape = labels.ndim if isinstance(labels, Tensor) and all_labels else None
    return all_labels, batch_size(batch) == 1, shape, tuple(columns), tuple(padding)


def check(recorded: Capture, batch: Any, thorough: bool) -> None:
    """Check a capture, and write what is found out into `recorded.forward.findings`.

    Args:
        recorded: the capture.
        batch: that it is of.
        thorough: whether examples are told apart whatever order they are in; else only every second of them is.

    Raises:
        ValueError: if a layer's weight is used in a way that its calls do not show, if padding counts, or if the model
            says something else about an example that runs alone.
        NotByExample: if some layer's examples cannot be told apart.
        OtherLogits: if an example by itself has others.
    """
    probe = _Probe(recorded)
    probe.run(batch, thorough)
    if not all(torch.isfinite(seen).all() for seen in probe.found.values()):
        recorded.read_inputs()  # whoever takes these gradients will refuse them
        return
    _check_totals(recorded, probe)
    _find_layouts(recorded, probe)
    _find_masks(recorded, probe, batch)
    _check_alone(recorded, batch)


class _Probe:
    """What backward passes show of every call of a layer.

    The same random cotangent runs with every example's share of it times a factor of its own, and, where `thorough`, as
    it is with the examples in reversed order: a model that sorts its examples has sorted one of the two. Otherwise
    every other factor is zero, and what these examples get tells who gets what belongs to another.

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

    def run(self, batch: Any, thorough: bool) -> None:
        """The passes."""
        logits, mask = self.recorded.logits, self.recorded.result.mask
        n = len(logits)
        noise = torch.Generator().manual_seed(0)
        cotangent = torch.randn(logits.shape, generator=noise, dtype=torch.float32).to(logits.device, logits.dtype)
        if mask is not None:
            cotangent = cotangent.masked_fill(~mask[..., None].to(logits.device), 0)
        parameters = [
            (layer, leaf, p)
            for layer in self.recorded.layers.values()
            for leaf, p in (("weight", layer.module.weight), ("bias", layer.module.bias))
            if (layer.weight if leaf == "weight" else layer.bias) and p.requires_grad
        ]
        thorough = thorough and n > 1
        step = 1
        while step == 1 or (thorough and step < n):  # equal factors differ in the next digit of an example's number
            factors = torch.tensor([FACTORS[(i // step) % len(FACTORS)] for i in range(n)], dtype=torch.float64)
            if not thorough:
                factors[1::2] = 0
            scaled = cotangent * factors.to(cotangent).reshape(-1, *[1] * (cotangent.ndim - 1))
            wanted = parameters if step == 1 else []
            seen, gradients = self._pass(self.recorded, scaled, [p for _, _, p in wanted])
            self._expect([(layer, leaf, g, p) for (layer, leaf, p), g in zip(wanted, gradients, strict=True)])
            self.passes.append((factors, seen))
            step *= len(FACTORS)
        if thorough:
            other, again = reversed_batch(batch, n), self.recorded
            if other is not None:
                again = Capture(list(self.recorded.layers.values()), self.recorded.forward)
                again.run(other, self.recorded.all_labels)
                cotangent = cotangent.flip(0)
            self.reference = self._pass(again, cotangent, [])[0], other is not None

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

    def _expect(self, found: Sequence[tuple[LinearLayer, str, Tensor | None, Tensor]]) -> None:
        columns: dict[str, list[Tensor]] = {}
        layers = {layer.name: layer for layer, _, _, _ in found}
        for layer, _, g, p in found:
            g = torch.zeros_like(p) if g is None else g
            g = g if g.ndim == 2 else g[:, None]
            columns.setdefault(layer.name, []).append(g if layer.rows is None else g[layer.rows])
        for name, layer in layers.items():
            if len(columns[name]) == bool(layer.weight) + bool(layer.bias):
                self.expected[name] = torch.cat(columns[name], dim=1)


def _tolerance(dtype: torch.dtype, double: float, single: float, half: float) -> float:
    bits = torch.finfo(dtype).bits
    return double if bits == 64 else single if bits == 32 else half


def _check_totals(recorded: Capture, probe: _Probe) -> None:
    for name, expected in probe.expected.items():
        layer = recorded.layers[name]
        if name not in probe.totals:
            off = float(expected.abs().max())
            used = off > 0
        else:
            total, size = probe.totals[name]
            dtype = min((probe.dtypes[name], expected.dtype), key=lambda d: torch.finfo(d).bits)
            level = _tolerance(dtype, 1e-9, 1e-4, 2e-2) * float(size.max())
            difference = float((total - expected.to(total.dtype)).abs().max())
            used = not difference <= level + torch.finfo(total.dtype).tiny
            off = difference / max(float(expected.abs().max()), torch.finfo(total.dtype).tiny)
        if used:
            raise ValueError(
                f"{name}: the gradient of its weight, formed from its calls, is not autograd's (off by {off:.1e} of "
                f"it): {_suspicion(layer, name in probe.totals)}. Leave it out with modules=..., or make it a plain "
                "nn.Linear that is only ever called"
            )


def _suspicion(layer: LinearLayer, called: bool) -> str:
    module = layer.module
    if not called:
        return "its weight is used, but outside its own call, by a function or another module"
    if type(module).forward is not nn.Linear.forward:
        return f"it is a {type(module).__name__}, a subclass of nn.Linear with a forward of its own"
    if "forward" in vars(module):
        return "its forward has been replaced on the instance"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "a hook on it changes what its call returns, or its weight is used outside its own call"
    return "its weight is used outside its own call as well, by a function, another module or compiled code"


def _find_layouts(recorded: Capture, probe: _Probe) -> None:
    n, findings = len(recorded.logits), recorded.forward.findings
    if n == 1:
        return
    for name, calls in recorded.calls.items():
        found: list[Layout] = []
        for i, call in enumerate(calls):
            layout = _layout_of(recorded, probe, name, i)
            if layout is None:
                raise NotByExample(
                    f"{name}: its input, of shape {list(call.a.shape)}, does not have the batch's {n} examples apart "
                    "in any of its leading dimensions: what belongs to one example depends on another"
                )
            found.append(layout)
            if layout.groups(call.a.shape, n) > 1 and len(layouts(call.a.shape, n)) > 1:
                findings.grouped.add(name)
        if found and found != findings.layouts.setdefault(name, found):
            recorded.forward.checks.changes(f"{name}: where its input has the examples")
            findings.layouts[name] = found


def _layout_of(recorded: Capture, probe: _Probe, name: str, call: int) -> Layout | None:
    """The first reading under which every example's gradients are as its factors say."""
    n, shape = len(recorded.logits), recorded.calls[name][call].a.shape
    known = recorded.forward.findings.known_layout(name, call, shape, n)
    options = layouts(shape, n)
    if known is not None:
        options = [known, *(option for option in options if option != known)]
    key = name, call
    reference = None if probe.reference is None else probe.reference[0].get(key)
    if key not in probe.found and reference is None:  # the logits do not depend on this call
        return options[0] if options else None
    if key not in probe.found or (probe.reference and (reference is None or reference.shape[:-1] != shape[:-1])):
        return None
    tolerance = _tolerance(_lowest_dtype(recorded.forward), 1e-8, 1e-3, 0.1)
    for layout in options:
        if reference is None:
            factors, seen = probe.passes[0]
            if _is_apart(layout.tokens(seen[key], n), factors):
                return layout
            continue
        plain = layout.tokens(reference, n)
        plain = plain.flip(0) if probe.reference and probe.reference[1] else plain
        if all(_follows(plain, layout.tokens(seen[key], n), factors, tolerance) for factors, seen in probe.passes):
            return layout
    return None


def _is_apart(found: Tensor, factors: Tensor) -> bool:
    """Whether examples without a share in the cotangent have gradient zero."""
    level = NOTHING * torch.finfo(found.dtype).eps * found.abs().max()
    others = found[(factors == 0).to(found.device)]
    return not others.numel() or bool(others.abs().max() <= level)


def _follows(plain: Tensor, found: Tensor, factors: Tensor, tolerance: float) -> bool:
    """Whether the gradients `[N, T, PROJECTIONS]` of every example are its factor times the plain ones."""
    expected = plain * factors.to(plain)[:, None, None]
    sizes = expected.abs().amax(dim=(1, 2))
    far = (found - expected).abs().amax(dim=(1, 2))
    return bool((far <= tolerance * sizes + 1e-3 * tolerance * sizes.max()).all())


def _find_masks(recorded: Capture, probe: _Probe, batch: Any) -> None:
    """Which tokens are padding, for layers where the mask as it is does not say so."""
    n, findings = len(recorded.logits), recorded.forward.findings
    leaks, untold = [], []
    for name, calls in recorded.calls.items():
        if recorded.forward.in_head(name):
            continue
        for i, call in enumerate(calls):
            layout = findings.layout(name, i, call.a.shape, n)
            if layout is None or not any(mask.padded for mask in call.masks):
                continue
            mask = findings.mask(name, i, call.masks, call.a.shape, layout, n)
            if mask is not None and _leaks(recorded, probe, name, i, layout, mask):
                if call.masks[0].guessed:
                    findings.guesses = False
                else:
                    leaks.append((name, i))
            elif not findings.is_told(name, i, len(calls), call.masks, call.a.shape, layout, n):
                untold.append((name, i))
    if not leaks and not untold:
        recorded.read_inputs()
        return
    noisy = _with_noisy_padding(recorded, batch, vectors=True)
    if leaks and (noisy is None or noisy.changed):
        name = leaks[0][0]
        raise ValueError(
            f"{name}: padding counts: the logits depend on positions that the attention mask excludes"
            + ("" if noisy is None else f" (noise there changes them by {noisy.changed:.1e} of their size)")
            + ". Let the model, or forward=..., leave masked positions out (pool over valid tokens only, take the "
            "last valid token, pass the mask on), or pass batches without padding"
        )
    if untold and (noisy is None or not any(noisy.holds_padding(name, i) for name, i in untold)):
        by_ids = _with_noisy_padding(recorded, batch, vectors=False)
        if by_ids is not None and not by_ids.changed:  # else it reads something off the ids of its padding
            noisy = by_ids
    for name, i in [*leaks, *untold]:
        call = recorded.calls[name][i]
        layout = findings.layout(name, i, call.a.shape, n)
        assert layout is not None
        relation = None
        try:
            relation = _relation(call, layout, n, None if noisy is None or noisy.changed else noisy.of(name, i))
        except LookupError as reason:
            findings.unclear[name] = str(reason)
        if relation == "before others" and not _ends_in_gradients(recorded, probe, name, i, layout):
            relation = "before padding"  # that the model adds itself, to fill up a window
        tokens, masked = call.a[..., 0].numel() // n, call.masks[0].valid.shape[1]
        findings.relate(name, i, len(recorded.calls[name]), relation, tokens, masked)
    recorded.read_inputs()


def _ends_in_gradients(recorded: Capture, probe: _Probe, name: str, call: int, layout: Layout) -> bool:
    """Whether the tokens behind those of the longest mask have gradients."""
    g, n = probe.found.get((name, call)), len(recorded.logits)
    if g is None:
        return False
    tokens = max(mask.valid.shape[1] for mask in recorded.calls[name][call].masks)
    return bool(layout.tokens(g, n)[:, tokens:].any())


def _leaks(recorded: Capture, probe: _Probe, name: str, call: int, layout: Layout, mask: Tensor) -> bool:
    """Whether a masked token has a gradient and an input, so that leaving it out would leave something out."""
    g = probe.found.get((name, call))
    if g is None:
        return False
    n, layer = len(recorded.logits), recorded.layers[name]
    size = layout.tokens(g, n).abs().amax(dim=2)
    a = layout.tokens(layer.extend_input(recorded.calls[name][call].a), n)
    masked = ~mask.to(size.device)
    with_gradient = size > NOTHING * torch.finfo(probe.dtypes[name]).eps * size.max()
    return bool((masked & with_gradient & (a != 0).any(dim=2)).any())


@dataclass
class _Noisy:
    """What noise on the padding changes.

    Attributes:
        changed: the logits, relative to their size; 0 for nothing.
        padding: `{(layer, call): [...] bool}`, the rows of its input that changed.
    """

    changed: float
    padding: dict[tuple[str, int], Tensor]

    def of(self, name: str, call: int) -> Tensor:
        """Which rows of the input of a layer's call changed.

        Raises:
            LookupError: if there are others now: which tokens a layer sees depends on the padding.
        """
        if (name, call) not in self.padding:
            raise LookupError("which tokens it sees depends on what stands in the padding")
        return self.padding[name, call]

    def holds_padding(self, name: str, call: int) -> bool:
        """Whether any row of the input of a layer's call changed."""
        return (name, call) in self.padding and bool(self.padding[name, call].any())


@torch.no_grad()
def _with_noisy_padding(recorded: Capture, batch: Any, vectors: bool) -> _Noisy | None:
    """The forward pass again with noise on what the model is given at masked positions; None if it is given nothing.

    Args:
        recorded: the capture to compare with.
        batch: that it is of.
        vectors: whether noise goes onto embeddings, so that what a model reads off the ids themselves stays as it is,
            and onto inputs that are vectors already; or other ids take the place of those of the padding.
    """
    forward = recorded.forward
    scopes = Scopes(forward.batch_masks(batch))
    touched: list[bool] = []
    noise = torch.Generator().manual_seed(0)
    inputs: dict[str, list[Tensor]] = {}

    def disturb(x: Tensor, mask: Tensor) -> Tensor:
        touched.append(True)
        random = torch.randn(x.shape, generator=noise, dtype=torch.float32).to(x.device, x.dtype)
        masked = (~mask).reshape(*mask.shape, *[1] * (x.ndim - 2)).to(x.device)
        return torch.where(masked, x + random * (1 + x.abs().mean()), x)

    def other_ids(ids: Any, mask: TokenMask) -> Any:
        if not isinstance(ids, Tensor) or ids.shape != mask.valid.shape:
            return ids
        touched.append(True)
        rolled = ids[mask.valid].roll(1)  # some valid ids of the batch, which are no special ones
        another = torch.where(rolled[: len(rolled)] == ids[~mask.valid][0], rolled.max(), rolled)
        filled = ids.clone()
        filled[~mask.valid] = another[torch.arange(int((~mask.valid).sum()), device=ids.device) % len(another)]
        return filled

    def embedded(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        ids = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if ids is None or ids.ndim != 2:
            return None
        mask = next((m for m in scopes.about(output) if m.valid.shape == ids.shape), None)
        return None if mask is None or not mask.padded else disturb(output, mask.valid)

    def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = next(iter(scopes.about(torch.empty(0))), None)
        named = {**dict(zip(parameters_of(module), args, strict=False)), **kwargs}
        if mask is not None and mask.padded and not vectors:
            return args, {key: other_ids(x, mask) if key == "input_ids" else x for key, x in kwargs.items()}
        if mask is None or not mask.padded or any(MASK not in key and _are_ids(x, mask) for key, x in named.items()):
            return None

        def one(x: Any) -> Any:
            fits = isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 2 and x.shape[:2] == mask.valid.shape
            return disturb(x, mask.valid) if fits else x

        return tuple(map(one, args)), {key: one(value) for key, value in kwargs.items()}

    enter, leave = scopes.hooks(forward.model)
    embeddings = [(m, embedded) for m in forward.model.modules() if isinstance(m, nn.Embedding) and vectors]
    with hooked([*enter, (forward.model, given)], [*embeddings, *_notes(recorded, inputs), *leave]):
        logits = forward(batch, all_labels=recorded.result.head_mask is not None).logits
    if not touched:
        return None
    before, mask = recorded.logits.detach(), recorded.result.mask
    difference = (logits - before).abs()
    if mask is not None:
        difference = difference.masked_fill(~mask[..., None].to(difference.device), 0)
    size = float(difference.max()) / max(float(before.abs().max()), torch.finfo(before.dtype).tiny)
    level = _tolerance(_lowest_dtype(forward), 1e-10, 1e-5, 3e-2)
    padding = {}
    for name, found in inputs.items():
        for i, (call, a) in enumerate(zip(recorded.calls[name], found, strict=False)):
            if call.a.shape == a.shape:
                far = (a - call.a).abs() > _tolerance(a.dtype, 1e-10, 1e-4, 5e-2) * call.a.abs().max()
                padding[name, i] = far.any(dim=-1)
    return _Noisy(size if size > level else 0.0, padding)


def _notes(recorded: Capture, into: dict[str, list[Tensor]]) -> list[tuple[nn.Module, Any]]:
    """Hooks that write down the inputs of the layers' calls."""

    def note(layer: LinearLayer) -> Any:
        def run(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Tensor) -> None:
            into.setdefault(layer.name, []).append((args[0] if args else kwargs["input"]).detach())

        return run

    return [(layer.module, note(layer)) for layer in recorded.layers.values()]


def _are_ids(x: Any, mask: TokenMask) -> bool:
    """Whether a model's argument may be the ids of the tokens of a mask."""
    return isinstance(x, Tensor) and not x.is_floating_point() and x.shape == mask.valid.shape


def _relation(call: Call, layout: Layout, n: int, padding: Tensor | None) -> str | None:
    """How the tokens that hold padding follow from a mask; None if none of them holds any.

    Args:
        call: of the layer.
        layout: of its input.
        n: number of examples.
        padding: `[...]` bool, which rows of the input hold padding; None: nobody knows.

    Raises:
        LookupError: if they follow from no mask in a known way.
    """
    if padding is None:
        return None
    valid = ~layout.tokens(padding[..., None], n)[:, :, 0]
    fewer = valid.shape[1] < call.masks[0].valid.shape[1]
    if valid.all() and not fewer:  # of fewer tokens than the mask has, it may be that just these hold none
        return None
    for name, relate in RELATIONS.items():
        for mask in call.masks:
            laid = by_example(mask.valid, call.a.shape, layout, n)
            found = None if laid is None else relate(laid, valid.shape[1])
            if found is not None and found.shape == valid.shape and torch.equal(found.to(valid.device), valid):
                return name
    if valid.all():
        return None
    raise LookupError(
        f"its input of shape {list(call.a.shape)} holds padding in an order that does not follow from any mask"
    )


def _lowest_dtype(forward: Forward) -> torch.dtype:
    """The dtype that decides how exactly two runs of a model agree."""
    dtypes = {p.dtype for p in forward.model.parameters() if p.is_floating_point()}
    quantised = any(not p.is_floating_point() for p in forward.model.parameters())
    with callers_surroundings():
        if quantised or torch._C._is_any_autocast_enabled():
            return torch.bfloat16
    return min(dtypes, key=lambda d: torch.finfo(d).bits, default=torch.float32)


@torch.no_grad()
def _check_alone(recorded: Capture, batch: Any) -> None:
    """The example with most padding, by itself and without it, gives what it gives in the batch."""
    forward = recorded.forward
    inputs = inputs_and_labels(batch)[0]
    if not isinstance(inputs, Mapping):
        return
    row = most_padded(inputs)
    seen: dict[str, list[Tensor]] = {}
    with hooked(post=_notes(recorded, seen)):
        own = logits_alone(recorded, batch, row)
    if own is None:
        return
    mask = inputs.get(MASK)
    mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    off = distance(logits_together(recorded, batch, row), own)
    if off <= _tolerance(_lowest_dtype(forward), 1e-5, 1e-2, 0.25):
        if mask is not None and not mask.all():
            _compare_inputs(recorded, row, seen)
        return
    if mask is None or bool(mask.all()):
        raise OtherLogits(
            f"example {row} of the batch has other logits in it than by itself (off by {off:.1e} of their spread): the "
            "logits of an example depend on the other examples, or are not those that the output head's last position "
            "gives; pass forward=callable(model, batch) -> logits"
        )
    raise OtherLogits(
        f"example {row} of the batch has other logits among padding{' on the left' if is_left_padded(mask) else ''} "
        f"than by itself (off by {off:.1e} of their spread): the model counts padding, or positions from the first "
        "column on. Pad on the other side, pass position_ids, or pass batches without padding"
    )


def _compare_inputs(recorded: Capture, row: int, alone: Mapping[str, list[Tensor]]) -> None:
    """The tokens of one example that count in the batch are those that it has by itself, in every layer."""
    forward = recorded.forward
    for name, (a, mask, _) in recorded.inputs.items():
        if forward.in_head(name):
            continue
        layer = recorded.layers[name]
        here = a[row] if mask is None else a[row][mask[row].to(a.device)]
        rows = [layer.extend_input(x.reshape(-1, x.shape[-1])) for x in alone.get(name, [])]
        there = torch.cat(rows) if rows else here[:0]
        if any(relation.name == "before padding" for relation in forward.findings.relations.get(name, [])):
            there = there[: len(here)]  # the model fills up windows when it runs alone, too
        limit = _tolerance(_lowest_dtype(forward), 1e-5, 1e-2, 0.25)
        same = here.shape == there.shape and (here - there).abs().sum() <= limit * there.abs().sum()
        if not same:
            forward.findings.unclear[name] = (
                f"of example {row} it counts {len(here)} tokens, and {len(there)} or others when the example runs by "
                "itself without padding"
            )


def logits_alone(recorded: Capture, batch: Any, row: int) -> Tensor | None:
    """Logits `[C]` or `[P, C]` of one example of a batch by itself and without padding; None if nobody can say.

    They are the model's own under the default forward, and those of the user's function where that can be asked.
    """
    forward, n = recorded.forward, len(recorded.logits)
    inputs, labels = inputs_and_labels(batch)
    if not isinstance(inputs, Mapping):
        return None
    columns = {**inputs, LABELS: labels} if isinstance(labels, Tensor) else dict(inputs)
    if forward.seq2seq and forward.is_models_own and "decoder_input_ids" in inputs:  # which may be padded, too
        columns[DECODER_MASK] = forward.model_inputs(inputs).get(DECODER_MASK)
    alone = _without_padding(slice_batch(columns, row, row + 1, n), forward.seq2seq)
    return _own_logits(recorded, alone) if forward.is_models_own else _functions_logits(recorded, batch, row, alone)


def logits_together(recorded: Capture, batch: Any, row: int) -> Tensor:
    """The same as `logits_alone`, as they are in the batch."""
    here, mask = recorded.logits[row].detach(), inputs_and_labels(batch)[0].get(MASK)
    counted = recorded.result.mask if recorded.result.mask is not None else mask
    if here.ndim == 1 or not isinstance(counted, Tensor) or counted.ndim != 2 or counted.shape[1] != len(here):
        return here
    return here[counted[row].bool().to(here.device)]


class OtherLogits(ValueError):
    """An example has other logits in a batch than by itself: the model may want to be run in another way."""


def distance(found: Tensor, own: Tensor) -> float:
    """Largest difference of logits, relative to their spread."""
    if found.shape != own.shape:
        return math.inf
    if not own.numel():
        return 0.0
    spread = (own - own.mean(dim=-1, keepdim=True)).abs().max() if own.shape[-1] > 1 else own.abs().max()
    return float((found - own).abs().max() / spread.clamp_min(torch.finfo(own.dtype).tiny))


def most_padded(inputs: Mapping[str, Any]) -> int:
    """The last of the examples with most padding."""
    mask = inputs.get(MASK)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return (batch_size(inputs) or 1) - 1
    return len(mask) - 1 - int(mask.bool().sum(dim=1).flip(0).argmin())


def _without_padding(columns: Mapping[str, Any], seq2seq: bool) -> dict[str, Any]:
    """The columns of one example cut to its valid tokens, the decoder's by the decoder's mask."""
    cut = dict(columns)
    for key in (MASK, DECODER_MASK):
        mask = columns.get(key)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            continue
        valid = mask[0].bool()
        for name, value in columns.items():
            decoders = name.startswith("decoder_") or (seq2seq and name == LABELS)
            if not isinstance(value, Tensor) or decoders != (key == DECODER_MASK):
                continue
            if value.shape[:2] == mask.shape:
                cut[name] = value[:, valid]
            elif name == "position_ids" and value.shape[1:] == mask.shape:
                cut[name] = value[:, :, valid]
    return cut


def _functions_logits(recorded: Capture, batch: Any, row: int, alone: dict[str, Any]) -> Tensor | None:
    """What a function of the user's says about one example; None if it may be told where something is in the batch."""
    forward = recorded.forward
    if forward.function is None or not isinstance(batch, Mapping):
        return None
    mask, inputs = batch.get(MASK), inputs_and_labels(batch)[0]
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
        return None
    if any(isinstance(x, Tensor) and x.shape[:2] != mask.shape for x in inputs.values()):
        return None
    one = slice_batch(batch, row, row + 1, len(recorded.logits))
    try:
        result = forward(rebuilt(one, {key: alone.get(key, value) for key, value in one.items()}), all_labels=True)
    except Exception:  # it wants batches of its own kind
        return None
    logits = result.logits[0]
    return logits if result.mask is None else logits[result.mask[0].to(logits.device)]


def _own_logits(recorded: Capture, alone: Mapping[str, Any]) -> Tensor | None:
    """What the model itself says about one example, `[C]` or `[P, C]`; None if that cannot be compared."""
    forward, labels = recorded.forward, alone.get(LABELS)
    inputs = {key: value for key, value in alone.items() if key != LABELS}
    every = forward.head is not None and recorded.result.head_mask is not None
    kwargs = forward.model_inputs(inputs, labels if every else None)
    if "position_ids" not in inputs:
        kwargs.pop("position_ids", None)
    if forward.seq2seq and every and inputs.get("decoder_input_ids") is None:
        kwargs = {key: value for key, value in kwargs.items() if not key.startswith("decoder_")}
        kwargs[LABELS] = labels
    if forward.head is not None and not every and "logits_to_keep" in forward.accepted:
        kwargs["logits_to_keep"] = 1
    with callers_surroundings():
        output = forward.model(**kwargs)
    logits = (output if isinstance(output, Tensor) else output.logits)[0]
    if forward.head is not None and not every:
        logits = logits[-1]
        return logits if forward.class_token_ids is None else logits[forward.class_token_ids.to(logits.device)]
    if recorded.result.mask is None:
        return logits
    shift = 1 if every and not forward.seq2seq else 0
    if not isinstance(labels, Tensor) or labels.shape[1] != len(logits):
        return None
    return logits[: len(logits) - shift][(labels[0, shift:] != IGNORED_LABEL).to(logits.device)]
