"""The numbers of `fidelity` as text, JSON and a page of documentation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bayesian_lora_kernels.demo.settings import CLASSES, DemoSettings

from .workload import environment


@dataclass(frozen=True)
class Method:
    """One row of the table. Without `tokens` it is no Kronecker approximation, and the rest means nothing."""

    curvature: str
    tokens: str = ""
    rank: int | None = None
    tail: bool = True

    @property
    def cells(self) -> tuple[str, str, str, str]:
        if not self.tokens:
            return self.curvature, "", "", ""
        if self.rank is None:
            return self.curvature, self.tokens, "full", ""
        return self.curvature, self.tokens, str(self.rank), "on" if self.tail else "off"


@dataclass(frozen=True)
class Measurement:
    """What came out on one model, or the mean over several.

    Attributes:
        prior_precision: where the exact evidence is largest.
        log_likelihood: of the training labels, per example, in nats.
        n_train: examples that the posteriors are fitted to.
        n_test: examples whose covariances are compared.
        errors: per method and prior precision, the Frobenius norm of the difference over that of the exact covariances.
        variances: likewise, the summed variances over those of the exact posterior.
    """

    prior_precision: float
    log_likelihood: float
    n_train: int
    n_test: int
    errors: Mapping[Method, list[float]]
    variances: Mapping[Method, list[float]]

    def error_ratio(self, numerator: Method, denominator: Method) -> list[float]:
        return [n / d for n, d in zip(self.errors[numerator], self.errors[denominator], strict=True)]


HEAD = ("curvature", "tokens", "rank", "tail")

PAGE = """# Fidelity: the approximations against the exact posterior

Written by

```
{command}
```

with {versions}.

A Llama of {size}, trained on the documentation of Python's standard library, is fine-tuned with LoRA
({lora}) on {result.n_train} sentences to tell {classes} apart, as in
`blk demo` ({models}). The training labels end at a log-likelihood of {result.log_likelihood:.3f} per example.

All curvatures are measured on the same examples with the exact Fisher. Compared are the covariances of the logits of
{result.n_test} test sentences, with one prior precision for all methods: that at which the exact evidence is largest
({result.prior_precision:.3g}), a tenth of it, and ten times it.

Entries: relative error of the covariances in Frobenius norm; in brackets the sum of the variances over that of the
exact posterior.

{table}

## How to read it

- {ratio}
- The first row drops the correlations between modules and nothing else. Every other row drops them too.
- EKFAC has the exact second moments of the gradient along its basis, and the smallest error of the *curvature* that a
  diagonal in that basis can have. The covariance is the inverse, and there a diagonal errs to one side: the inverse of
  a diagonal entry never exceeds the diagonal entry of the inverse. Every variance along a basis direction is a lower
  bound on its module's.
- How much that costs depends on the prior. A few hundred confident examples determine few directions of the weights;
  the exact curvature leaves the others to the prior, a diagonal in a fixed basis spreads it over all of them. Once the
  prior is much weaker than the curvature that is spread, EKFAC takes variance away. K-FAC's eigenvalues are too large
  in some directions and too small in others, which may cancel; so may a missing tail, which leaves the complement to
  the prior. Neither is a reason to trust them. With little data and a weak prior, use `curvature="exact"`.
"""


def as_text(result: Measurement, scales: Sequence[float]) -> str:
    """A table for the terminal."""
    width = max(len(method.curvature) for method in result.errors)

    def line(cells: Sequence[str], numbers: Sequence[str]) -> str:
        return f"{cells[0]:{width}} {cells[1]:7}{cells[2]:5}{cells[3]:5}" + "".join(f"{n:>15}" for n in numbers)

    lines = [line(HEAD, [f"prior x {scale:g}" for scale in scales])]
    lines += [line(method.cells, _numbers(result, method)) for method in result.errors]
    lines.append(f"relative error of the covariance (share of the exact variance); {_ratio_sentence(result, scales)}")
    return "\n".join(lines)


def as_json(measured: Sequence[Measurement], scales: Sequence[float]) -> str:
    """Every number of every seed."""

    def rows(m: Measurement) -> list[dict[str, Any]]:
        return [asdict(method) | {"errors": m.errors[method], "variances": m.variances[method]} for method in m.errors]

    seeds = [
        {key: value for key, value in vars(m).items() if key not in ("errors", "variances")} | {"rows": rows(m)}
        for m in measured
    ]
    return json.dumps({"environment": environment(), "scales": list(scales), "seeds": seeds}, indent=1) + "\n"


def as_markdown(result: Measurement, scales: Sequence[float], settings: DemoSettings, command: str, seeds: int) -> str:
    """A whole page: what was measured, the table, how to read it."""
    base, tuning, versions = settings.base, settings.tuning, environment()
    head = [*HEAD, *(_scale_name(scale) for scale in scales)]
    rows = [[*method.cells, *_numbers(result, method)] for method in result.errors]
    return PAGE.format(
        command=command,
        versions=", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers", "peft")),
        size=f"{base.layers} layers and width {base.width}",
        lora=f"rank {tuning.rank} on {', '.join(tuning.targets)}; {tuning.epochs} epochs",
        models="one fine-tuned model" if seeds == 1 else f"means over {seeds} fine-tuned models",
        classes=f"{', '.join(CLASSES[:-1])} and {CLASSES[-1]}",
        result=result,
        table="\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]),
        ratio=_ratio_sentence(result, scales),
    )


def _numbers(result: Measurement, method: Method) -> list[str]:
    return [
        f"{error:.3f} ({variance:.2f})"
        for error, variance in zip(result.errors[method], result.variances[method], strict=True)
    ]


def _scale_name(scale: float) -> str:
    if scale == 1:
        return "evidence's optimum"
    return f"x {scale:g}" if scale > 1 else f"/ {1 / scale:g}"


def _ratio_sentence(result: Measurement, scales: Sequence[float]) -> str:
    ratios = result.error_ratio(Method("ekfac", "expand"), Method("kfac", "expand"))
    each = ", ".join(f"{ratio:.2f} at {_scale_name(scale)}" for ratio, scale in zip(ratios, scales, strict=True))
    return f"EKFAC's error over K-FAC's (expand, full rank): {each}."
