"""From a batch to logits, without computing logits that nobody asks for.

A user's own callable is taken as it is. The default serves any module that returns logits, and knows three things about
transformers models: position ids under left padding, the decoder inputs that an encoder-decoder makes of its labels,
and the one position of a causal LM that is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.model.answers import below_each_other, grouped, pad_of, token_mask
from bayesian_lora_kernels.model.arguments import decoder_inputs, is_left_padded, pass_on
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.findings import Checks, Findings, Way
from bayesian_lora_kernels.model.head import OutputHead, find_head
from bayesian_lora_kernels.model.host import both, on_host, to_device
from bayesian_lora_kernels.model.masks import before_pads, last_valid, parameters_of
from bayesian_lora_kernels.model.measuring import hooked
from bayesian_lora_kernels.model.reading import DECODER_MASK, MASK_KEYS, WEIGHTS
from bayesian_lora_kernels.model.sharding import sharing
from bayesian_lora_kernels.surroundings import callers_surroundings

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
        model: the model. What runs is the model inside wrappers that only distribute or compile it; names are those of
            the model as it is given.
        function: `callable(model, batch) -> logits` or `(logits, mask)`, or None for the default.
        class_token_ids: `[C]`, restricts a causal LM's logits to these tokens.
        masked: whether padding is left out of what is captured.
        check: when assumptions about the model are checked: `first`, `always` or `off` (see `LaplaceConfig`).
        answers: whether an example is a pair or a list of answers, of which the model gives each one score
            (`Likelihood.answers`).

    Attributes:
        model: the one that runs.
        prefix: of its names, in the model as it was given.
        base: the model inside the wrappers whose forward takes the batch's columns.
        head: of a causal LM, if the default forward can use it.
        before_cap: whether logits are those before the soft cap that the model applies to them.
        checks: which of them are due.
        findings: what they found out about the model.

    Raises:
        ValueError: if class ids are given for a model that has no output head over a vocabulary, repeat, or lie outside
            the vocabulary; for a model that is spread in a way that is not served.
    """

    def __init__(
        self,
        model: nn.Module,
        function: ForwardFunction | None,
        class_token_ids: Any = None,
        masked: bool = True,
        check: str = "first",
        answers: str | None = None,
    ):
        sharing(model)  # refuses what is spread in a way that is not served
        self.model, self.prefix = unwrapped(model)
        self.function = function
        self.masked = masked
        self.answers = None if function else answers
        self.base = _base_of(self.model)
        self.head = None if function or answers else find_head(model, self.base)
        self.before_cap = False
        self.class_token_ids: Tensor | None = None
        self._class_ids: dict[torch.device, Tensor] = {}
        if class_token_ids is not None:
            self.class_token_ids = _check_class_ids(class_token_ids, self.head, function)
        self.accepted = set(parameters_of(self.base))
        self.findings, self.checks = Findings(), Checks(check)

    def whole_vocabulary(self, head: OutputHead | None = None) -> Forward:
        """The same without `class_token_ids`, and before the soft cap that its head, if that has been read, has."""
        whole = copy(self)
        whole.class_token_ids = None
        if head is not None:
            whole.head, whole.before_cap = head, head.softcap is not None
        return whole

    @property
    def is_models_own(self) -> bool:
        """Whether the logits are those that the model itself gives, rather than a function's or those before a cap."""
        return self.function is None and not self.before_cap

    @property
    def head_rows(self) -> dict[str, Tensor]:
        """`{module name: rows}` for the head's linear maps onto the vocabulary, if only some classes are used."""
        if self.head is None or self.class_token_ids is None:
            return {}
        rows = self.class_token_ids
        return {name: rows.to(linear.weight.device) for name, linear in self.head.linears.items()}

    @property
    def n_logits(self) -> int | None:
        """How many logits there will be, as far as that is known before the model runs."""
        if self.class_token_ids is not None:
            return len(self.class_token_ids)
        labels = getattr(getattr(self.base, "config", None), "num_labels", None)
        known = self.function is None and self.head is None and self.answers is None and isinstance(labels, int)
        return labels if known else None

    def read(self, given: Any, device: torch.device | None = None, *, labels: bool = True) -> Batch:
        """A user's batch, its answers `[N, K, T]` where it is of those; see `Batch.of`, also for errors.

        Args:
            given: the user's; pairs may stand below each other, `[2 N, T]`, where labels are read.
            device: see `Batch.of`.
            labels: see `Batch.of`; without, rows `[N, T]` are single answers.
        """
        if self.answers is not None and not isinstance(given, Batch):
            given = grouped(given, pairs=self.answers == "pairs", labelled=labels, pad=pad_of(self.base))
        batch = Batch.of(given, device, labels=labels)
        if WEIGHTS in self.accepted and batch.weights is not None:
            raise ValueError(
                f"{WEIGHTS}: the model's forward has an argument of this name, which here says how often an example "
                "counts; pass the model's own with forward=..., under another name"
            )
        return batch

    def in_head(self, layer_name: str) -> bool:
        """Whether a layer is part of the output head."""
        return self.head is not None and (layer_name + ".").startswith(self.head.name + ".")

    def __call__(self, batch: Batch, *, all_labels: bool) -> ForwardResult:
        """Logits of a batch.

        Args:
            batch: on the model's device.
            all_labels: with labels `[N, T]` on a causal LM, whether to compute every position that has one (to fit)
                rather than the last valid one (to predict).

        Raises:
            ValueError: if what comes back is not `[N, C]` or `[N, T, C]`, or for an input that is not served.
            TypeError: if there are no logits in it.
        """
        inputs, labels = batch.inputs, batch.labels
        with callers_surroundings():
            if self.function is not None:
                result = self._custom(batch.given, labels)
            elif self.answers is not None:
                result = self._rewards(inputs, labels)
            elif self.head is not None and isinstance(inputs, Mapping):
                result = self._causal(inputs, labels if all_labels else None, labels)
            else:
                result = self._plain(inputs, labels)
        expected, logits = batch.rows_of_inputs, result.logits
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

    def _rewards(self, inputs: Mapping[str, Any], labels: Tensor | None) -> ForwardResult:
        """Scores `[N, K]` of the answers of every example, in one call of the model; of single answers, `[N, 1]`."""
        columns, count = below_each_other(inputs)
        logits = _logits_of(self.model(**self.model_inputs(columns)))
        if logits.ndim != 2 or logits.shape[1] != 1:
            raise ValueError(
                "forward: expected a reward model, which gives a text one score (num_labels=1), got logits "
                f"{list(logits.shape)}; or pass forward=callable(model, batch) -> rewards [N, K]"
            )
        return ForwardResult(logits if count is None else logits.view(-1, count), None, labels)

    def _causal(self, inputs: Mapping[str, Any], targets: Tensor | None, labels: Tensor | None) -> ForwardResult:
        """Hands the output head the positions that are used, and of its logits picks those of the classes."""
        assert self.head is not None
        every = targets is not None and targets.ndim == 2
        if every and self.class_token_ids is not None:
            raise ValueError("labels: expected class indices [N] together with class_token_ids, got [N, T]")
        kwargs = self.model_inputs(inputs, targets if every else None)
        tokens = self.output_mask(kwargs)
        chosen: dict[str, Tensor] = {}
        raw: list[Tensor] = []

        def choose(hidden: Tensor) -> Tensor:
            mask = head_mask(tokens, hidden)
            if every:
                assert targets is not None
                positions, valid, labels_at = _labelled_positions(targets, mask, shift=0 if self.seq2seq else 1)
                chosen.update(mask=valid, labels=labels_at)
            else:
                positions = last_valid(hidden, mask)[:, None]
                chosen.update(positions=positions)
            index = positions.to(hidden.device)[:, :, None].expand(-1, -1, hidden.shape[2])
            return hidden.gather(1, index)

        def at_head(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            by_token = bool(args) and isinstance(args[0], Tensor) and args[0].ndim == 3
            return ((choose(args[0]), *args[1:]), kwargs) if by_token and not chosen else None

        with hooked(
            pre=[(self.head.module, at_head)] if self.findings.way.cuts_positions else [],
            post=[(self.head.module, lambda _m, _args, _k, output: raw.append(output))] if self.before_cap else [],
        ):
            logits = _logits_of(self.model(**kwargs))
        logits = raw[0] * self.head.scale if self.before_cap else logits
        in_head = bool(chosen)
        if not in_head:  # the model multiplies with the head's weight itself, or calls the head on something else
            if logits.ndim != 3:
                raise ValueError(f"forward: expected the model's logits to be [N, T, V], got {list(logits.shape)}")
            logits = choose(logits)
        if self.class_token_ids is not None:
            logits = logits[..., self._class_ids_on(logits.device)]
        if every:
            return ForwardResult(logits, chosen["mask"], chosen["labels"], chosen["mask"] if in_head else None)
        return ForwardResult(logits[:, 0], None, labels)

    def other_ways(self, batch: Batch) -> list[Way]:
        """Other ways to run the model on a batch than the one that is taken now, the likeliest first."""
        inputs, now = batch.inputs, self.findings.way
        if not self.is_models_own or not isinstance(inputs, Mapping):
            return []
        mask = token_mask(inputs)
        left = mask is not None and is_left_padded(mask)
        positions = left and "position_ids" in self.accepted and "position_ids" not in inputs
        ways = [replace(now, skips_padding=not now.skips_padding)] if positions else []
        if self.head is not None and now.cuts_positions:
            ways += [replace(way, cuts_positions=False) for way in (now, *ways)]
        return ways

    def _class_ids_on(self, device: torch.device) -> Tensor:
        assert self.class_token_ids is not None
        if device not in self._class_ids:
            self._class_ids[device] = to_device(self.class_token_ids, device)
        return self._class_ids[device]

    @property
    def seq2seq(self) -> bool:
        """Whether the model has an encoder beside its decoder."""
        return bool(getattr(getattr(self.base, "config", None), "is_encoder_decoder", False))

    def output_mask(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """`[N, T]` bool, which of the positions that the output head sees are real; None: all of them."""
        mask = inputs.get(DECODER_MASK if self.seq2seq else MASK_KEYS[0])
        if isinstance(mask, Tensor) and mask.ndim != 2:
            raise ValueError(
                f"attention_mask: expected [N, T], got {list(mask.shape)}, which does not say which token of an "
                "example is its last; pass a mask [N, T], or forward=..."
            )
        return both(Tensor.bool, mask) if isinstance(mask, Tensor) else None

    def model_inputs(self, inputs: Mapping[str, Any], targets: Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments of the model: the batch's columns, no cache, position ids that skip padding on the left.

        Args:
            inputs: the batch without its labels.
            targets: `[N, T]` labels of an encoder-decoder, which its decoder inputs are made of if there are none.

        Raises:
            ValueError: for a column that changes what is computed in a way that is not served.
        """
        kwargs = pass_on(inputs, self.accepted)
        if "use_cache" in self.accepted:
            kwargs["use_cache"] = False
        if self.seq2seq:
            self._decoder_inputs(kwargs, targets)
        mask = kwargs.get("attention_mask")
        given = "position_ids" not in self.accepted or "position_ids" in kwargs or not self.findings.way.skips_padding
        if not given and isinstance(mask, Tensor) and mask.ndim == 2 and is_left_padded(mask):
            kwargs["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
        return kwargs

    def _decoder_inputs(self, kwargs: dict[str, Any], targets: Tensor | None) -> None:
        """What the decoder reads, if the batch has only labels; and which of it is padding."""
        ids = kwargs.get("decoder_input_ids")
        if ids is None and kwargs.get("decoder_inputs_embeds") is None:
            if self.head is None:  # a classifier, whose decoder reads the encoder's text
                if DECODER_MASK in self.accepted and "attention_mask" in kwargs:
                    kwargs.setdefault(DECODER_MASK, kwargs["attention_mask"])
                return
            if targets is None:
                raise ValueError(
                    "decoder_input_ids: expected what the decoder has read so far, got none; pass decoder_input_ids "
                    "(for the first token of an answer, [N, 1] of decoder_start_token_id)"
                )
            kwargs["decoder_input_ids"] = decoder_inputs(self.base, targets)
            valid = both(_up_to_the_last_label, targets)
        elif isinstance(ids, Tensor) and ids.ndim == 2:
            pad = getattr(self.base.config, "pad_token_id", None)
            valid = both(lambda ids: before_pads(ids, pad), ids)
        else:
            return
        if DECODER_MASK in self.accepted and kwargs.get(DECODER_MASK) is None and not on_host(valid).all():
            kwargs[DECODER_MASK] = valid.long()


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The model inside wrappers that compute what it computes (compiled, distributed), and the prefix of its names."""
    prefix = ""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model, prefix = model.module, f"{prefix}module."
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model, prefix = model._orig_mod, f"{prefix}_orig_mod."  # type: ignore[assignment]
        else:
            return model, prefix


def _base_of(model: nn.Module) -> nn.Module:
    """The innermost of nested models whose forward names its arguments; wrappers often take `**kwargs`."""
    while True:
        get_base: Any = getattr(model, "get_base_model", None)  # of a PeftModel
        inner = get_base() if get_base is not None else None
        if inner is None and not parameters_of(model):
            children = [child for child in model.children() if next(child.parameters(), None) is not None]
            inner = children[0] if len(children) == 1 else None
        if inner is None or inner is model:
            return model
        model, _ = unwrapped(inner)


def _check_class_ids(class_token_ids: Any, head: OutputHead | None, function: ForwardFunction | None) -> Tensor:
    with torch.inference_mode(False):
        ids = torch.as_tensor(class_token_ids).clone()
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


def head_mask(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """The mask of the positions that the output head sees, `[N, T]`; None if all of them are real.

    Raises:
        ValueError: if it is not one of these positions.
    """
    if mask is not None and mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"forward: the output head sees {list(hidden.shape[:2])} positions, which no attention mask of the "
            f"batch describes (it is of shape {list(mask.shape)}); pass forward=..."
        )
    return mask


def _labelled_positions(labels: Tensor, mask: Tensor | None, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions whose next token has a label, packed to the front; which are real; their labels: all `[N, P]`.

    Padding predicts nothing: the first token of a text has no label that counts, on whichever side its padding is.
    """
    targets = labels[:, shift:]
    if mask is not None and mask.shape == labels.shape:
        labelled = both(_labelled, targets, mask[:, : labels.shape[1] - shift])
    else:
        labelled = both(_labelled, targets)
    count = max(int(on_host(labelled).sum(dim=1).max()), 1)
    order = torch.argsort(labelled.to(torch.int8), dim=1, descending=True, stable=True)[:, :count]
    valid = labelled.gather(1, order)
    return order, valid, targets.gather(1, order)


def _labelled(targets: Tensor, mask: Tensor | None = None) -> Tensor:
    labelled = targets != IGNORED_LABEL
    return labelled if mask is None else labelled & mask.to(labelled.device)


def _up_to_the_last_label(targets: Tensor) -> Tensor:
    valid = (targets != IGNORED_LABEL).flip(1).cumsum(dim=1).flip(1) > 0
    valid[:, 0] = True
    return valid


def model_device(model: nn.Module) -> torch.device:
    """Device of the model's first parameter that is in memory: what accelerate offloads is on the meta device."""
    devices = dict.fromkeys(p.device for p in model.parameters())
    return next((device for device in devices if device.type != "meta"), next(iter(devices), torch.device("cpu")))
