"""A self-test on a user's own model: what this package forms from it against what autograd and the model itself say."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.curvature.likelihood import LIKELIHOODS, MAX_EXACT_COLUMNS
from bayesian_lora_kernels.curvature.passes import Passes, fit_curvature
from bayesian_lora_kernels.model.alone import distance, logits_alone, logits_together, most_padded
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.capture import Capture
from bayesian_lora_kernels.model.containers import map_tensors
from bayesian_lora_kernels.model.dora import constant_norms, dora_layers
from bayesian_lora_kernels.model.forward import Forward, model_device
from bayesian_lora_kernels.model.jacobians import unit_cotangents
from bayesian_lora_kernels.model.layers import LinearLayer, find_layers
from bayesian_lora_kernels.model.measuring import measuring, undone
from bayesian_lora_kernels.model.memory import free_bytes
from bayesian_lora_kernels.model.pieces import captures
from bayesian_lora_kernels.model.probe import lowest_dtype
from bayesian_lora_kernels.ops.checks import accumulate_dtype

LOGITS = 3  # of an example, whose Jacobians are compared
JACOBIAN = {torch.float64: 1e-8, torch.float32: 1e-3}
MEANS = {torch.float64: 1e-8, torch.float32: 1e-3}
PIECES = {torch.float64: 1e-8, torch.float32: 1e-3}
HALF = 0.1
DIFFERENCES = 0.05  # central differences are no better


@dataclass(frozen=True)
class Agreement:
    """One comparison.

    Attributes:
        what: is compared with what.
        where: the parameter or layer that agrees least, or ``.
        error: relative to the largest number; None if it could not be compared.
        limit: up to which it counts as agreement.
        note: why it could not be compared, or what was held for it.
    """

    what: str
    where: str
    error: float | None
    limit: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether it agrees, or could not be compared."""
        return self.error is None or self.error <= self.limit


@dataclass(frozen=True)
class Verification:
    """What `LaplaceLoRA.verify` found. `print` shows it as a table."""

    agreements: tuple[Agreement, ...]

    @property
    def ok(self) -> bool:
        """Whether everything that could be compared agrees."""
        return all(agreement.ok for agreement in self.agreements)

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {"ok": self.ok, "agreements": [{**asdict(one), "ok": one.ok} for one in self.agreements]}

    def rows(self) -> list[tuple[str, ...]]:
        """The same as a table of words, the first row its header."""
        rows: list[tuple[str, ...]] = [("", "error", "limit", "what", "where")]
        for one in self.agreements:
            error = "-" if one.error is None else f"{one.error:.1e}"
            word = "not compared" if one.error is None else "agrees" if one.ok else "DIFFERS"
            rows.append((word, error, f"{one.limit:.0e}", one.what, one.where or one.note))
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join([*map(str.ljust, row, widths), row[4]]).rstrip() for row in rows)


def verify(
    layers: Sequence[LinearLayer],
    forward: Forward,
    given: nn.Module,
    config: LaplaceConfig,
    batch: Any,
) -> Verification:
    """Compare on one or two examples of a batch; the model stays as it is.

    Args:
        layers: that carry the posterior.
        forward: from a batch to logits.
        given: the model as the user gave it.
        config: of fits.
        batch: any; the example with most padding and one other are taken.
    """
    batch = _two(forward.read(batch, model_device(given)))
    dtype = min((p.dtype for p in given.parameters() if p.is_floating_point()), key=lambda d: torch.finfo(d).bits)
    found = _jacobians(layers, forward, given, batch, "in the model's dtype", JACOBIAN.get(dtype, HALF))
    found += _differences(layers, forward, given, batch, dtype)
    found += _in_float64(layers, forward, given, batch)
    found += _means(layers, forward, given, batch, MEANS.get(dtype, HALF))
    found += _pieces(layers, forward, given, config, batch, PIECES.get(dtype, HALF))
    return Verification(tuple(found))


def _two(batch: Batch) -> Batch:
    """The example with most padding and its neighbour, or the only one."""
    if batch.size == 0:
        raise ValueError("verify: expected at least one example, the batch has none")
    start = max(0, min(most_padded(batch), batch.size - 2))
    return batch.rows(start, start + 2) if batch.size > 2 else batch


