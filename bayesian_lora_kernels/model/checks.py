"""What capturing takes for granted of a model, checked on the batch at hand; `docs/method.md` has the list.

A random cotangent runs backward with every example's share of it scaled by a power of two of its own. Whatever belongs
to an example then has changed by exactly its factor, in every layer; and autograd forms the weights' gradients beside
ours. Where a padded token would take a gradient with it, and where a layer has tokens that no mask describes, one more
forward pass with noise on the padding shows which tokens hold it. Last, one example runs alone, without padding and
through nothing but the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.model.alone import check_alone
from bayesian_lora_kernels.model.arguments import is_left_padded
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.capture import Capture, NotByExample
from bayesian_lora_kernels.model.host import on_host
from bayesian_lora_kernels.model.layers import LinearLayer
from bayesian_lora_kernels.model.layouts import Layout, layouts
from bayesian_lora_kernels.model.masks import MASK
from bayesian_lora_kernels.model.padding import find_masks
from bayesian_lora_kernels.model.probe import Probe, lowest_dtype, tolerance_of
from bayesian_lora_kernels.model.quantised import check_derivatives


def kind_of(batch: Batch, all_labels: bool) -> Any:
    """What two batches must have in common for a check of one to speak for the other."""
    inputs, labels = batch.inputs, batch.labels
    columns: list[Any] = []
    padding: list[Any] = []
    several = inputs if isinstance(inputs, (Mapping, tuple, list)) else [inputs]
    for key, value in several.items() if isinstance(several, Mapping) else enumerate(several):
        columns.append((key, value.ndim, value.dtype) if isinstance(value, Tensor) else (key, type(value)))
        if isinstance(key, str) and MASK in key and isinstance(value, Tensor) and value.ndim in (2, 3):
            padding.append((key, bool(on_host(value).all()), is_left_padded(value.flatten(0, -2))))
    shape = labels.ndim if isinstance(labels, Tensor) and all_labels else None
    return all_labels, batch.size == 1, shape, tuple(columns), tuple(padding)


def check(recorded: Capture, thorough: bool) -> None:
    """Check a capture, and write what is found out into `recorded.forward.findings`.

    Args:
        recorded: the capture.
        thorough: whether the examples run in reversed order, too.

    Raises:
        ValueError: if a layer's weight is used in a way that its calls do not show, if padding counts, if the model
            says something else about an example that runs alone, or if a quantised layer's backward pass is wrong.
        NotByExample: if some layer's examples cannot be told apart.
        OtherLogits: if an example by itself has others.
    """
    if thorough:
        check_derivatives(recorded.quantised)
    probe = Probe(recorded)
    probe.run(thorough)
    if not all(torch.isfinite(seen).all() for seen in probe.found.values()):
        recorded.read_inputs()  # whoever takes these gradients will refuse them
        return
    _check_totals(recorded, probe)
    _find_layouts(recorded, probe)
    find_masks(recorded, probe)
    check_alone(recorded)


def _check_totals(recorded: Capture, probe: Probe) -> None:
    for name, expected in probe.expected.items():
        layer = recorded.layers[name]
        if name not in probe.totals:
            off = float(expected.abs().max())
            used = off > 0
        else:
            total, size = probe.totals[name]
            dtype = min((probe.dtypes[name], expected.dtype), key=lambda d: torch.finfo(d).bits)
            level = tolerance_of(dtype, 1e-9, 1e-4, 2e-2) * float(size.max())
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


def _find_layouts(recorded: Capture, probe: Probe) -> None:
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
                findings.grouped[name] = findings.grouped.get(name, 0) + 1
        if found and found != findings.layouts.setdefault(name, found):
            recorded.forward.checks.changes(f"{name}: where its input has the examples")
            findings.layouts[name] = found


def _layout_of(recorded: Capture, probe: Probe, name: str, call: int) -> Layout | None:
    """The first reading under which every example's gradients are as its factors say."""
    n, shape = len(recorded.logits), recorded.calls[name][call].a.shape
    known = recorded.forward.findings.known_layout(name, call, shape, n)
    options = layouts(shape, n)
    if known is not None:
        options = [known, *(option for option in options if option != known)]
    key = name, call
    assert probe.reference is not None
    plain, turned = probe.reference[0].get(key), probe.reference[1]
    if key not in probe.found and plain is None:  # the logits do not depend on this call
        return options[0] if options else None
    if key not in probe.found or plain is None or plain.shape[:-1] != shape[:-1]:
        return None
    tolerance = tolerance_of(lowest_dtype(recorded), 1e-8, 1e-3, 0.1)
    for layout in options:
        own = layout.tokens(plain, n)
        own = own.flip(0) if turned else own
        if all(_follows(own, layout.tokens(seen[key], n), factors, tolerance) for factors, seen in probe.passes):
            return layout
    return None


def _follows(plain: Tensor, found: Tensor, factors: Tensor, tolerance: float) -> bool:
    """Whether the gradients `[N, T, PROJECTIONS]` of every example are its factor times the plain ones."""
    expected = plain * factors.to(plain)[:, None, None]
    sizes = expected.abs().amax(dim=(1, 2))
    far = (found - expected).abs().amax(dim=(1, 2))
    return bool((far <= tolerance * sizes + 1e-3 * tolerance * sizes.max()).all())
