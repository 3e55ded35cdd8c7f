"""What half precision does to a posterior over SmolLM2-135M, and where that comes from.

    make .venv/.llm                                    # the model and the rated sentences
    python -m benchmarks.precision --json FILE [--markdown FILE]

LoRA r = 8 on q_proj and v_proj, fine-tuned on rated sentences, K-FAC over the same sentences, predictions of others.
Every number of the model is rounded to bfloat16 first, as a released checkpoint is, so that all rows are of one model
and differ only in how its passes are computed. Errors are against float32: relative, in the Frobenius norm, over all
predicted examples together.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.demo import sentiment
from bayesian_lora_kernels.demo.language import TUNING
from bayesian_lora_kernels.demo.problem import Example, make_batch
from bayesian_lora_kernels.demo.ratings import read_ratings
from bayesian_lora_kernels.demo.smollm2 import load_smollm2
from bayesian_lora_kernels.demo.training import add_lora, class_logits, fine_tune

from .workload import environment, relative_error

RATINGS = Path(".venv/data/vaderSentiment-3.3.2.tar.gz")
SIZES = sentiment.Sizes(train=32, held_out=0, test=16, shift=0)
EPOCHS = 2
PRIOR = 1.0
PLAIN = "float32"
SAID = ("covariance", "variance of the difference", "mean", "log likelihood", "curvature part", "evidence")
PARTS = ("covariance, predictions' passes alone", "covariance, the fit alone", "gradients, plain autograd")

Batch = dict[str, Tensor]


def autocast() -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16)


def narrowed(model: nn.Module, dtype: torch.dtype, adapter: torch.dtype) -> nn.Module:
    """A copy with the base model in one dtype and its adapter in another."""
    copied = copy.deepcopy(model)
    for name, p in copied.named_parameters():
        p.data = p.data.to(adapter if "lora_" in name else dtype)
    return copied


# {name: (the model's copy, what its passes run in)}
WAYS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[], AbstractContextManager[object]]]] = {
    PLAIN: (lambda model: model, nullcontext),
    "bfloat16, adapter in float32": (partial(narrowed, dtype=torch.bfloat16, adapter=torch.float32), nullcontext),
    "bfloat16": (partial(narrowed, dtype=torch.bfloat16, adapter=torch.bfloat16), nullcontext),
    "autocast to bfloat16": (lambda model: model, autocast),
}


@dataclass(frozen=True)
class Data:
    """Batches of the fine-tuning sentences and of others, and the tokens of the two answers."""

    train: list[Batch]
    test: list[Batch]
    answers: list[int]


def prepare(ratings: Path) -> tuple[nn.Module, Data]:
    """The fine-tuned model, rounded to bfloat16, in float32."""
    base, tokenizer = load_smollm2()
    sets = sentiment.draw(read_ratings(ratings), SIZES, seed=0)
    answers = [tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in sentiment.choices(False)]

    def encode(name: str) -> list[Example]:
        prompts = [(sentiment.prompt(text, False), label) for text, label in sets[name]]
        return [Example(tuple(tokenizer(prompt)["input_ids"]), label) for prompt, label in prompts]

    def batches(examples: Sequence[Example]) -> list[Batch]:
        pad, longest = tokenizer.pad_token_id or 0, sorted(examples, key=lambda one: -len(one.tokens))
        return [make_batch(longest[i : i + 8], pad, left=False) for i in range(0, len(longest), 8)]

    examples = encode("train")
    model = add_lora(base, TUNING, seed=0)
    fine_tune(model, answers, examples, replace(TUNING, epochs=EPOCHS), seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16().float())
    return model.eval(), Data(batches(examples), batches(encode("test")), answers)


@dataclass(frozen=True)
class Said:
    """What a fit and its predictions say, in float64."""

    laplace: LaplaceLoRA
    mean: Tensor
    covariance: Tensor

    @property
    def differences(self) -> Tensor:
        """Variances of the difference of the two logits, which are all that probabilities see."""
        contrast = torch.tensor([1.0, -1.0], dtype=torch.float64)
        return contrast @ self.covariance @ contrast

    @property
    def evidence(self) -> float:
        return float(self.laplace.log_marginal_likelihood())

    @property
    def log_likelihood(self) -> float:
        assert self.laplace.log_likelihood is not None
        return self.laplace.log_likelihood


def predictions(laplace: LaplaceLoRA, data: Data, around: Callable[[], AbstractContextManager[object]]) -> Said:
    with around():
        found = [laplace.predict(batch) for batch in data.test]
    mean, covariance = (torch.cat([getattr(one, part) for one in found]).double() for part in ("mean", "covariance"))
    return Said(laplace, mean, covariance)


def fit(model: nn.Module, data: Data, around: Callable[[], AbstractContextManager[object]]) -> LaplaceLoRA:
    laplace = LaplaceLoRA(model, class_token_ids=data.answers, prior_precision=PRIOR, check="off")
    with around():
        return laplace.fit(data.train, progress=False)


def gradients(model: nn.Module, batch: Batch, data: Data) -> Tensor:
    """Plain autograd: of the two logits' sum over a batch, with respect to the adapter."""
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    total = class_logits(model, batch, data.answers).sum()
    return torch.cat([g.flatten().double() for g in torch.autograd.grad(total, parameters)])


