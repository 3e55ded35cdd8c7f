"""The output head of a causal LM: where it is, and what it computes, as numbers, checked against the model itself.

Scale and cap are whatever the model's own code does after its head. Configurations name them differently and use them
differently (one divides by what another multiplies with), so that candidates come from the configuration, and the
model's own logits decide between them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.masks import last_valid
from bayesian_lora_kernels.model.measuring import hooked
from bayesian_lora_kernels.ops.vocabulary.pieces import converted

if TYPE_CHECKING:
    from bayesian_lora_kernels.model.forward import Forward

# Rows of a head in another dtype that are converted at once.
CONVERTED_ROWS = 4096


class HeadAdapter(NamedTuple):
    """LoRA on the head: `scaling * B A h`.

    Attributes:
        a_name: name of the module A in the model; its weight is `[r, d]`.
        b_name: of the module B, weight `[V, r]`.
        a: the weight of A.
        b: the weight of B.
        scaling: what PEFT multiplies with.
    """

    a_name: str
    b_name: str
    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class OutputHead:
    """The output head of a causal LM. `find_head` says where it is, `read_head` what it computes at the MAP weights:

    `logits = scale * (W h + b + sum over adapters of s B A h)`, of which a model may take `cap * tanh(logits / cap)`.

    Attributes:
        name: of its module in the model.
        module: with whatever PEFT puts around the linear map.
        linears: its maps onto the vocabulary, by name in the model.
        linear: the one with W and b.
        adapters: LoRA on the head, once it has been read.
        scale: factor of the logits, once it has been read.
        softcap: the cap that the model applies to the scaled logits, or None, once it has been read.
    """

    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    linear: nn.Linear
    adapters: tuple[HeadAdapter, ...] = ()
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.linear.out_features

    @property
    def weight(self) -> Tensor:
        """`[V, d]`, the head's own tensor, not a copy."""
        return self.linear.weight.detach()

    @property
    def bias(self) -> Tensor | None:
        """`[V]` or None."""
        return None if self.linear.bias is None else self.linear.bias.detach()

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., V]` before the cap, from `hidden [..., d]`, in the dtype of `hidden`."""
        dtype, bias = hidden.dtype, self.bias
        logits = hidden.new_empty(*hidden.shape[:-1], self.vocabulary)
        inner = [hidden @ (self.scale * adapter.scaling * adapter.a.to(dtype)).mT for adapter in self.adapters]
        hidden = hidden * self.scale
        for some, weight in converted(self.weight, dtype, CONVERTED_ROWS):
            part = hidden @ weight.mT
            if bias is not None:
                part += self.scale * bias[some].to(dtype)
            for adapter, moved in zip(self.adapters, inner, strict=True):
                part += moved @ adapter.b[some].to(dtype).mT
            logits[..., some] = part
        return logits

    def capped(self, logits: Tensor) -> Tensor:
        """Logits as the model returns them, from those before the cap."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def find_head(model: nn.Module, base: nn.Module) -> OutputHead | None:
    """The output head of a model that generates tokens, else None."""
    can_generate = getattr(base, "can_generate", None)
    if not (callable(can_generate) and can_generate()):
        return None
    module = base.get_output_embeddings()  # type: ignore[operator]
    if module is None:
        return None
    name = next((n for n, m in model.named_modules() if m is module), None)
    inner = module
    while not isinstance(inner, nn.Linear):
        wrapped = getattr(inner, "base_layer", None) or getattr(inner, "original_module", None)
        if wrapped is None:
            return None
        inner = wrapped
    if name is None:
        return None
    linears = {
        f"{name}.{sub}" if sub else name: m
        for sub, m in module.named_modules()
        if isinstance(m, nn.Linear) and m.out_features == inner.out_features and "lora_A" not in sub.split(".")
    }
    return OutputHead(name, module, linears, inner)


def read_head(forward: Forward, trained: Collection[str], batch: Batch) -> OutputHead:
    """What the head computes, checked on the first example of a batch. Call without gradients, in eval mode.

    Args:
        forward: of a model with an output head.
        trained: names of the layers that carry the posterior.
        batch: on the model's device.

    Raises:
        ValueError: for a head that is trained as a whole (`modules_to_save`), quantised or of an unknown kind, and for
            logits that are more than the head's, scaled and soft-capped.
    """
    assert forward.head is not None
    head = _with_adapters(forward.head)
    adapted = {name for adapter in head.adapters for name in (adapter.a_name, adapter.b_name)}
    whole = next((name for name in trained if forward.in_head(name) and name not in adapted), None)
    if whole is not None:
        raise ValueError(
            f"outputs='vocabulary': {whole} is trained as a whole (modules_to_save, or without LoRA), so that every "
            "posterior sample would be another head; put LoRA on the head, or leave it out of the posterior with "
            "modules=..."
        )
    if forward.head_rows and any(forward.in_head(name) for name in trained):
        raise ValueError(
            "outputs='vocabulary': the head is adapted, and with class_token_ids its posterior covers the rows of the "
            "classes only; fit without class_token_ids"
        )
    hidden, raw, final = _probe(forward, head, batch.rows(0, 1))
    wide = torch.float64 if raw.dtype == torch.float64 else torch.float32
    tolerance = _tolerance(raw.dtype)
    if not _close(head.logits(hidden.to(wide)), raw.to(wide), tolerance):
        raise ValueError(
            f"outputs='vocabulary': {head.name} ({type(head.module).__name__}) is not a linear map "
            "with plain LoRA, which is all that is known of output heads"
        )
    tolerance = max(tolerance, _tolerance(final.dtype))  # some return float32 logits, whatever the head's dtype
    scales, caps = _candidates(getattr(forward.base, "config", None))
    for cap in (None, *caps.values()):
        for scale in (1.0, *(f for value in scales.values() for f in (value, 1 / value))):
            guess = replace(head, scale=scale, softcap=cap)
            if _close(guess.capped(raw.to(wide) * scale), final.to(wide), tolerance):
                return guess
    tried = ", ".join(f"{name}={value:g}" for name, value in {**scales, **caps}.items()) or "nothing of the kind there"
    raise ValueError(
        "outputs='vocabulary': the model changes its logits after the head, by neither a scale nor a soft cap of its "
        f"configuration ({tried})"
    )


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 3e-2)


def _with_adapters(head: OutputHead) -> OutputHead:
    """With the linear map and the adapters that are active now."""
    adapters: list[HeadAdapter] = []
    name, inner = head.name, cast(Any, head.module)
    while not isinstance(inner, nn.Linear):
        base = getattr(inner, "base_layer", None)
        if base is not None and hasattr(inner, "lora_A"):
            if not (inner.merged or inner.disable_adapters):
                for adapter in inner.active_adapters:
                    if adapter in getattr(inner, "lora_magnitude_vector", ()):
                        raise ValueError(
                            f"outputs='vocabulary': {name} is adapted by DoRA, which scales the rows of the head; put "
                            "plain LoRA on it, or choose tokens with class_token_ids and predict"
                        )
                    if adapter in inner.lora_A:
                        adapters.append(
                            HeadAdapter(
                                f"{name}.lora_A.{adapter}",
                                f"{name}.lora_B.{adapter}",
                                inner.lora_A[adapter].weight.detach(),
                                inner.lora_B[adapter].weight.detach(),
                                float(inner.scaling[adapter]),
                            )
                        )
            inner = base
            continue
        saved, active = getattr(inner, "modules_to_save", None), getattr(inner, "active_adapter", None)
        if saved is not None and isinstance(active, str) and active in saved:
            name, inner = f"{name}.modules_to_save.{active}", saved[active]
            continue
        raise ValueError(
            f"outputs='vocabulary': {name} is a {type(inner).__name__}, expected an nn.Linear, with LoRA or without"
        )
    weight = inner.weight
    if weight.is_meta:
        raise ValueError(
            f"outputs='vocabulary': {name}.weight is on the meta device: accelerate offloads it to the CPU or to disk. "
            "Keep the output head in memory (in the device_map), or choose tokens with class_token_ids and predict"
        )
    if weight.ndim != 2 or not weight.is_floating_point() or weight.shape[0] != inner.out_features:
        raise ValueError(
            f"outputs='vocabulary': {name} keeps its weight as {weight.dtype} {list(weight.shape)}; expected an output "
            "head that is not quantised"
        )
    return replace(head, linear=inner, adapters=tuple(adapters))


def _probe(forward: Forward, head: OutputHead, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The head's input `[d]` and output `[V]`, and the model's logits `[V]`, at the last valid token of one example."""
    seen: list[tuple[Tensor, Tensor]] = []
    with hooked(post=[(head.module, lambda _m, args, _k, output: seen.append((args[0], output)))]):
        final = forward.whole_vocabulary()(batch, all_labels=False).logits[0]
    if not seen:
        raise ValueError(f"outputs='vocabulary': the model does not call its output head {head.name}")
    hidden, raw = seen[0]
    at = 0 if hidden.shape[1] == 1 else int(last_valid(hidden, forward.output_mask(forward.model_inputs(batch.inputs))))
    return hidden.detach()[0, at], raw.detach()[0, at].clone(), final.detach()


def _candidates(config: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Numbers of a configuration that may be a scale of the logits, and that may be a cap."""
    get_text = getattr(config, "get_text_config", None)
    texts = [config] + ([get_text(decoder=True)] if callable(get_text) else [])
    scales: dict[str, float] = {}
    caps: dict[str, float] = {}
    for text in texts:
        fields: Mapping[str, Any] = vars(text) if text is not None else {}
        for name, value in fields.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < abs(value) < math.inf:
                continue
            if "softcap" in name.replace("_", "") and "attn" not in name:
                caps[name] = float(value)
            elif ("logit" in name or "head" in name) and ("scal" in name or "multipl" in name):
                scales[name] = float(value)
    return scales, caps


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    if found.shape != expected.shape:
        return False
    level = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return bool((found - expected).abs().max() <= tolerance * level)
