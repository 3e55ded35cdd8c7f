"""From a batch to logits, without computing logits that nobody asks for.

A user's own callable is taken as it is. The default serves any module that returns logits, and knows three things about
transformers models: position ids under left padding, the one position of a causal LM that is used, and an output head
of which only the rows of some classes are needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.model.batches import batch_size, inputs_and_labels, token_masks
from bayesian_lora_kernels.model.head import HeadModule, find_head

IGNORED_LABEL = -100

ForwardFunction = Callable[[nn.Module, Any], Any]


class ForwardResult(NamedTuple):
    """What one forward pass gave.

    Attributes:
        logits: `[N, C]` or `[N, T, C]`.
        mask: `[N, T]` bool, the positions that carry a loss, for logits with a token dimension; else None.
        labels: `[N]` or `[N, T]`, aligned with the logits; None if the batch has none.
        head_mask: `[N, P]` bool, which of the positions handed to the output head are real; None: all of them.
    """

    logits: Tensor
    mask: Tensor | None
    labels: Tensor | None
    head_mask: Tensor | None = None


class Forward:
    """Runs the model on a batch.

    Args:
        model: the model.
        function: `callable(model, batch) -> logits` or `(logits, mask)`, or None for the default.
        class_token_ids: `[C]`, restricts a causal LM's logits to these tokens.

    Raises:
        ValueError: if class ids are given for a model that has no output head over a vocabulary, repeat, or lie outside
            the vocabulary.
    """

    def __init__(self, model: nn.Module, function: ForwardFunction | None, class_token_ids: Any = None):
        self.model = model
        self.function = function
        get_base: Any = getattr(model, "get_base_model", None)  # of a PeftModel
        self.base: nn.Module = model if get_base is None else get_base()
        self.head = None if function else find_head(model, self.base)
        self.class_token_ids: Tensor | None = None
        if class_token_ids is not None:
            self.class_token_ids = _check_class_ids(class_token_ids, self.head, function)
        self.accepted = set(inspect.signature(self.base.forward).parameters)

    @property
    def head_rows(self) -> dict[str, Tensor]:
        """`{module name: rows}` for the head's linear maps onto the vocabulary, if only some classes are used."""
        if self.head is None or self.class_token_ids is None:
            return {}
        rows = self.class_token_ids
        return {name: rows.to(linear.weight.device) for name, linear in self.head.linears.items()}

    def in_head(self, layer_name: str) -> bool:
        """Whether a layer is part of the output head."""
        return self.head is not None and (layer_name + ".").startswith(self.head.name + ".")

    def __call__(self, batch: Any, *, all_labels: bool) -> ForwardResult:
        """Logits of a batch.

        Args:
            batch: a mapping or a tuple `(inputs, labels)`.
            all_labels: with labels `[N, T]` on a causal LM, whether to compute every position that has one (to fit)
                rather than the last valid one (to predict).

        Raises:
            ValueError: if what comes back is not `[N, C]` or `[N, T, C]`.
            TypeError: if there are no logits in it.
        """
        inputs, labels = inputs_and_labels(batch)
        if self.function is not None:
            result = self._custom(batch, labels)
        elif self.head is not None and isinstance(inputs, Mapping):
            result = self._causal(inputs, labels if all_labels else None, labels)
        else:
            result = self._plain(inputs, labels)
        expected = batch_size(inputs)
        logits = result.logits
        if logits.ndim not in (2, 3) or (expected is not None and logits.shape[0] != expected):
            raise ValueError(
                f"forward: expected logits of shape [{expected}, C] or [{expected}, T, C], got {list(logits.shape)}"
            )
        if result.mask is not None and result.mask.shape != logits.shape[:2]:
            raise ValueError(
                f"forward: expected a mask of shape {list(logits.shape[:2])}, got {list(result.mask.shape)}"
            )
        return result

    def _custom(self, batch: Any, labels: Tensor | None) -> ForwardResult:
        assert self.function is not None
        output = self.function(self.model, batch)
        mask = None
        if isinstance(output, tuple) and len(output) == 2:
            output, mask = output
            if mask is not None and not (isinstance(mask, Tensor) and not mask.is_floating_point()):
                raise TypeError("forward: expected (logits, mask) with a bool mask [N, T]")
        return _with_mask(_logits_of(output), labels, None if mask is None else mask.bool())

    def _plain(self, inputs: Any, labels: Tensor | None) -> ForwardResult:
        if isinstance(inputs, Mapping):
            output = self.model(**self.model_inputs(inputs))
        elif isinstance(inputs, (tuple, list)):
            output = self.model(*inputs)
        else:
            output = self.model(inputs)
        return _with_mask(_logits_of(output), labels, None)

    def _causal(self, inputs: Mapping[str, Any], targets: Tensor | None, labels: Tensor | None) -> ForwardResult:
        """Hands the output head the positions that are used, and the rows of the classes that are asked for."""
        assert self.head is not None
        every = targets is not None and targets.ndim == 2
        if every and self.class_token_ids is not None:
            raise ValueError("labels: expected class indices [N] together with class_token_ids, got [N, T]")
        masks = token_masks(inputs)
        chosen: dict[str, Tensor] = {}

        def choose(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0]
            mask = head_mask(masks, hidden)
            if every:
                assert targets is not None
                positions, valid, labels_at = _labelled_positions(targets, shift=0 if self.seq2seq else 1)
                chosen.update(mask=valid, labels=labels_at)
            else:
                positions = last_valid(mask, hidden)[:, None]
            index = positions.to(hidden.device)[:, :, None].expand(-1, -1, hidden.shape[2])
            return (hidden.gather(1, index), *args[1:])

        handle = self.head.module.register_forward_pre_hook(choose)
        try:
            kwargs = self.model_inputs(inputs)
            if self.class_token_ids is not None and self.head.sliceable:
                rows = self.head.sliced_parameters(self.class_token_ids)
                output = torch.func.functional_call(self.model, rows, (), kwargs, tie_weights=False)
            else:
                output = self.model(**kwargs)
        finally:
            handle.remove()
        logits = _logits_of(output)
        if self.class_token_ids is not None and not self.head.sliceable:
            logits = logits[..., self.class_token_ids.to(logits.device)]
        if every:
            return ForwardResult(logits, chosen["mask"], chosen["labels"], chosen["mask"])
        return ForwardResult(logits[:, 0], None, labels)

    @property
    def seq2seq(self) -> bool:
        """Whether the model has an encoder beside its decoder."""
        return bool(getattr(getattr(self.base, "config", None), "is_encoder_decoder", False))

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the model: the batch's tensors, no cache, position ids that skip padding on the left."""
        kwargs: dict[str, Any] = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
        if "use_cache" in self.accepted:
            kwargs["use_cache"] = False
        mask = kwargs.get("attention_mask")
        if "position_ids" in self.accepted and "position_ids" not in kwargs and mask is not None and mask.ndim == 2:
            left_padded = not bool(mask[:, 0].bool().all())
            makes_its_own = any(hasattr(m, "create_position_ids_from_input_ids") for m in self.base.modules())
            if left_padded and not makes_its_own:
                kwargs["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
        return kwargs


def _check_class_ids(class_token_ids: Any, head: HeadModule | None, function: ForwardFunction | None) -> Tensor:
    ids = torch.as_tensor(class_token_ids)
    if function is not None:
        raise ValueError("class_token_ids: expected none together with forward=..., which chooses the logits itself")
    if head is None:
        raise ValueError("class_token_ids: expected a causal LM with an output head, this model has none")
    if ids.ndim != 1 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"class_token_ids: expected [C] integers, got {ids.dtype} of shape {list(ids.shape)}")
    ids = ids.long().cpu()
    if ids.min() < 0 or ids.max() >= head.vocabulary:
        raise ValueError(
            f"class_token_ids: expected ids from 0 to {head.vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}"
        )
    if len(ids.unique()) != len(ids):
        raise ValueError(f"class_token_ids: expected distinct ids, got {ids.tolist()}")
    return ids


