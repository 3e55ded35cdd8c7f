"""One example by itself, without padding and through nothing but the model: what it gives there it gives in a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.model.answers import each_answer, token_mask
from bayesian_lora_kernels.model.arguments import is_left_padded
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.capture import Capture
from bayesian_lora_kernels.model.containers import rebuilt
from bayesian_lora_kernels.model.forward import IGNORED_LABEL
from bayesian_lora_kernels.model.masks import MASK
from bayesian_lora_kernels.model.measuring import hooked
from bayesian_lora_kernels.model.probe import lowest_dtype, noting, tolerance_of
from bayesian_lora_kernels.model.reading import DECODER_MASK
from bayesian_lora_kernels.surroundings import callers_surroundings

LABELS = "labels"


@torch.no_grad()
def check_alone(recorded: Capture) -> None:
    """The example with most padding, by itself and without it, gives what it gives in the batch."""
    inputs = recorded.batch.inputs
    if not isinstance(inputs, Mapping):
        return
    row = most_padded(recorded.batch)
    seen: dict[str, list[Tensor]] = {}
    with hooked(post=noting(recorded, seen)):
        own = logits_alone(recorded, row)
    if own is None:
        return
    mask = token_mask(inputs)
    dtype = lowest_dtype(recorded)
    off = distance(logits_together(recorded, row), own, dtype)
    if off <= tolerance_of(dtype, 1e-5, 1e-2, 0.4):
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
        seen = recorded.of_reached(name, alone.get(name, []))
        rows = [layer.extend_input(x.reshape(-1, x.shape[-1])) for x in seen]
        there = torch.cat(rows) if rows else here[:0]
        if any(relation.name == "before padding" for relation in forward.findings.relations.get(name, [])):
            there = there[: len(here)]  # the model fills up windows when it runs alone, too
        limit = tolerance_of(lowest_dtype(recorded), 1e-5, 1e-2, 0.4)
        same = here.shape == there.shape and (here - there).abs().sum() <= limit * there.abs().sum()
        if not same:
            forward.findings.unclear[name] = (
                f"of example {row} it counts {len(here)} tokens, and {len(there)} or others when the example runs by "
                "itself without padding"
            )


def logits_alone(recorded: Capture, row: int) -> Tensor | None:
    """Logits `[C]` or `[P, C]` of one example by itself and without padding; None if nobody can say.

    They are the model's own under the default forward, and those of the user's function where that can be asked.
    """
    forward, inputs, labels = recorded.forward, recorded.batch.inputs, recorded.batch.labels
    if not isinstance(inputs, Mapping):
        return None
    if forward.answers is not None:
        parts = each_answer(recorded.batch.rows(row, row + 1).inputs)
        found = [_own_logits(recorded, _without_padding(part, forward.seq2seq)) for part in parts]
        return torch.cat([logits for logits in found if logits is not None])
    columns = {**inputs, LABELS: labels} if isinstance(labels, Tensor) else dict(inputs)
    made = recorded.all_labels and isinstance(labels, Tensor) and labels.ndim == 2
    if forward.seq2seq and forward.is_models_own and ("decoder_input_ids" in inputs or made):  # may be padded, too
        columns[DECODER_MASK] = forward.model_inputs(inputs, labels if made else None).get(DECODER_MASK)
    one = Batch.unchecked(columns, recorded.batch.size).rows(row, row + 1)
    alone = _without_padding(one.given, forward.seq2seq)
    return _own_logits(recorded, alone) if forward.is_models_own else _functions_logits(recorded, row, alone)


def logits_together(recorded: Capture, row: int) -> Tensor:
    """The same as `logits_alone`, as they are in the batch."""
    here, mask = recorded.logits[row].detach(), recorded.batch.inputs.get(MASK)
    counted = recorded.result.mask if recorded.result.mask is not None else mask
    if here.ndim == 1 or not isinstance(counted, Tensor) or counted.ndim != 2 or counted.shape[1] != len(here):
        return here
    return here[counted[row].bool().to(here.device)]


class OtherLogits(ValueError):
    """An example has other logits in a batch than by itself: the model may want to be run in another way."""


def distance(found: Tensor, own: Tensor, dtype: torch.dtype) -> float:
    """Largest difference of logits, relative to their spread, or to what rounding leaves of one.

    Args:
        found: logits.
        own: what they should be.
        dtype: in which they were computed: classes may have the same logit, or nearly, beside which rounding is large.
    """
    if found.shape != own.shape:
        return math.inf
    if not own.numel():
        return 0.0
    spread = (own - own.mean(dim=-1, keepdim=True)).abs().max() if own.shape[-1] > 1 else own.abs().max()
    rounding = torch.finfo(dtype).eps ** 0.5 * own.abs().max()
    return float((found - own).abs().max() / spread.maximum(rounding).clamp_min(torch.finfo(own.dtype).tiny))


def most_padded(batch: Batch) -> int:
    """The last of the examples with most padding."""
    mask = token_mask(batch.inputs)
    if mask is None:
        return batch.size - 1
    counts = mask.bool().view(batch.size, -1).sum(dim=1)
    return batch.size - 1 - int(counts.flip(0).argmin())


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


def _functions_logits(recorded: Capture, row: int, alone: dict[str, Any]) -> Tensor | None:
    """What a function of the user's says about one example; None if it may be told where something is in the batch."""
    forward, batch = recorded.forward, recorded.batch
    if forward.function is None or not isinstance(batch.given, Mapping):
        return None
    mask = batch.inputs.get(MASK)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
        return None
    if any(isinstance(x, Tensor) and x.shape[:2] != mask.shape for x in batch.inputs.values()):
        return None
    one = batch.rows(row, row + 1).given
    try:
        trimmed = rebuilt(one, {key: alone.get(key, value) for key, value in one.items()})
        result = forward(Batch.unchecked(trimmed), all_labels=True)
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