def errors(found: Said, plain: Said) -> dict[str, float]:
    def off(own: float, other: float) -> float:
        return abs(own - other) / abs(other)

    values = (
        relative_error(found.covariance, plain.covariance),
        relative_error(found.differences, plain.differences),
        relative_error(found.mean, plain.mean),
        off(found.log_likelihood, plain.log_likelihood),
        off(found.evidence - found.log_likelihood, plain.evidence - plain.log_likelihood),
        off(found.evidence, plain.evidence),
    )
    return dict(zip(SAID, values, strict=True))


def measure(ratings: Path) -> dict[str, Any]:
    model, data = prepare(ratings)
    plain: Said | None = None
    results: dict[str, Any] = {}
    truth = torch.stack([gradients(model, batch, data) for batch in data.test])
    for name, (build, around) in WAYS.items():
        one = build(model)
        said = predictions(fit(one, data, around), data, around)
        plain = said if plain is None else plain
        with around():
            own = torch.stack([gradients(one, batch, data) for batch in data.test])
        # The passes of one with the curvature of the other, and the other way round.
        swapped, other = copy.copy(said.laplace), copy.copy(plain.laplace)
        swapped._fit, other._fit = plain.laplace._fit, said.laplace._fit
        found = [predictions(swapped, data, around), predictions(other, data, nullcontext)]
        parts = [*(relative_error(part.covariance, plain.covariance) for part in found), relative_error(own, truth)]
        results[name] = {
            "errors": errors(said, plain),
            "parts": dict(zip(PARTS, parts, strict=True)),
            "log_likelihood": said.log_likelihood,
            "log_marginal_likelihood": said.evidence,
        }
        print(f"{len(results)}/{len(WAYS)} {name}: {results[name]}", file=sys.stderr, flush=True)
    return {
        "environment": environment(),
        "sizes": asdict(SIZES),
        "epochs": EPOCHS,
        "prior_precision": PRIOR,
        "results": results,
    }


def table(content: dict[str, Any]) -> str:
    rows = {name: row for name, row in content["results"].items() if name != PLAIN}
    lines: list[str] = []
    for title, columns, values in (
        ("against float32", SAID, {name: row["errors"] for name, row in rows.items()}),
        ("where it comes from", PARTS, {name: row["parts"] for name, row in rows.items()}),
    ):
        lines += [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(f'{row[key]:.2%}' for key in columns)} |" for name, row in values.items()]
        lines.append("")
    return "\n".join(lines[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables")
    parser.add_argument("--ratings", type=Path, default=RATINGS, metavar="FILE", help=f"default: {RATINGS}")
    arguments = parser.parse_args()
    content = measure(arguments.ratings)
    print(table(content))
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        head = __doc__.split("\n\n", 2)
        arguments.markdown.write_text(f"# {head[0]}\n\n{head[2]}\n{table(content)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
