"""What an implementation of the operations over a vocabulary is verified on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..verify.problem import Arguments, Draw, Problem, Suite, off_alignment, usual_limit
from ..verify.rows import dtypes

_TOKENS = 331


@dataclass(frozen=True)
class _Kind:
    """A call: dtypes of weight and columns, sizes, and what of a head there is."""

    weight: torch.dtype
    columns: torch.dtype
    examples: int
    samples: int
    width: int
    vectors: bool = True
    bias: bool = False
    softcap: bool = False
    mirrored: bool = False
    known: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("vectors", "bias", "softcap", "mirrored", "known") if getattr(self, name)]
        sizes = f"N={self.examples} S={self.samples} d={self.width}"
        return " ".join([str(self.weight), str(self.columns), sizes, *flags])


@dataclass(frozen=True)
class _Inputs:
    """The common arguments, and the logits in float64."""

    weight: Tensor
    hidden: Tensor
    bias: Tensor | None
    softcap: float | None
    mirrored: bool
    logits: Tensor


def _inputs(kind: _Kind, draw: Draw) -> _Inputs:
    weight = (draw.normal(_TOKENS, kind.width) * kind.width**-0.5).to(kind.weight)
    weight = weight if kind.vectors else off_alignment(weight)
    hidden = (2 * draw.normal(kind.examples, kind.samples, kind.width)).to(kind.columns)
    # Logits of each example, and some tokens that are excluded.
    bias = draw.normal(kind.examples, _TOKENS) if kind.bias else None
    if bias is not None:
        bias[:, 3:70:9] = float("-inf")
    products = hidden.double() @ weight.double().T
    logits = torch.cat([products, -products], dim=1) if kind.mirrored else products
    logits = logits if bias is None else logits + bias.double()[:, None]
    softcap = 4.0 if kind.softcap else None
    if softcap is not None:
        logits = torch.where(logits == float("-inf"), logits, softcap * torch.tanh(logits / softcap))
    return _Inputs(weight, hidden, bias, softcap, kind.mirrored, logits)


def _logsumexp(kind: _Kind) -> Problem:
    def arguments(draw: Draw) -> Arguments:
        one = _inputs(kind, draw)
        out = draw.output(*one.logits.shape[:2], dtype=torch.float64)
        return out, one.weight, one.hidden, one.bias, one.softcap, one.mirrored

    return Problem(str(kind), arguments)


def _probs(kind: _Kind, scratch: int | None) -> Problem:
    def arguments(draw: Draw) -> Arguments:
        one = _inputs(kind, draw)
        known = one.logits.logsumexp(-1) if kind.known else None
        out = draw.output(kind.examples, _TOKENS)
        return out, one.weight, one.hidden, one.bias, one.softcap, one.mirrored, known, scratch

    return Problem(f"{kind} scratch={scratch}", arguments)


def _statistics(kind: _Kind, scratch: int | None) -> Problem:
    def arguments(draw: Draw) -> Arguments:
        one = _inputs(kind, draw)
        known = one.logits.logsumexp(-1) if kind.known else None
        outs = [draw.output(kind.examples) for _ in range(3)]
        targets = (draw.uniform(kind.examples) * 80 + 100).long()
        return *outs, one.weight, one.hidden, one.bias, one.softcap, one.mirrored, targets, known, scratch

    return Problem(f"{kind} scratch={scratch}", arguments)


def _variance(kind: _Kind) -> Problem:
    def arguments(draw: Draw) -> Arguments:
        one = _inputs(kind, draw)
        return draw.output(kind.examples, _TOKENS), one.weight, one.hidden.mT

    return Problem(str(kind), arguments)


def _kinds() -> Iterator[_Kind]:
    """Weights of every dtype beside samples of the same and of float32; heads as models have them."""
    heads: tuple[dict[str, bool], ...] = (
        {},
        {"bias": True},
        {"bias": True, "mirrored": True},
        {"bias": True, "softcap": True, "mirrored": True},
        {"known": True},
        {"bias": True, "mirrored": True, "known": True},
    )
    sizes = ((2, 5), (3, 32), (16, 32), (5, 64))
    for weight, (examples, samples), head in itertools.product(dtypes(), sizes, heads):
        for columns in dict.fromkeys((weight, torch.float32)):
            yield _Kind(weight, columns, examples, samples, 128, **head)
    for weight, (examples, samples), vectors in itertools.product(dtypes(), sizes[:3], (True, False)):
        yield _Kind(weight, torch.float32, examples, samples, 80 if vectors else 39, vectors, bias=True, mirrored=True)


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _near(variant: str) -> Iterator[_Kind]:
    """Kinds of the sizes that a name of ``kernel_variants.Variant`` has."""
    _, weight, columns, *words = variant.split()
    sizes = {name: int(size) for name, _, size in (word.partition("=") for word in words if "=" in word)}
    flags = {name: name in words for name in ("vectors", "bias", "softcap", "mirrored", "known")}
    padded, step = sizes["padded"], sizes["BK"]
    width = 2 * step + (0 if "even" in words else 16 if "vectors" in words else 7)
    for examples, less in itertools.product((1, 2, 3, 5, 9, 17, 40), (0, 3)):
        for columns_are in (torch.float32, _DTYPES[columns.partition("x")[0]]):
            if padded > less:
                yield _Kind(_DTYPES[weight], columns_are, examples, padded - less, width, **flags)


def _both(kinds: Iterable[_Kind], make: Callable[[_Kind, int | None], Problem]) -> Iterator[Problem]:
    """In one pass and in two."""
    return itertools.starmap(make, itertools.product(kinds, (None, 0)))


LOGSUMEXP = Suite(
    problems=lambda device: (_logsumexp(kind) for kind in _kinds() if not kind.known),
    near=lambda variant: map(_logsumexp, _near(variant)),
    comparable=lambda arguments: [arguments[0]],
    limit=lambda arguments: usual_limit(arguments[1], arguments[2]),
)
PROBS = replace(
    LOGSUMEXP,
    problems=lambda device: _both(_kinds(), _probs),
    near=lambda variant: _both(_near(variant), _probs),
)
STATISTICS = Suite(
    problems=lambda device: _both(_kinds(), _statistics),
    near=lambda variant: _both(_near(variant), _statistics),
    comparable=lambda arguments: arguments[:3],
    limit=lambda arguments: usual_limit(arguments[3], arguments[4]),
    outputs=3,
)
VARIANCE = replace(
    LOGSUMEXP,
    problems=lambda device: (_variance(kind) for kind in _kinds() if not (kind.bias or kind.known)),
    near=lambda variant: map(_variance, _near(variant)),
)
