"""From a batch to captures: as many examples at a time as memory allows, checked, and one by one where it must be."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesian_lora_kernels.model.alone import OtherLogits
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.capture import Capture, NotByExample
from bayesian_lora_kernels.model.checks import check, kind_of
from bayesian_lora_kernels.model.forward import Forward
from bayesian_lora_kernels.model.layers import LinearLayer
from bayesian_lora_kernels.model.out_of_memory import Limit, ran_out
from bayesian_lora_kernels.model.sharding import smallest

logger = logging.getLogger(__name__)


def captures(
    layers: Sequence[LinearLayer],
    forward: Forward,
    batch: Batch,
    step: int,
    *,
    all_labels: bool = False,
    limit: Limit | None = None,
    accept: Callable[[Capture], Any] = lambda _: None,
) -> Iterator[tuple[slice, Capture]]:
    """The examples of a batch, some at a time, each with the captures of its forward pass. Call within `measuring`.

    Args:
        layers: to record.
        forward: from a batch to logits.
        batch: on the model's device.
        step: examples at a time; where layers do not tell examples apart, one at a time whatever this says.
        all_labels: see `Forward`.
        limit: of examples at a time; where it is given, a piece for which memory runs out is tried again with half.
        accept: is called with each capture before anybody else has it; what it does belongs to the trial.

    Raises:
        ValueError: if the logits depend on no layer, or something that is taken for granted of the model does not hold
            (`docs/method.md`) and cannot be made up for.
        torch.OutOfMemoryError: if one example alone does not fit.
    """
    start, whole, cut = 0, None, False
    step = smallest(forward.model, step)
    while start < batch.size:
        step = step if limit is None else limit.within(step)
        if step < batch.size and not cut:
            whole, cut = _whole(forward, batch, all_labels), True
        rows, piece = next(batch.pieces(1 if forward.findings.one_at_a_time else step, start))
        ran = short = False
        try:
            recorded = capture(layers, forward, piece, all_labels=all_labels)
            ran = True
            accept(recorded)
        except _Together as together:
            _go_one_at_a_time(layers, forward, together)
            continue
        except Exception as error:
            short = limit is not None and ran_out(error)
            if limit is not None and short:
                limit.halve(piece.size, error)
            elif whole is None or ran:
                raise
            else:
                raise ValueError(
                    f"{whole}, and a piece of it does not run ({type(error).__name__}: {error})"
                ) from error
        if short:  # the error is gone, and with it what its frames held
            gc.collect()
            continue
        if whole is not None and not _same(recorded.logits.detach(), whole.logits[rows]):
            raise ValueError(f"{whole}, and in pieces its examples have other logits")
        yield rows, recorded
        start = rows.stop


def capture(layers: Sequence[LinearLayer], forward: Forward, batch: Batch, *, all_labels: bool = False) -> Capture:
    """Run `forward` on a batch, record the layers, and check what is due. Call within `measuring`.

    Raises:
        ValueError: as `captures`, and if the examples of the batch cannot be told apart.
    """
    due = forward.checks.due(kind_of(batch, all_labels))
    recorded = _run(layers, forward, batch, all_labels, bool(due))
    n = len(recorded.logits)
    try:
        if due != "thorough" and forward.checks.mode != "off" and _is_new(recorded):
            recorded, due = _run(layers, forward, batch, all_labels, True), "thorough"
        if due and _is_finite(recorded) and (all_labels or recorded.logits.ndim == 2):  # else there is no prediction
            recorded = _checked(recorded, layers, due == "thorough")
        else:
            recorded.read_inputs()
            forward.checks.unchecked += n > 1
    except NotByExample as error:
        if n == 1:
            raise ValueError(str(error)) from error
        raise _Together(str(error), recorded) from error
    return recorded


class _Whole(NamedTuple):
    """A batch of which some columns are in every piece as a whole; with the logits that it has in one piece."""

    keys: list[str]
    logits: Tensor

    def __str__(self) -> str:
        return (
            f"{', '.join(self.keys)}: the batch is too large for one piece, but nothing says how to cut these into "
            "those of single examples; raise memory_budget, or pass smaller batches"
        )


def _whole(forward: Forward, batch: Batch, all_labels: bool) -> _Whole | None:
    keys = batch.uncut
    if not keys or not forward.checks.due((*keys, kind_of(batch, all_labels))):
        return None
    with torch.no_grad():
        return _Whole(keys, forward(batch, all_labels=all_labels).logits)


class _Together(ValueError):
    """Examples that cannot be told apart while they run together; with the logits that they then have."""

    def __init__(self, message: str, recorded: Capture):
        super().__init__(message)
        self.batch, self.logits, self.all_labels = recorded.batch, recorded.logits.detach(), recorded.all_labels


def _run(layers: Sequence[LinearLayer], forward: Forward, batch: Batch, all_labels: bool, due: bool) -> Capture:
    recorded = Capture(layers, forward)
    recorded.run(batch, all_labels, differentiable=due)
    return recorded


def _is_finite(recorded: Capture) -> bool:
    """Whether the logits that count are finite; if not, there is nothing to compare, and whoever uses them says so."""
    logits, mask = recorded.logits.detach(), recorded.result.mask
    return bool(torch.isfinite(logits if mask is None else logits[mask.to(logits.device)]).all())


def _is_new(recorded: Capture) -> bool:
    """Whether some layer was called in a way that no check has seen."""
    n, findings = len(recorded.logits), recorded.forward.findings
    for name, calls in recorded.calls.items():
        for i, call in enumerate(calls):
            layout = findings.known_layout(name, i, call.a.shape, n)
            if layout is None or not findings.is_settled(name, i, call.a.shape, n):
                return True
            if recorded.forward.in_head(name):
                continue
            if not findings.is_told(name, i, len(calls), call.masks, call.a.shape, layout, n):
                return True
    return False


def _checked(recorded: Capture, layers: Sequence[LinearLayer], thorough: bool) -> Capture:
    """The capture, checked; or another one, if the model had to be run in another way."""
    forward, batch = recorded.forward, recorded.batch
    try:
        check(recorded, thorough)
        return recorded
    except OtherLogits as error:
        way = forward.findings.way
        for other in forward.other_ways(batch):
            forward.findings.way = other
            try:
                again = _run(layers, forward, batch, recorded.all_labels, True)
                check(again, thorough)
                return again
            except OtherLogits:
                continue
            except BaseException:
                forward.findings.way = way
                raise
        forward.findings.way = way
        raise error


def _go_one_at_a_time(layers: Sequence[LinearLayer], forward: Forward, together: _Together) -> None:
    """From here on examples run one by one, provided that this changes nothing about their logits.

    Raises:
        ValueError: if it does, or if batches have been measured in the belief that it was not needed.
    """
    forward.checks.changes(f"{together}. This")
    forward.checks.steady = True
    for row in (0, together.batch.size - 1):
        try:
            alone = _run(layers, forward, together.batch.rows(row, row + 1), together.all_labels, False).logits
        except Exception as error:
            raise ValueError(
                f"{together}; and an example of the batch does not run by itself ({type(error).__name__}: {error})"
            ) from error
        if not _same(alone.detach(), together.logits[row : row + 1]):
            raise ValueError(
                f"{together}; and by itself an example has other logits than in the batch: the examples of a batch "
                "depend on each other, which no posterior over logits of single examples can say. Pass batches of one "
                "example, or forward=callable(model, batch) -> logits that treats examples apart"
            )
    logger.info("examples run one at a time: %s", together)
    forward.findings.one_at_a_time = True


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.ndim == 3 and expected.ndim == 3:  # positions packed to the front; how many depends on the batch
        expected = expected[:, : found.shape[1]]
    if found.shape != expected.shape:
        return False
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-4}.get(found.dtype, 5e-2)
    level = max(float(expected.abs().max()), math.sqrt(torch.finfo(torch.float32).tiny))
    return bool((found - expected).abs().max() <= tolerance * level)