def _jacobians(
    layers: Sequence[LinearLayer], forward: Forward, given: nn.Module, batch: Batch, how: str, limit: float
) -> list[Agreement]:
    """Captured weight gradients of every example against plain autograd on the example by itself."""
    names = [layer.name for layer in layers]
    sizes, differences = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    with measuring(given):
        for _, recorded in captures(layers, forward, batch, batch.size):
            chosen = range(min(LOGITS, recorded.logits[0].numel()))
            cotangents = unit_cotangents(recorded.logits, chosen)
            captured = [recorded.backward(cotangent, weight_gradients=names) for cotangent in cotangents]
            for row in range(len(recorded.logits)):
                expected = _autograd(recorded, layers, forward, row, chosen)
                for name, truth in expected.items():
                    parts = [g[name][row] for g in captured if name in g]
                    own = torch.stack(parts).to(truth) if parts else torch.zeros_like(truth)
                    sizes[name] = max(sizes[name], float(truth.abs().max().nan_to_num(0, 0)))
                    difference = float((own - truth).abs().max().nan_to_num(math.inf))  # NaN is no agreement
                    differences[name] = max(differences[name], difference)
    floor = max(1e-3 * max(sizes.values()), torch.finfo(torch.float32).tiny)  # below it is zero, but for rounding
    errors = {name: differences[name] / max(sizes[name], floor) for name in names}
    where = max(errors, key=lambda name: errors[name])
    return [Agreement(f"Jacobians against autograd, {how}", where, errors[where], limit)]


def _autograd(
    recorded: Capture, layers: Sequence[LinearLayer], forward: Forward, row: int, chosen: Sequence[int]
) -> dict[str, Tensor]:
    """`{layer: [C, d_out, d_in]}`, from the model's own logits of one example by itself, with no hook on anything."""
    own = logits_alone(recorded, row)
    if own is None or own.numel() < len(chosen):
        own = forward(recorded.batch.rows(row, row + 1), all_labels=False).logits[0]
    parameters = [(layer, leaf, p) for layer in layers for leaf, p in layer.parameters().items()]
    rows: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    for c in chosen:
        grads = torch.autograd.grad(own.flatten()[c], [p for *_, p in parameters], retain_graph=True, allow_unused=True)
        columns: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
        for (layer, _, p), g in zip(parameters, grads, strict=True):
            g = torch.zeros_like(p) if g is None else g
            g = g if g.ndim == 2 else g[:, None]
            columns[layer.name].append(g if layer.rows is None else g[layer.rows])
        for layer in layers:
            rows[layer.name].append(torch.cat(columns[layer.name], dim=1))
    return {name: torch.stack(parts).to(accumulate_dtype(parts[0])) for name, parts in rows.items()}


def _in_float64(layers: Sequence[LinearLayer], forward: Forward, given: nn.Module, batch: Batch) -> list[Agreement]:
    what, limit = "Jacobians against autograd, in float64", JACOBIAN[torch.float64]
    needed = 8 * sum(p.numel() for p in given.parameters())
    if needed > free_bytes(model_device(given)) // 2:
        return [Agreement(what, "", None, limit, f"a copy takes {needed / 2**30:.1f} GiB, too much of what is free")]
    try:
        with measuring(given):  # without what PEFT caches, which may have a graph
            double = copy.deepcopy(given).double()
        covers = {layer.name: tuple(leaf.rpartition(".")[2] for leaf in layer.parameters()) for layer in layers}
        settings = forward.class_token_ids, forward.masked, forward.checks.mode, forward.answers
        wide = Forward(double, forward.function, *settings)
        wide.findings = copy.deepcopy(forward.findings)
        found = find_layers(double, covers, wide.head_rows)
        doubled = Batch.unchecked(map_tensors(batch.given, lambda x: x.double() if x.is_floating_point() else x))
        return _jacobians(found, wide, double, doubled, "in float64", limit)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, KeyError) as error:
        reason = f"the model does not run in float64 ({type(error).__name__}: {error})"
        return [Agreement(what, "", None, limit, reason)]


