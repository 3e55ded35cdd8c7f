"""One row of docs/models.md: every cell is compared with autograd, one example at a time in float64, or is refused.

Refused is a ValueError, TypeError or NotImplementedError that this package itself raises. All else is a failure of the
package: `wrong` numbers, and `failed` for any other exception, whoever raises it.
"""

from __future__ import annotations

import copy
import math
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from dense import relative
from situations import (
    REFUSALS,
    Example,
    Ours,
    Scene,
    dense_covariance,
    deviations,
    exact_covariance,
    fit,
    jacobian,
    run_last,
    run_plain,
    trainable_layers,
    truth,
    unpadded_row,
    without_labels,
)
from torch import Tensor

import bayesian_lora_kernels as blk

from .recipes import CLASSES, Recipe

PACKAGE = Path(blk.__file__).parent
# The norms of transformers compute in float32 whatever the model's dtype.
TOLERANCE = 1e-5
HALF_TOLERANCE = 0.1  # more than what was seen, 0.043: processors round differently
SAMPLES = 4
BLOCK = 8  # samples of the weights that the package draws at once
Errors = dict[str, float]


@dataclass(frozen=True)
class Result:
    """One cell.

    Attributes:
        kind: right, refused, wrong, failed, or none: the column means nothing for the row.
        error: the largest relative error, of what was compared.
        text: what was off, or the exception.
    """

    kind: str
    error: float = 0.0
    text: str = ""

    @property
    def bad(self) -> bool:
        return self.kind in ("wrong", "failed")


