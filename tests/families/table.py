"""docs/models.md from measured rows: without a date, and errors by their class, so that it stays the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from .cells import COLUMNS, HALF_TOLERANCE, SAMPLES, TOLERANCE, Result, Row

CLASSES = (1e-12, TOLERANCE)  # of errors: float64 throughout, and with norms in float32
MARKS = {"wrong": "**WRONG**", "failed": "**FAILED**", "none": "-"}
TITLES = {
    "kfac": "K-FAC",
    "ekfac": "EKFAC",
    "exact": "exact",
    "vocabulary": "vocabulary",
    "score": "score",
    "saved": "saved, loaded",
    "bfloat16": "bfloat16",
}
HEAD = """# Models and adapters

Made by `make models` with {versions}; nobody edits it. Every family is a small random
model (two layers, 16 wide, nothing downloaded) in float64, adapted by PEFT and fitted to two batches of padded texts,
or of images. A number means right: everything that was compared is off by less than that. The truth is plain autograd,
one example at a time and without padding, and nothing of this package's own mathematics (`tests/situations.py`,
`tests/families`). A truth that does not depend on the weights of some layer, or on the data, counts as a failure: no
cell is right because nothing was compared. *refused* is an error of this package, quoted below. Anything else would be
{wrong} or {failed}, and `make models` would fail.

| column | what is compared |
|---|---|
| K-FAC | fit and predict: means, covariances under the inverse of its own precision; factors A and S |
| EKFAC | the same; of the fit the trace of every layer's Gauss-Newton block, which EKFAC keeps |
| exact | means, covariances under the dense Gauss-Newton matrix of all layers together |
| vocabulary | `predict_vocabulary`: means of all logits, covariances of three, samples (Jacobian times weights) |
| score | `score`: log-probabilities, entropy, mutual information of every token, {samples} samples of the weights |
| saved, loaded | adapter and posterior from files, in a base model made anew: the same predictions |
| bfloat16 | a base in bfloat16, the adapter as PEFT makes it; covariances under the exact curvature |

In bfloat16 the covariance is within {half:g} % of that of the same weights in float64 or, where bfloat16 itself is
further off (a token that goes to another expert, say), of autograd in bfloat16. `{coarse}` in place of `{fine}`:
transformers computes norms or logits in float32 there, whatever the model's dtype. `-`: no causal head, or no text.
"""


def document(families: Sequence[Row], variants: Sequence[Row], versions: Mapping[str, str]) -> str:
    """The whole of docs/models.md."""
    notes = Notes()
    head = HEAD.format(
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        wrong=MARKS["wrong"],
        failed=MARKS["failed"],
        samples=SAMPLES,
        half=HALF_TOLERANCE * 100,
        fine=below(CLASSES[0]),
        coarse=below(CLASSES[1]),
    )
    parts = [head, "## Families, LoRA on attention\n", table("family", families, notes)]
    parts += ["## Variants of PEFT, on one Llama\n", table("adapter", variants, notes)]
    parts += ["## Notes\n", notes.text()]
    return "\n".join(parts)


class Notes:
    """Numbered footnotes, each text once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1

    def text(self) -> str:
        return "".join(f"{i}. {text}\n" for i, text in enumerate(self.texts, 1))


def table(what: str, rows: Sequence[Row], notes: Notes) -> str:
    lines = [f"| {what} | {' | '.join(TITLES[name] for name in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        name = row.name
        if row.left_out:
            kinds = ", ".join(sorted({kind_of(one) for one in row.left_out}))
            name += f" ({notes.number(f'The posterior does not cover {kinds}: they stay at their fine-tuned values.')})"
        cells = as_one(row.cells)
        lines.append(f"| {name} | {' | '.join(shown(cells[column], column, notes) for column in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def as_one(cells: Mapping[str, Result]) -> dict[str, Result]:
    """With the largest error in every column that has the same truth: which of them float32 rounds alike is luck."""
    same = {name: one for name, one in cells.items() if one.kind == "right" and name not in ("saved", "bfloat16")}
    worst = max((one.error for one in same.values()), default=0.0)
    return {**cells, **{name: replace(one, error=worst) for name, one in same.items()}}


def shown(result: Result, column: str, notes: Notes) -> str:
    """One cell."""
    if result.kind == "right":
        if column == "bfloat16":
            return f"< {HALF_TOLERANCE * 100:g} %"
        return below(next(limit for limit in CLASSES if result.error <= limit))
    if result.kind == "none":
        return MARKS["none"]
    mark = MARKS.get(result.kind, result.kind)
    return f"{mark} ({notes.number(first_sentence(result.text))})"


def below(limit: float) -> str:
    return f"< {limit:.0e}".replace("e-0", "e-")


def first_sentence(text: str) -> str:
    """Of an error's text, with long names and lists cut short."""
    text = " ".join(text.split())
    text = re.sub(r"(?:\w+\.){3,}((?:\w+\.){2}\w+)", r"...\1", text)
    text = re.sub(r"(\.\.\.[\w.]*\w)(?:, \.\.\.[\w.]*\w)+(?: and \d+ more)?", r"\1 and others", text)
    sentence = re.split(r"(?<=[^.])\. |; ", text)[0]
    return sentence.rstrip(".").replace("|", "\\|") + "."


def kind_of(module: str) -> str:
    """`lora_magnitude_vector` of `...q_proj.lora_magnitude_vector.default`."""
    return module.split(".")[-2]
