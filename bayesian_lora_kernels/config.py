"""Every setting of a Laplace approximation, in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, get_type_hints

if TYPE_CHECKING:  # the command line reads the settings, and must answer before PyTorch is there
    import torch
    from torch import Tensor

Modules: TypeAlias = str | Sequence[str] | Mapping[str, Sequence[str]]
PriorPrecision: TypeAlias = "float | Tensor | Mapping[str, float | Tensor]"
LikelihoodName = Literal["classification", "regression", "bradley-terry", "plackett-luce"]
Fisher = Literal["auto", "mc", "exact", "empirical"]
Tokens = Literal["expand", "reduce", "last"]
Check = Literal["first", "always", "off"]


def _about(text: str, *, least: int = 1, saved: bool = True, kind: Any = None) -> dict[str, Any]:
    """What there is to know of a setting: its description, its least int or its few names, whether a file keeps it."""
    return {"help": text, "least": least, "saved": saved, "choices": get_args(kind)}


@dataclass(frozen=True)
class LaplaceConfig:
    """Settings of `LaplaceLoRA`, which takes the same as keyword arguments."""

    class_token_ids: Sequence[int] | Tensor | None = field(
        default=None,
        compare=False,
        metadata=_about(
            "`[C]`, restricts a causal LM's logits to these tokens; labels are then indices into them", saved=False
        ),
    )
    likelihood: LikelihoodName = field(
        default="classification",
        metadata=_about(
            "`classification`; `regression`; for a reward model, which gives a text one score, `bradley-terry` (pairs "
            "of answers) or `plackett-luce` (ranked lists), see docs/method.md",
            kind=LikelihoodName,
        ),
    )
    noise_variance: float | Tensor = field(
        default=1.0,
        compare=False,
        metadata=_about("of a `regression`, one positive number that all outputs share", saved=False),
    )
    curvature: str = field(
        default="kfac",
        metadata=_about(
            "`kfac`, `ekfac` (a second pass corrects the eigenvalues), or `exact` (the full Gauss-Newton matrix of all "
            "layers, in function space: for up to some thousand examples times logits)"
        ),
    )
    memory_budget: int | None = field(
        default=None,
        metadata=_about(
            "bytes that captured tensors, and `exact`'s rows, may take; None: half of what is free. Batches run in "
            "pieces, and rows move to disk, to stay within it",
            saved=False,
        ),
    )
    fisher: Fisher = field(
        default="auto",
        metadata=_about(
            "`mc`, `exact`, `empirical`; `auto` is exact up to 16 backward passes for logits `[N, C]`, and for ranked "
            "lists, else mc",
            kind=Fisher,
        ),
    )
    fisher_samples: int = field(default=1, metadata=_about("targets drawn per example with `mc`"))
    tokens: Tokens = field(
        default="expand",
        metadata=_about(
            "`expand`, `reduce` or `last`: how weight sharing over tokens is treated (`docs/method.md`)", kind=Tokens
        ),
    )
    rank: int | None = field(
        default=32,
        metadata=_about("a factor wider than `rank_threshold` keeps this many columns; None keeps every factor whole"),
    )
    rank_threshold: int = field(default=256, metadata=_about("see `rank`"))
    tail: bool = field(
        default=True,
        metadata=_about("whether the directions outside the kept columns share the eigenvalue that the trace leaves"),
    )
    prior_precision: PriorPrecision = field(
        default=1.0, compare=False, metadata=_about("one positive number, or one for each module", saved=False)
    )
    modules: Modules | None = field(
        default=None,
        metadata=_about(
            'regular expression or list of names; None: every trainable `nn.Linear`. `{name: ("weight", "bias")}`: '
            "these, or one of them, whether they require gradients or not",
            saved=False,
        ),
    )
    row_dtype: torch.dtype | None = field(
        default=None,
        metadata=_about("in which `exact` stores its rows; None: that of the gradients (float32, or float64)"),
    )
    seed: int = field(default=0, metadata=_about("of everything random in `fit`", least=-(2**63)))
    check: Check = field(
        default="first",
        metadata=_about(
            "when what is taken for granted of the model is checked (docs/method.md): `first`, on the first two "
            "batches of every kind, the 32nd, the 512th and so on; `always`; `off`",
            saved=False,
            kind=Check,
        ),
    )

    def __post_init__(self) -> None:
        if isinstance(self.modules, Mapping):
            object.__setattr__(self, "modules", dict(self.modules))
        elif isinstance(self.modules, Iterable) and not isinstance(self.modules, str):
            object.__setattr__(self, "modules", tuple(self.modules))
        for one in fields(self):
            _check(one, getattr(self, one.name))

    @classmethod
    def of(cls, config: LaplaceConfig | None, settings: Mapping[str, Any]) -> LaplaceConfig:
        """A configuration, or the default one, with some settings changed.

        Raises:
            TypeError, ValueError: for a setting that is unknown or out of its range; it is named.
        """
        if config is not None and not isinstance(config, LaplaceConfig):
            raise TypeError(f"config: expected a LaplaceConfig, got {type(config).__name__}")
        known = {one.name for one in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise TypeError(f"{unknown[0]}: no such setting; there are {', '.join(sorted(known))}")
        return cls(**{**({} if config is None else vars(config)), **settings})

    def as_json(self) -> dict[str, Any]:
        """The settings that a file keeps: all but those that belong to a machine or a model."""
        import torch

        values = {name: getattr(self, name) for name in saved_settings()}
        return {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in values.items()}

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> LaplaceConfig:
        """What `as_json` gave.

        Raises:
            ValueError: for a setting that is missing, unknown or out of its range; it is named.
        """
        import torch

        names = saved_settings()
        for key in (*names, *settings):
            if key not in settings:
                raise ValueError(f"settings.{key}: missing, expected a setting of LaplaceConfig")
            if key not in names:
                raise ValueError(f"settings.{key}: expected no such key")
        row_dtype = settings["row_dtype"]
        if row_dtype is not None and not isinstance(getattr(torch, str(row_dtype), None), torch.dtype):
            raise ValueError(f"settings.row_dtype: expected null or the name of a torch.dtype, got {row_dtype!r}")
        dtype = None if row_dtype is None else getattr(torch, row_dtype)
        try:
            return cls(**{**settings, "row_dtype": dtype})
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings.{error}") from None


LaplaceConfig.__doc__ = f"{LaplaceConfig.__doc__}\n\n    Attributes:\n" + "\n".join(
    f"        {one.name}: {one.metadata['help']}." for one in fields(LaplaceConfig)
)


def saved_settings() -> list[str]:
    """Names of the settings that a file keeps."""
    return [one.name for one in fields(LaplaceConfig) if one.metadata["saved"]]


def choices(name: str) -> tuple[str, ...]:
    """What a setting may be, if that is one of a few names; else nothing."""
    return next(tuple(one.metadata["choices"]) for one in fields(LaplaceConfig) if one.name == name)


@cache
def _types() -> dict[str, Any]:
    import torch

    return get_type_hints(LaplaceConfig, {**globals(), "torch": torch, "Tensor": torch.Tensor})


def _check(one: Field[Any], value: Any) -> None:
    """Raises TypeError or ValueError for a value that the setting cannot have; some are checked where they are used."""
    import torch

    kind, name = _types()[one.name], one.name
    optional = type(None) in get_args(kind)
    if (allowed := choices(name)) and value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    if kind is str and not isinstance(value, str):
        raise ValueError(f"{name}: expected the name of a kind of {name}, got {value!r}")
    if kind is bool and not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    if torch.dtype in get_args(kind) and not (
        value is None or (isinstance(value, torch.dtype) and value.is_floating_point)
    ):
        raise TypeError(f"{name}: expected a floating-point torch.dtype, got {value!r}")
    if kind in (int, int | None) and not (optional and value is None):
        least = one.metadata["least"]
        if isinstance(value, bool) or not isinstance(value, int):
            expected = "a positive int" if least == 1 else "an int"
            raise TypeError(f"{name}: expected {expected}{' or None' if optional else ''}, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