def _logits_of(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"forward: expected logits (a tensor, or an output with .logits), got {type(output).__name__}; "
            "pass forward=callable(model, batch) -> logits"
        )
    return logits


def _with_mask(logits: Tensor, labels: Tensor | None, mask: Tensor | None) -> ForwardResult:
    """With a token dimension and no mask of its own, the labelled positions carry the loss."""
    if logits.ndim == 3 and mask is None and labels is not None and labels.shape == logits.shape[:2]:
        mask = labels != IGNORED_LABEL
    return ForwardResult(logits, mask, labels)


def head_mask(masks: Sequence[Tensor], hidden: Tensor) -> Tensor | None:
    """Of a batch's token masks the one that describes what the output head sees, `[N, T]`; None if there are none.

    Raises:
        ValueError: if there are masks, but none of this shape.
    """
    mask = next((m for m in reversed(masks) if m.shape == hidden.shape[:2]), None)
    if masks and mask is None:
        raise ValueError(
            f"forward: the output head sees {list(hidden.shape[:2])} positions, which no attention mask of the "
            "batch describes; pass forward=..."
        )
    return mask


def last_valid(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """Index of the last valid token of each example, `[N]`, for `hidden [N, T, ...]`."""
    n, t = hidden.shape[:2]
    if mask is None:
        return torch.full((n,), t - 1, device=hidden.device)
    return (mask.long() * torch.arange(t, device=mask.device)).argmax(dim=1)


def _labelled_positions(labels: Tensor, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions whose next token has a label, packed to the front; which are real; their labels: all `[N, P]`."""
    targets = labels[:, shift:]
    labelled = targets != IGNORED_LABEL
    count = max(int(labelled.sum(dim=1).max()), 1)
    order = torch.argsort(labelled.to(torch.int8), dim=1, descending=True, stable=True)[:, :count]
    valid = labelled.gather(1, order)
    return order, valid, targets.gather(1, order)


def model_device(model: nn.Module) -> torch.device:
    """Device of the model's first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


__all__ = [
    "IGNORED_LABEL",
    "Forward",
    "ForwardFunction",
    "ForwardResult",
    "head_mask",
    "last_valid",
    "model_device",
]
