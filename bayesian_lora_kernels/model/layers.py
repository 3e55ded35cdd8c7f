"""Which linear maps carry the trainable weights, and how their matrices map to the model's parameters."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.config import Modules

DORA = "DoraLinearVariant"  # what PEFT calls DoRA of a linear map
_MAGNITUDE = re.compile(r"(.*)\.lora_magnitude_vector\.([^.]+)\.weight")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """One `nn.Linear` with trainable parameters, seen as a single matrix `[d_out, d_in]` acting on its input.

    A trainable bias is one more input column that is always 1; if only the bias is trainable, it is the only column.

    Attributes:
        name: the module's name in the model.
        module: the module itself.
        weight: name of its weight in the model if that is trainable, or asked for, else None.
        bias: name of its bias likewise.
        input_source: the module whose own input identifies this layer's input. For a LoRA A it is the adapted layer,
            because PEFT may cast that input separately for each of q, k and v.
        outer: the module whose own input is in the order of the model's tokens: the adapted layer, for A and for B.
        rows: `[d_out]` int64, the output rows that are used, or None for all of them.
    """

    name: str
    module: nn.Linear
    weight: str | None
    bias: str | None
    input_source: nn.Module
    outer: nn.Module
    rows: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)` of the matrix."""
        d_out = self.module.out_features if self.rows is None else len(self.rows)
        d_in = (self.module.in_features if self.weight else 0) + (1 if self.bias else 0)
        return d_out, d_in

    @property
    def device(self) -> torch.device:
        """Where the module's parameters live."""
        return self.module.weight.device

    def extend_input(self, a: Tensor) -> Tensor:
        """The matrix's input `[..., d_in]` from the module's input `[..., in_features]`."""
        if not self.bias:
            return a
        one = a.new_ones(()).expand(*a.shape[:-1], 1)
        return torch.cat([a, one], dim=-1) if self.weight else one

    def used_rows(self, outputs: Tensor) -> Tensor:
        """`[..., d_out]` from the module's outputs, or their gradients, `[..., out_features]`."""
        return outputs if self.rows is None else outputs[..., self.rows]

    def matrix(self, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Parameters as `[d_out, d_in]`, detached: `values` by their names, or the current ones."""
        values = self.parameters() if values is None else values
        parts = [values[name].detach() for name in self.parameters()]
        matrix = torch.cat([part if part.ndim == 2 else part[:, None] for part in parts], dim=1)
        return matrix if self.rows is None else matrix[self.rows]

    def split(self, matrices: Tensor) -> dict[str, Tensor]:
        """`[..., d_out, d_in]` -> `{parameter name: [..., *shape]}`, with `d_out` the used rows only."""
        parts = {}
        if self.weight:
            parts[self.weight] = matrices[..., : self.module.in_features]
        if self.bias:
            parts[self.bias] = matrices[..., -1]
        return parts

    def parameters(self) -> dict[str, Tensor]:
        """`{name: parameter}` of what is trainable here, at full size."""
        named: dict[str, Tensor] = {}
        if self.weight:
            named[self.weight] = self.module.weight
        if self.bias:
            named[self.bias] = self.module.bias
        return named


def find_layers(
    model: nn.Module, modules: Modules | None = None, rows: dict[str, Tensor] | None = None
) -> list[LinearLayer]:
    """The trainable linear layers of a model, in the order of `model.named_modules()`.

    Args:
        model: a `peft.PeftModel`, or any module whose trainable parameters are weights and biases of `nn.Linear`.
        modules: a regular expression that must match the whole module name, or a list of names (one that no module has
            matches at the end of longer ones, after a dot). None takes every trainable `nn.Linear`; then there must be
            no trainable parameter elsewhere, but for DoRA's magnitudes, which stay as they are.
            `{whole module name: ("weight", "bias") or one of them}` takes exactly these, whether they require gradients
            or not.
        rows: `{module name: rows that are used}`, for an output head restricted to some classes.

    Raises:
        TypeError: if `modules` is none of these.
        ValueError: if nothing is trainable, if a trainable parameter lies outside `nn.Linear`, is shared between
            layers, or if `modules` matches nothing or names what is not there; the parameters are named.
    """
    given = modules if isinstance(modules, Mapping) else None
    by_module: dict[str, set[str]] = {}
    outside: list[str] = []
    owners: dict[int, dict[str, str]] = {}
    wanted: set[int] = set()
    named_modules = dict(model.named_modules(remove_duplicate=False))
    first_names = {id(module): name for name, module in reversed(named_modules.items())}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        owner = first_names[id(named_modules[owner])]  # a module that stands in several places is still one
        owners.setdefault(id(parameter), {})[owner] = name
        if not (parameter.requires_grad if given is None else leaf in given.get(owner, ())):
            continue
        wanted.add(id(parameter))
        if isinstance(named_modules[owner], nn.Linear) and leaf in ("weight", "bias"):
            by_module.setdefault(owner, set()).add(leaf)
        elif name not in outside:
            outside.append(name)
    if given is None and not by_module and not outside:
        raise ValueError(
            "no trainable parameter: expected a model with requires_grad=True on some nn.Linear, for instance a PEFT "
            "LoRA model loaded with is_trainable=True"
        )
    if modules is None:
        selected = list(by_module)
        magnitudes = [name for name in outside if _is_magnitude(name, by_module)]
        outside = [name for name in outside if name not in magnitudes]
        if magnitudes and not outside:
            logger.info("DoRA: the posterior is over A and B; %d magnitude vectors stay as fine-tuned", len(magnitudes))
        if outside:
            raise ValueError(
                f"trainable parameters outside nn.Linear: {_some(outside)}. "
                + (
                    "Freeze them, or pass modules='.*', which takes every trainable nn.Linear (the others then stay at "
                    "their fine-tuned values)"
                    if by_module
                    else "The posterior is over weights of nn.Linear, and none is trainable"
                )
            )
    elif given is not None:
        selected = list(by_module)
        _check_given(given, by_module)
    else:
        selected = _select(list(by_module), modules)
    for key, layers_of in owners.items():
        if key in wanted and len(layers_of) > 1 and layers_of.keys() & set(selected):
            raise ValueError(
                f"one parameter is shared by several modules, which is not supported: {_some(list(layers_of.values()))}"
            )
    for name in selected:
        _check_lora(name, named_modules)
        _check_present(name, named_modules[name])
    return [linear_layer(name, named_modules, by_module[name], (rows or {}).get(name)) for name in selected]


def linear_layer(
    name: str, named_modules: Mapping[str, nn.Module], trained: Collection[str], rows: Tensor | None = None
) -> LinearLayer:
    """The layer of one `nn.Linear`, by its name in the model.

    Args:
        name: of the module.
        named_modules: of the model.
        trained: which of `weight` and `bias`.
        rows: see LinearLayer.
    """
    module = named_modules[name]
    assert isinstance(module, nn.Linear)
    adapted, part = module, ""
    for kind in ("lora_A", "lora_B"):
        outer, _, adapter = name.rpartition(f".{kind}.")
        if outer and "." not in adapter:
            adapted, part = named_modules[outer], kind  # type: ignore[assignment]
    return LinearLayer(
        name=name,
        module=module,
        weight=f"{name}.weight" if "weight" in trained else None,
        bias=f"{name}.bias" if "bias" in trained else None,
        input_source=adapted if part == "lora_A" else module,
        outer=adapted,
        rows=rows,
    )


def _is_magnitude(name: str, layers: Collection[str]) -> bool:
    """Whether a parameter is DoRA's vector of magnitudes beside an A and a B that are layers."""
    match = _MAGNITUDE.fullmatch(name)
    return match is not None and all(f"{match[1]}.{part}.{match[2]}" in layers for part in ("lora_A", "lora_B"))


def _check_lora(name: str, named_modules: Mapping[str, nn.Module]) -> None:
    """Variants of LoRA other than DoRA, and LoRA on bare parameters, use the matrices beside their modules' calls."""
    layer, _, adapter = name.replace(".lora_B.", ".lora_A.").rpartition(".lora_A.")
    adapted = named_modules.get(layer)
    if type(adapted).__name__ == "ParamWrapper":
        raise ValueError(
            f"{name}: it adapts a bare parameter (PEFT's target_parameters, as for the expert weights of a mixture of "
            "experts), and its matrices are multiplied outside their modules' calls; leave such layers out with "
            "modules=..., they then stay at their fine-tuned values"
        )
    variant = getattr(adapted, "lora_variant", {}).get(adapter)
    if variant is not None and type(variant).__name__ != DORA:
        raise ValueError(
            f"{name}: expected plain LoRA or DoRA, its adapter is a {type(variant).__name__}, which uses the matrix "
            "outside its module's call"
        )
    outer, _, part = name.rpartition(".")
    if part == "base_layer" and getattr(named_modules.get(outer), "lora_magnitude_vector", None):
        raise ValueError(
            f"{name}: it is trained under DoRA, which subtracts its bias again outside its call; leave it out with "
            "modules=... (it then stays at its fine-tuned value), or fine-tune with bias='none'"
        )


def _check_present(name: str, module: nn.Module) -> None:
    for leaf, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta:
            raise ValueError(
                f"{name}.{leaf} is on the meta device: its numbers are elsewhere (accelerate's offload to the CPU or "
                "to disk, or an empty model). Load the model so that at least the layers of the posterior stay in "
                "memory (a device_map without offload for them), or remove accelerate's hooks"
            )


def _check_given(given: Mapping[str, Sequence[str]], found: Mapping[str, Collection[str]]) -> None:
    missing = [f"{name}.{leaf}" for name, leaves in given.items() for leaf in leaves if leaf not in found.get(name, ())]
    if missing or not given:
        raise ValueError(
            f"modules: expected names of nn.Linear modules and which of weight and bias, there is no "
            f"{_some(missing) or 'name'}"
        )


def _select(available: list[str], modules: str | Iterable[str]) -> list[str]:
    if isinstance(modules, str):
        pattern = re.compile(modules)
        selected = [name for name in available if pattern.fullmatch(name)]
        missing = [] if selected else [modules]
    elif isinstance(modules, Iterable):
        wanted = list(modules)
        matches = {
            want: [want] if want in available else [n for n in available if n.endswith("." + want)] for want in wanted
        }
        found = {name for names in matches.values() for name in names}
        selected = [name for name in available if name in found]
        missing = [want for want, names in matches.items() if not names]
    else:
        raise TypeError(f"modules: expected a regular expression or a list of names, got {type(modules).__name__}")
    if missing or not selected:
        raise ValueError(
            f"modules: {_some(missing) or 'an empty list'} matches no trainable nn.Linear; there are {_some(available)}"
        )
    return selected


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