class Measured:
    """A recipe's model, what the package says of it, and the truth; each when it is first needed."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self._fits: dict[str, Ours] = {}

    @cached_property
    def scene(self) -> Scene:
        return scene(self.recipe, self.recipe.model(), torch.float64)

    def ours(self, curvature: str) -> Ours:
        if curvature not in self._fits:
            laplace = fit(self.scene, curvature=curvature)
            predictions = [laplace.predict(without_labels(batch)) for batch in self.scene.batches]
            self._fits[curvature] = Ours(laplace, predictions)
        return self._fits[curvature]

    @cached_property
    def names(self) -> list[str]:
        """The layers that carry the posterior."""
        return [layer.name for layer in self.ours("ekfac").laplace.layers]

    @cached_property
    def left_out(self) -> list[str]:
        """Modules with trainable weights that the posterior does not cover."""
        return [name for name in trainable_layers(self.scene.model) if name not in self.names]

    @cached_property
    def truth(self) -> list[list[Example]]:
        return truth_of(self.scene, self.names)


def scene(recipe: Recipe, model: Any, dtype: torch.dtype) -> Scene:
    batches = [in_dtype(batch, dtype) for batch in recipe.batches()]
    run = run_last(recipe.arguments.get("class_token_ids")) if recipe.causal else run_plain
    if recipe.last_position:

        def run(model: Any, batch: Any, whole: Callable[[Any, Any], Tensor] = run) -> Tensor:
            return whole(model, {**batch, "logits_to_keep": 1})

    return Scene(model, batches, run=run, arguments=dict(recipe.arguments))


def in_dtype(batch: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()}


def truth_of(scene: Scene, names: list[str]) -> list[list[Example]]:
    """Every example alone; it must have something to say of every layer, and the data of the covariance.

    Raises:
        AssertionError: where a comparison with it would be empty.
    """
    found = truth(scene, names)
    examples = [x for batch in found for x in batch]
    for name in names:
        assert any(x.jacobian[name].any() for x in examples), f"nothing to compare: no logit depends on {name}"
    prior = exact_covariance([], examples)
    assert relative(prior, exact_covariance(examples, examples)) > 0.01, "nothing to compare: the data do not matter"
    return found


# Columns: what is off, and by how much; None: the column means nothing for this row


def curvature(kind: str) -> Callable[[Measured], Errors | None]:
    def column(measured: Measured) -> Errors:
        ours = measured.ours(kind)
        assert [layer.name for layer in ours.laplace.layers] == measured.names
        return deviations(measured.scene, ours, kind, measured.truth)

    return column


def vocabulary(measured: Measured) -> Errors | None:
    """Means of all logits, the covariance of some, and samples of those, which are linear in samples of the weights."""
    recipe, scene = measured.recipe, measured.scene
    if not recipe.causal:
        return None
    laplace, batch = measured.ours("ekfac").laplace, without_labels(scene.batches[0])
    posterior = laplace.predict_vocabulary(batch)
    means, jacobians = [], []
    for i in range(len(posterior.mean)):
        with torch.enable_grad():
            logits = before_cap(recipe, run_plain(scene.model, unpadded_row(batch, i))[0, -1])
            jacobians.append(jacobian(scene.model, measured.names, logits[list(CLASSES)]))
        means.append(logits.detach())
    samples = posterior.sample(SAMPLES, torch.Generator().manual_seed(3)) - posterior.mean
    weights = laplace.posterior.sample(BLOCK, torch.Generator().manual_seed(3))
    pushed = torch.stack([push(j, weights, SAMPLES) for j in jacobians], dim=1)
    return {
        "mean": relative(posterior.mean, torch.stack(means)),
        "covariance": relative(
            posterior.covariance(torch.tensor(CLASSES)), dense_covariance(laplace.posterior, jacobians, CLASSES)
        ),
        "samples": relative(samples[..., list(CLASSES)], pushed),
    }


def score(measured: Measured) -> Errors | None:
    """Every token of a text, from the model's own logits, and what samples of the weights do to them."""
    recipe, scene = measured.recipe, measured.scene
    if recipe.text is None:
        return None
    laplace, text = measured.ours("ekfac").laplace, in_dtype(recipe.text(), torch.float64)
    found = laplace.score(text, SAMPLES, torch.Generator().manual_seed(3))
    weights = laplace.posterior.sample(BLOCK, torch.Generator().manual_seed(3))
    names = ("log_prob_map", "log_prob", "entropy", "mutual_information")
    expected: dict[str, list[Tensor]] = {name: [] for name in names}
    for i in range(len(found.mask)):
        row = unpadded_row(text, i)
        with torch.enable_grad():
            logits = before_cap(recipe, run_plain(scene.model, row)[0])
        for t in range(1, len(logits)):
            z, token = logits[t - 1].detach(), row["input_ids"][0, t]
            moved = push(jacobian(scene.model, measured.names, logits[t - 1]), weights, SAMPLES // 2)
            p = behind_cap(recipe, torch.cat([z + moved, z - moved])).softmax(dim=-1)
            entropy = torch.special.entr(p.mean(dim=0)).sum()
            expected["log_prob_map"].append(behind_cap(recipe, z).log_softmax(dim=-1)[token])
            expected["log_prob"].append(p.mean(dim=0)[token].log())
            expected["entropy"].append(entropy)
            expected["mutual_information"].append(entropy - torch.special.entr(p).sum(dim=-1).mean())
    return {name: relative(getattr(found, name)[found.mask], torch.stack(expected[name])) for name in names}


def saved(measured: Measured) -> Errors | None:
    """Adapter and posterior, in a base model that was made anew."""
    laplace, predictions = measured.ours("ekfac").laplace, measured.ours("ekfac").predictions
    with tempfile.TemporaryDirectory() as folder:
        measured.scene.model.save_pretrained(folder)
        laplace.save_pretrained(folder)
        again = blk.LaplaceLoRA.from_pretrained(measured.recipe.reloaded(folder), folder)
        off = {}
        for b, (batch, before) in enumerate(zip(measured.scene.batches, predictions, strict=True)):
            after = again.predict(without_labels(batch))
            off[f"mean of batch {b}"] = relative(after.mean, before.mean)
            off[f"covariance of batch {b}"] = relative(after.covariance, before.covariance)
    return off


def bfloat16(measured: Measured) -> Errors | None:
    """Covariances under the exact curvature of a base in bfloat16, against its weights in float64.

    Where bfloat16 itself is further off (a token that goes to another expert, say), against its own autograd.
    """
    recipe = measured.recipe
    model = recipe.model(torch.bfloat16)
    half = scene(recipe, model, torch.bfloat16)
    laplace = fit(half, curvature="exact")
    names = [layer.name for layer in laplace.layers]
    double = scene(recipe, copy.deepcopy(model).double(), torch.float64)
    off = {}
    truths = [
        (examples, [x for batch in examples for x in batch])
        for examples in (truth_of(double, names), truth(half, names))
    ]
    for b, batch in enumerate(half.batches):
        found = laplace.predict(without_labels(batch)).covariance
        off[f"covariance of batch {b}"] = min(
            relative(found, exact_covariance(train, examples[b])) for examples, train in truths
        )
    return off


COLUMNS: dict[str, Callable[[Measured], Errors | None]] = {
    "kfac": curvature("kfac"),
    "ekfac": curvature("ekfac"),
    "exact": curvature("exact"),
    "vocabulary": vocabulary,
    "score": score,
    "saved": saved,
    "bfloat16": bfloat16,
}


def push(jacobian: Mapping[str, Tensor], weights: Mapping[str, Tensor], n: int) -> Tensor:
    """`[n, C]` from a Jacobian `[C, d_out, d_in]` and samples `[S, d_out, d_in]` of every layer."""
    moved = [torch.einsum("coi,soi->sc", j, used(weights[name][:n].double(), j)) for name, j in jacobian.items()]
    return torch.stack(moved).sum(dim=0)


def used(weights: Tensor, jacobian: Tensor) -> Tensor:
    """Of a head restricted to the classes only their rows are drawn."""
    if weights.shape[1] == jacobian.shape[1]:
        return weights
    whole = weights.new_zeros(len(weights), *jacobian.shape[1:])
    whole[:, list(CLASSES)] = weights
    return whole


def before_cap(recipe: Recipe, logits: Tensor) -> Tensor:
    return logits if recipe.cap is None else recipe.cap * torch.atanh(logits / recipe.cap)


def behind_cap(recipe: Recipe, logits: Tensor) -> Tensor:
    return logits if recipe.cap is None else recipe.cap * torch.tanh(logits / recipe.cap)


# One row


@dataclass(frozen=True)
class Row:
    """All cells of a recipe, by column, and the modules with trainable weights outside the posterior."""

    name: str
    cells: dict[str, Result]
    left_out: list[str]


def measure(recipe: Recipe, columns: Mapping[str, Callable[[Measured], Errors | None]] = COLUMNS) -> Row:
    measured = Measured(recipe)
    cells = {
        name: cell(lambda column=column: column(measured), HALF_TOLERANCE if name == "bfloat16" else TOLERANCE)
        for name, column in columns.items()
    }
    served = any(one.kind == "right" for one in cells.values())
    return Row(recipe.name, cells, measured.left_out if served else [])


def cell(compare: Callable[[], Errors | None], tolerance: float = TOLERANCE) -> Result:
    """One comparison, or why there is none."""
    try:
        off = compare()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, REFUSALS) and raised_here(error):
            return Result("refused", text=text)
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Result("failed", text=f"{text} ({Path(last.filename).name}, line {last.lineno})")
    if off is None:
        return Result("none")
    if not off:
        return Result("failed", text="nothing was compared")
    what, worst = max(off.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
    if not worst <= tolerance:
        return Result("wrong", worst, f"{what} is off by {worst:.1e}")
    return Result("right", worst)


def raised_here(error: BaseException) -> bool:
    """Whether an exception is the package's own, not one that went through it, even under a word of where."""
    cause = error.__cause__
    if cause is not None and str(error).endswith(str(cause)):
        return raised_here(cause)
    return PACKAGE in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents
