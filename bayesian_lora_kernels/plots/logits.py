"""What the posterior says of single questions: the Gaussian of every choice's logit, and probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesian_lora_kernels.plots.style import (
    BLUE,
    GREEN,
    MUTED,
    PALE_BLUE,
    PALE_GREEN,
    SMALL,
    WIDTH,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CHOICES = 8  # of a question; the least probable are left out
MOST_QUESTIONS = 6
REACH = 3.2  # standard deviations
METHODS = (MUTED, BLUE)  # colours of their bars


@styled()
def logit_diagram(
    mean: Tensor,
    std: Tensor,
    probs: Mapping[str, Tensor],
    names: Sequence[str],
    *,
    answers: Sequence[int | None] | None = None,
    titles: Sequence[str] | None = None,
) -> Figure:
    """For each question the Gaussian of every choice's logit, the most probable first, and beside it probabilities.

    The right answer, where it is known, is green and marked. A logit less the mean of the choices' logits is best
    (`LaplaceLoRA.predict(batch, differences=True)`): what they share changes no probability. Of many choices the eight
    most probable ones are drawn, and the answer.

    Args:
        mean: `[N, C]`, at most 6 questions.
        std: `[N, C]`, standard deviations.
        probs: `{method: [N, C]}`, of one or two methods.
        names: of the choices, `C`.
        answers: for each question the index of the right choice, or None.
        titles: for each question.

    Raises:
        ValueError: for arguments of other shapes, or too many questions or methods.
        ImportError: without matplotlib.
    """
    answers = [None] * len(mean) if answers is None else answers
    titles = [""] * len(mean) if titles is None else titles
    _check(mean, std, probs, names, answers, titles)
    shown = [_choices(mean[i], answers[i]) for i in range(len(mean))]
    heights = [0.34 * len(choices) + 0.5 for choices in shown]
    figure = new_figure(WIDTH, sum(heights) + 0.75)
    axes = figure.subplots(len(mean), 2, squeeze=False, sharex="col", width_ratios=[2, 1], height_ratios=heights)
    for i, (choices, answer) in enumerate(zip(shown, answers, strict=True)):
        left, right = axes[i]
        _draw_gaussians(left, mean[i, choices].tolist(), std[i, choices].tolist(), [c == answer for c in choices])
        _draw_bars(right, {name: values[i, choices].tolist() for name, values in probs.items()})
        labels = [_short(names[c]) + (" (answer)" if c == answer else "") for c in choices]
        left.set_yticks(range(len(choices)), labels)
        for label, choice in zip(left.get_yticklabels(), choices, strict=True):
            label.set_fontweight("bold" if choice == answer else "normal")
        right.set_yticks(range(len(choices)), [""] * len(choices))
        for one in (left, right):
            one.set_ylim(len(choices) - 0.3, -0.95)
            one.grid(axis="x")
            one.grid(visible=False, axis="y")
            one.tick_params(axis="y", length=0)
        left.set_title(titles[i], loc="left")
    axes[-1, 0].set_xlabel("logit less the mean of the choices' logits")
    axes[-1, 1].set_xlabel("probability")
    figure.legend(handles=_key(probs, answers), loc="outside lower center", ncols=5)
    return figure


def _check(
    mean: Tensor,
    std: Tensor,
    probs: Mapping[str, Tensor],
    names: Sequence[str],
    answers: Sequence[int | None],
    titles: Sequence[str],
) -> None:
    if mean.ndim != 2 or not 1 <= len(mean) <= MOST_QUESTIONS:
        raise ValueError(f"mean: expected [N, C] of 1 to {MOST_QUESTIONS} questions, got {list(mean.shape)}")
    if not 1 <= len(probs) <= len(METHODS):
        raise ValueError(f"probs: expected one or two methods, got {len(probs)}")
    for name, values in {"std": std, **probs}.items():
        if values.shape != mean.shape:
            raise ValueError(f"{name}: expected {list(mean.shape)}, as mean is, got {list(values.shape)}")
    n, c = mean.shape
    for what, count, expected in (("names", len(names), c), ("answers", len(answers), n), ("titles", len(titles), n)):
        if count != expected:
            raise ValueError(f"{what}: expected {expected}, got {count}")
    if any(answer is not None and not 0 <= answer < mean.shape[1] for answer in answers):
        raise ValueError(f"answers: expected indices below {mean.shape[1]} or None, got {list(answers)}")
    if not (std >= 0).all() or not torch.isfinite(mean).all() or not torch.isfinite(std).all():
        raise ValueError("mean, std: expected finite numbers, and no negative standard deviation")


def _choices(mean: Tensor, answer: int | None) -> list[int]:
    """Those that are drawn, the most probable first."""
    order: list[int] = mean.argsort(descending=True).tolist()
    found = order[:MOST_CHOICES]
    if answer is not None and answer not in found:
        found[-1] = answer
    return found


def _draw_gaussians(axes: Any, means: Sequence[float], stds: Sequence[float], right: Sequence[bool]) -> None:
    """A hill on the line of each choice, all of one height, and a mark at its mean."""
    widest = max(*stds, 1e-9)
    for line, (mean, std, is_answer) in enumerate(zip(means, stds, right, strict=True)):
        std = max(std, 1e-3 * widest)
        points = torch.linspace(-REACH, REACH, 129, dtype=torch.float64)
        heights = 0.85 * (-0.5 * points.square()).exp()
        x, y = (mean + std * points).tolist(), (line - heights).tolist()
        edge, face = (GREEN, PALE_GREEN) if is_answer else (BLUE, PALE_BLUE)
        axes.fill_between(x, y, line, color=face, linewidth=0)
        axes.plot(x, y, color=edge, linewidth=1.2)
        axes.plot([mean, mean], [line, line - 0.85], color=edge, linewidth=1.2)
        axes.axhline(line, color=MUTED, linewidth=0.5, zorder=0)


def _draw_bars(axes: Any, probs: Mapping[str, Sequence[float]]) -> None:
    height = 0.7 / len(probs)
    for method, (values, color) in enumerate(zip(probs.values(), METHODS[-len(probs) :], strict=True)):
        places = [line - 0.42 + (method - (len(probs) - 1) / 2) * height for line in range(len(values))]
        axes.barh(places, values, 0.88 * height, color=color)
        for place, value in zip(places, values, strict=True):
            axes.text(value + 0.015, place, f"{value:.2f}", va="center", fontsize=SMALL)
    axes.set_xlim(0, 1.18)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])


def _key(probs: Mapping[str, Tensor], answers: Sequence[int | None]) -> list[Any]:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=PALE_BLUE, edgecolor=BLUE, label="logit of a choice")]
    if any(answer is not None for answer in answers):
        handles.append(Patch(facecolor=PALE_GREEN, edgecolor=GREEN, label="of the answer"))
    return handles + [Patch(color=color, label=name) for name, color in zip(probs, METHODS[-len(probs) :], strict=True)]


def _short(name: str) -> str:
    name = name.strip()
    return name if len(name) <= 24 else name[:21] + "..."
