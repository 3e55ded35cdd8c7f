"""A text whose tokens are coloured by how much of their uncertainty is epistemic: as HTML, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from bayesian_lora_kernels.plots.style import INK, MUTED, SURE, UNSURE, new_figure, save_figure, styled

COLUMNS = 88
CHARACTER, LINE = 0.083, 0.2  # inches
FONT = 9.0
MOST_LINES = 400  # of a picture, beyond which it would be too tall for what opens it
LEGEND = "mutual information of token and weights, nats"


class ScoredToken(NamedTuple):
    """One token of a text; numbers are in nats, None where nothing comes before the token.

    Attributes:
        token_id: in the vocabulary.
        text: the part of the text that it stands for.
        log_prob_map: at the MAP weights.
        log_prob: of the posterior predictive.
        entropy: of what could stand here.
        mutual_information: the epistemic part of that.
    """

    token_id: int
    text: str
    log_prob_map: float | None = None
    log_prob: float | None = None
    entropy: float | None = None
    mutual_information: float | None = None


def top_of_scale(tokens: Sequence[ScoredToken]) -> float:
    """The mutual information that gets the full colour: what one token in fifty exceeds."""
    values = sorted(token.mutual_information for token in tokens if token.mutual_information is not None)
    return max(values[int(0.98 * (len(values) - 1))] if values else 0.0, 1e-12)


def html(tokens: Sequence[ScoredToken], title: str) -> str:
    """A page of its own: the text, numbers of each token where the pointer rests, and the scale."""
    top = top_of_scale(tokens)
    spans = []
    for token in tokens:
        if token.mutual_information is None or token.log_prob is None:
            spans.append(escape(token.text))
            continue
        note = (
            f"log p {token.log_prob:.3f} (MAP {token.log_prob_map:.3f}), entropy {token.entropy:.3f}, "
            f"mutual information {token.mutual_information:.4f}"
        )
        color = _hex(token.mutual_information / top)
        spans.append(f'<span style="background:{color}" title="{note}">{escape(token.text)}</span>')
    ramp = f"linear-gradient(to right, {_hex(0)}, {_hex(1)})"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{escape(title)}</title>
<style>
body {{ color: {INK}; background: {SURE}; font-family: sans-serif; max-width: 60em; margin: 2em auto; }}
pre {{ white-space: pre-wrap; line-height: 1.7; font-size: 14px; }}
span {{ border-radius: 2px; }}
p {{ color: {MUTED}; font-size: 13px; }}
i {{ display: inline-block; width: 9em; height: 0.9em; border: 1px solid {MUTED}; background: {ramp}; }}
</style>
</head>
<body>
<p>{escape(title)}. {LEGEND}: 0 <i></i> {top:.3g} and more</p>
<pre>{"".join(spans)}</pre>
</body>
</html>
"""


@styled()
def draw(tokens: Sequence[ScoredToken], path: Path) -> None:
    """The same as a picture, in the format that the suffix says; a long text is cut, and the picture says so.

    Raises:
        OSError: if it cannot be written.
    """
    from matplotlib.patches import Rectangle

    top = top_of_scale(tokens)
    cells = list(_layout(tokens))
    lines = min(max((line for line, _, _, _ in cells), default=0) + 1, MOST_LINES)
    cut = any(line >= lines for line, _, _, _ in cells)
    rows = lines + 2 + cut
    figure = new_figure(COLUMNS * CHARACTER + 0.4, rows * LINE + 0.4, layout=None)
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-0.2 / CHARACTER, COLUMNS + 0.2 / CHARACTER)
    axes.set_ylim(rows + 0.2 / LINE, -0.2 / LINE)
    axes.axis("off")
    for line, column, text, value in cells:
        if line >= lines:
            continue
        if value is not None:
            box = Rectangle((column, line + 0.04), len(text), 0.92, facecolor=_hex(value / top), edgecolor="none")
            axes.add_patch(box)
        for i, character in enumerate(text):  # each in its own cell, whatever the font's width
            if not character.isspace():
                _write(axes, column + i + 0.5, line + 0.5, character, "center")
    if cut:
        _write(axes, 0, lines + 0.5, f"... the first {lines} lines of the text", "left", MUTED)
    below = rows - 0.5
    width = 16
    start = len(LEGEND) + 2
    _write(axes, 0, below, LEGEND, "left", MUTED, FONT - 1)
    _write(axes, start - 1, below, "0", "right", MUTED, FONT - 1)
    for i in range(8 * width):
        box = Rectangle((start + i / 8, below - 0.35), 1 / 8, 0.7, facecolor=_hex(i / (8 * width)), edgecolor="none")
        axes.add_patch(box)
    axes.add_patch(Rectangle((start, below - 0.35), width, 0.7, fill=False, edgecolor=MUTED, linewidth=0.6))
    _write(axes, start + width + 1, below, f"{top:.3g} and more", "left", MUTED, FONT - 1)
    save_figure(figure, path)


def _write(axes: Any, x: float, y: float, text: str, align: str, color: str = INK, size: float = FONT) -> None:
    axes.text(
        x, y, text, ha=align, va="center_baseline", fontsize=size, family="monospace", color=color, parse_math=False
    )


def _layout(tokens: Sequence[ScoredToken]) -> Iterator[tuple[int, int, str, float | None]]:
    """Parts of tokens as `(line, column, text, value)`: lines end where the text's do, and at the last column.

    A line that is too long goes on below from the first token that has no room in it.
    """
    line = column = 0
    for token in tokens:
        value = token.mutual_information
        for i, part in enumerate(token.text.expandtabs(4).split("\n")):
            if i:
                line, column = line + 1, 0
            if column and column + len(part) > COLUMNS:
                line, column = line + 1, 0
                part = part.lstrip(" ")
            while part:
                piece, part = part[: COLUMNS - column], part[COLUMNS - column :]
                yield line, column, piece, value
                column += len(piece)
                if part:
                    line, column = line + 1, 0


def _hex(share: float) -> str:
    """Between `SURE` and `UNSURE`."""
    share = min(max(share, 0.0), 1.0)
    ends = zip(*(bytes.fromhex(color[1:]) for color in (SURE, UNSURE)), strict=True)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in ends)
