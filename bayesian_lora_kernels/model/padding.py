"""Which tokens of a layer hold padding, where the mask as it is does not say so: noise on the padding shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.model.capture import Call, Capture
from bayesian_lora_kernels.model.layouts import Layout
from bayesian_lora_kernels.model.masks import MASK, RELATIONS, Scopes, TokenMask, by_example, parameters_of
from bayesian_lora_kernels.model.measuring import hooked
from bayesian_lora_kernels.model.probe import Probe, lowest_dtype, noting, tolerance_of
from bayesian_lora_kernels.ops.masked_gradient.op import ROUNDINGS


def find_masks(recorded: Capture, probe: Probe) -> None:
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
    noisy = _with_noisy_padding(recorded, vectors=True)
    if leaks and (noisy is None or noisy.changed):
        name = leaks[0][0]
        raise ValueError(
            f"{name}: padding counts: the logits depend on positions that the attention mask excludes"
            + ("" if noisy is None else f" (noise there changes them by {noisy.changed:.1e} of their size)")
            + ". Let the model, or forward=..., leave masked positions out (pool over valid tokens only, take the "
            "last valid token, pass the mask on), or pass batches without padding"
        )
    if untold and (noisy is None or not any(noisy.holds_padding(name, i) for name, i in untold)):
        by_ids = _with_noisy_padding(recorded, vectors=False)
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


def _ends_in_gradients(recorded: Capture, probe: Probe, name: str, call: int, layout: Layout) -> bool:
    """Whether the tokens behind those of the longest mask have gradients."""
    g, n = probe.found.get((name, call)), len(recorded.logits)
    if g is None:
        return False
    tokens = max(mask.valid.shape[1] for mask in recorded.calls[name][call].masks)
    return bool(layout.tokens(g, n)[:, tokens:].any())


def _leaks(recorded: Capture, probe: Probe, name: str, call: int, layout: Layout, mask: Tensor) -> bool:
    """Whether a masked token has a gradient and an input, so that leaving it out would leave something out."""
    g = probe.found.get((name, call))
    if g is None:
        return False
    n, layer = len(recorded.logits), recorded.layers[name]
    size = layout.tokens(g, n).abs().amax(dim=2)
    a = layout.tokens(layer.extend_input(recorded.calls[name][call].a), n)
    masked = ~mask.to(size.device)
    with_gradient = size > ROUNDINGS * torch.finfo(probe.dtypes[name]).eps * size.max()
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
def _with_noisy_padding(recorded: Capture, vectors: bool) -> _Noisy | None:
    """The forward pass again with noise on what the model is given at masked positions; None if it is given nothing.

    Args:
        recorded: the capture to compare with.
        vectors: whether noise goes onto embeddings, so that what a model reads off the ids themselves stays as it is,
            and onto inputs that are vectors already; or other ids take the place of those of the padding.
    """
    forward, batch = recorded.forward, recorded.batch
    scopes = Scopes(batch.masks if forward.masked else [])
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
        filled, pads = ids.clone(), ids[~mask.valid]
        others = ids[mask.valid]  # ids of text, which are no special ones
        others = others[others != pads[0]] if (others != pads[0]).any() else others
        filled[~mask.valid] = others[torch.arange(len(pads), device=ids.device) % len(others)]
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
    with hooked([*enter, (forward.model, given)], [*embeddings, *noting(recorded, inputs), *leave]):
        logits = forward(batch, all_labels=recorded.result.head_mask is not None).logits
    if not touched:
        return None
    before, mask = recorded.logits.detach(), recorded.result.mask
    difference = (logits - before).abs()
    if mask is not None:
        difference = difference.masked_fill(~mask[..., None].to(difference.device), 0)
    size = float(difference.max()) / max(float(before.abs().max()), torch.finfo(before.dtype).tiny)
    level = tolerance_of(lowest_dtype(recorded), 1e-10, 1e-5, 3e-2)
    padding = {}
    for name, found in inputs.items():
        for i, (call, a) in enumerate(zip(recorded.calls[name], recorded.of_reached(name, found), strict=False)):
            if call.a.shape == a.shape:
                far = (a - call.a).abs() > tolerance_of(a.dtype, 1e-10, 1e-4, 5e-2) * call.a.abs().max()
                padding[name, i] = far.any(dim=-1)
    return _Noisy(size if size > level else 0.0, padding)


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