def _differences(
    layers: Sequence[LinearLayer], forward: Forward, given: nn.Module, batch: Batch, dtype: torch.dtype
) -> list[Agreement]:
    """A derivative along a random direction against central differences: sees a backward pass that is itself wrong."""
    what = "derivative along a direction, backward pass against differences"
    if torch.finfo(dtype).bits < 32:
        return [Agreement(what, "", None, DIFFERENCES, f"{dtype} is too coarse for differences")]
    names = [layer.name for layer in layers]
    noise = torch.Generator().manual_seed(0)
    direction: dict[str, Tensor] = {}
    for layer in layers:
        matrix = layer.matrix()
        random = torch.randn(matrix.shape, generator=noise, dtype=torch.float32).to(matrix)
        direction[layer.name] = random * matrix.norm() / random.norm()
    with measuring(given):
        slope = 0.0
        for _, recorded in captures(layers, forward, batch, batch.size):
            (first,) = unit_cotangents(recorded.logits, [0])
            gradients = recorded.backward(first, weight_gradients=names, retain_graph=False)
            slope += sum(float((g.sum(dim=0) * direction[name]).sum()) for name, g in gradients.items())
        step = torch.finfo(dtype).eps ** (1 / 3)
        run = partial(_first_logits, forward, batch)
        with constant_norms(given, run):
            ends = [_moved(layers, direction, sign * step, run) for sign in (1, -1)]
    measured = (ends[0] - ends[1]) / (2 * step)
    scale = max(abs(measured), abs(slope), float(torch.finfo(torch.float32).tiny))
    note = "DoRA's norms held, as in training" if dora_layers(given) else ""
    return [Agreement(what, "", abs(measured - slope) / scale, DIFFERENCES, note)]


def _first_logits(forward: Forward, batch: Batch) -> float:
    with torch.no_grad():
        return float(forward(batch, all_labels=False).logits.flatten(1)[:, 0].double().sum())


def _moved(
    layers: Sequence[LinearLayer], direction: Mapping[str, Tensor], step: float, run: Callable[[], float]
) -> float:
    """`run()` with the weights a step away; they are back afterwards, bit by bit."""
    own = {name: (p, p.detach().clone()) for layer in layers for name, p in layer.parameters().items()}

    def restore() -> None:
        with torch.no_grad():
            for p, value in own.values():
                p.copy_(value)

    with undone(restore), torch.no_grad():
        for layer in layers:
            for name, part in layer.split(direction[layer.name]).items():
                p = own[name][0]
                if layer.rows is None:
                    p.add_(part, alpha=step)
                else:
                    p[layer.rows] += step * part
        return run()


def _means(
    layers: Sequence[LinearLayer], forward: Forward, given: nn.Module, batch: Batch, limit: float
) -> list[Agreement]:
    what, worst, compared = "logits of the batch against each example alone, without padding", 0.0, False
    if not isinstance(batch.inputs, Mapping):
        return [Agreement(what, "", None, limit, "the batch is no mapping, so nothing is known of padding")]
    with measuring(given), torch.enable_grad():
        for _, recorded in captures(layers, forward, batch, batch.size):
            for row in range(len(recorded.logits)):
                own = logits_alone(recorded, row)
                if own is not None:
                    off = distance(logits_together(recorded, row), own.detach(), lowest_dtype(recorded))
                    worst, compared = max(worst, off), True
    note = "" if compared else "forward=... is not asked about single examples"
    return [Agreement(what, "", worst if compared else None, limit, note)]


def _pieces(
    layers: Sequence[LinearLayer],
    forward: Forward,
    given: nn.Module,
    config: LaplaceConfig,
    batch: Batch,
    limit: float,
) -> list[Agreement]:
    """The curvature of the examples one at a time against that of all at once."""
    what = "fit of the examples in pieces against in one piece"
    fisher: Literal["exact", "empirical"] = "exact" if batch.labels is None else "empirical"
    if fisher == "exact":
        with measuring(given), torch.no_grad():
            logits = forward(batch, all_labels=True).logits
        if logits.ndim != 2 or LIKELIHOODS[config.likelihood]().exact_rank(logits.shape[1]) > MAX_EXACT_COLUMNS:
            return [Agreement(what, "", None, limit, "so many logits need a batch with labels")]
    plain = replace(config, curvature="kfac", fisher=fisher, rank=None)
    traces = []
    for budget in (None, 1):
        passes = Passes(given, layers, forward, [batch], replace(plain, memory_budget=budget))
        factors = fit_curvature(passes).curvature.factors
        assert factors is not None
        traces.append({name: torch.stack([f.a.diagonal().sum(), f.s.diagonal().sum()]) for name, f in factors.items()})
    worst, where = 0.0, ""
    for name, trace in traces[0].items():
        error = float(((traces[1][name] - trace).abs() / trace.abs().clamp_min(torch.finfo(trace.dtype).tiny)).max())
        if not error <= worst:
            worst, where = error, name
    return [Agreement(what, where, worst, limit)]
