"""docs/models.md from measured rows: without a date, and errors by their class, so that it stays the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .cells import COLUMNS, HALF_TOLERANCE, SAMPLES, TOLERANCE, Result, Row

CLASSES = (1e-10, TOLERANCE)  # of errors: float64 throughout, and with norms in float32
OWN_CLASS = ("saved", "bfloat16")
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

Made by `make models` with {versions}; nobody edits it. Every family is a small
random model (two layers, 16 wide, nothing downloaded) in float64, adapted by PEFT and fitted to two batches of padded
texts, or of images. A number means right: everything that was compared is off by less than that. The truth is plain
autograd, one example at a time and without padding, and nothing of this package's own mathematics
(`tests/situations.py`, `tests/families`). A truth that does not depend on the weights of some layer, or on the data,
counts as a failure: no cell is right because nothing was compared. *refused* is an error of this package, quoted below.
Anything else would be {wrong} or {failed}, and `make models` would fail.

| column | what is compared |
|---|---|
| K-FAC | fit and predict: means, covariances under the inverse of the precision, the factors A and S of every layer |
| EKFAC | the same; of the fit the trace of every layer's Gauss-Newton block, which EKFAC keeps |
| exact | means, covariances under the dense Gauss-Newton matrix of all layers together |
| vocabulary | means of all logits, covariances of three; samples: the Jacobian times samples of weights |
| score | log-probabilities, entropy, mutual information of every token, with {samples} samples of the weights |
| saved, loaded | adapter and posterior from files, in a base model made anew: the same predictions |
| bfloat16 | the base in bfloat16, the adapter as PEFT makes it: exact covariances, against the nearer of two (1) |

(1) The same weights in float64, and autograd in bfloat16, which can itself be off by more. `<1e-05` in place of
`<1e-10`: norms, or logits, that transformers computes in float32 whatever the model's dtype. `-`: there is no causal
head, or no text.
"""


def document(families: Sequence[Row], variants: Sequence[Row], versions: Mapping[str, str]) -> str:
    """The whole of docs/models.md."""
    notes = Notes()
    head = HEAD.format(
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        wrong=MARKS["wrong"],
        failed=MARKS["failed"],
        samples=SAMPLES,
        half=HALF_TOLERANCE,
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
        right = [one for column, one in row.cells.items() if one.kind == "right" and column not in OWN_CLASS]
        worst = max((one.error for one in right), default=0.0)
        cells = [shown(row.cells[column], column, notes, worst) for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(result: Result, column: str, notes: Notes, worst: float) -> str:
    """One cell. Columns of one truth have the class of the worst of them: what float32 rounds to may be luck."""
    if result.kind == "right":
        if column == "bfloat16":
            return f"<{HALF_TOLERANCE:.0%}"
        error = result.error if column in OWN_CLASS else max(result.error, worst)
        return f"<{next(limit for limit in CLASSES if error <= limit):.0e}"
    if result.kind == "none":
        return MARKS["none"]
    mark = MARKS.get(result.kind, result.kind)
    return f"{mark} ({notes.number(first_sentence(result.text))})"


def first_sentence(text: str) -> str:
    """Of an error's text, with long names and lists cut short."""
    text = " ".join(text.split())
    text = re.sub(r"(?:\w+\.){3,}((?:\w+\.){2}\w+)", r"...\1", text)
    text = re.sub(r"(\.\.\.[\w.]+?), \.\.\.[\w.]+(?:, \.\.\.[\w.]+)*(?: and \d+ more)?", r"\1, ...", text)
    sentence = re.split(r"(?<=[^.])\. |; ", text)[0]
    return sentence.rstrip(".").replace("|", "\\|") + "."


def kind_of(module: str) -> str:
    """`lora_magnitude_vector` of `...q_proj.lora_magnitude_vector.default`."""
    return module.split(".")[-2]
