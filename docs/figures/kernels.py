"""Draws the tiles and the data flow of the kernels: `python docs/figures/kernels.py` writes the SVG files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from bayesian_lora_kernels.plots.style import INK, ORANGE, new_figure, save_figure, styled
from bayesian_lora_kernels.plots.style import PALE_GREEN as GREEN
from bayesian_lora_kernels.plots.style import PALE_GREY as GREY
from bayesian_lora_kernels.plots.style import SKY as BLUE

HERE = Path(__file__).parent


def canvas(width: float, height: float) -> tuple[Figure, Any]:
    """A figure whose units are tenths of an inch."""
    figure = new_figure(width / 10, height / 10, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return figure, axes


def block(axes: Any, x: float, y: float, w: float, h: float, color: str, text: str = "", **more: Any) -> None:
    """A matrix, or a tile of one."""
    axes.add_patch(Rectangle((x, y), w, h, facecolor=color, edgecolor=INK, linewidth=0.8, **more))
    say(axes, x + w / 2, y + h / 2, text)


def step(axes: Any, x: float, y: float, w: float, h: float, color: str, text: str) -> None:
    """What is computed."""
    shape = FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=1", facecolor=color, edgecolor=INK, lw=0.8)
    axes.add_patch(shape)
    say(axes, x + w / 2, y + h / 2, text)


def say(axes: Any, x: float, y: float, text: str, size: float = 8.5, align: str = "center") -> None:
    """Words in the middle of something, or to the right of it."""
    axes.text(x, y, text, ha=align, va="center", fontsize=size, color=INK, linespacing=1.35)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    """Where numbers go."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=INK, lw=0.9, connectionstyle=style)
    )


def outer_product() -> Figure:
    """Tiles on and below the diagonal, and where one of them comes from and goes to."""
    figure, axes = canvas(74, 37)
    rows, columns, side = 22, 6, 4
    block(axes, 3, 6, columns * side, rows, GREY)
    for i, color in ((1, BLUE), (4, ORANGE)):
        block(axes, 3 + i * side, 6, side, rows, color)
        say(axes, 3 + (i + 0.5) * side, 17, "$X_j$" if i == 1 else "$X_i$", 10)
    say(axes, 15, 30, "X: M rows, d columns,\nmasked rows left out", 8.5)
    say(axes, 15, 3, "one program reads two bands,\nsome rows at a time", 8)
    left, bottom = 44, 5
    for i in range(columns):
        for j in range(columns):
            x, y = left + j * side, bottom + (columns - 1 - i) * side
            block(axes, x, y, side, side, GREEN if j <= i else "white")
    block(axes, left + side, bottom + side, side, side, ORANGE, "ij")
    block(axes, left + 4 * side, bottom + 4 * side, side, side, "white", "ji", hatch="//")
    arrow(axes, (27.5, 15), (left + side, bottom + 1.5 * side))
    say(axes, 36, 21, "sums stay in\nregisters: $X_i^T X_j$", 8)
    arrow(axes, (left + 2 * side, bottom + 1.7 * side), (left + 4.4 * side, bottom + 4 * side), 0.25)
    say(
        axes,
        56,
        32,
        "d x d in tiles of 128 x 128: green is multiplied,\nwhite is its mirror image, or left out",
        8,
    )
    return figure


def incremental_svd() -> Figure:
    """The update of a low-rank factor, and which matrices are how large."""
    figure, axes = canvas(82, 43)
    block(axes, 3, 25, 3.5, 12, BLUE, "B")
    say(axes, 4.8, 39.5, "d x l", 8)
    block(axes, 3, 4, 16, 12, ORANGE, "X\nM x d")
    say(axes, 11, 18.3, "a batch of rows", 8)
    step(axes, 14, 27, 14, 8, GREY, "test columns,\northonormal: $\\Omega$")
    arrow(axes, (6.5, 31), (14, 31))
    arrow(axes, (17, 19.5), (20, 27))
    say(axes, 25.5, 22.5, "10 signed sums\nof 16 rows", 8)
    step(axes, 35, 25, 15, 12, GREEN, "$Z = X\\,\\Omega$\n$R = B^T\\Omega$")
    arrow(axes, (28, 31), (35, 31))
    step(axes, 35, 4, 15, 12, GREEN, "$Y = X^T Z + B R$")
    arrow(axes, (42.5, 25), (42.5, 16))
    arrow(axes, (19, 11.5), (35, 25.5))
    arrow(axes, (19, 9), (35, 9))
    say(axes, 27, 5.2, "X again: from the L2 cache\nwhere modules fit there", 8)
    step(axes, 56, 14.5, 21, 12, GREY, "$C = Z^T Z + R^T R$\n$K = Y^T Y$\n\nl x l, float64")
    arrow(axes, (50, 30), (57, 26.5))
    arrow(axes, (50, 11), (57, 14.5))
    block(axes, 64, 30.5, 3.5, 9, BLUE)
    say(axes, 69, 35, "new B = Y T V", 8.5, "left")
    arrow(axes, (66, 26.5), (66, 30.5))
    say(axes, 66, 9.5, "T V: eigenvectors of\n$Y C^+ Y^T$ in that basis", 8)
    return figure


def jacobian_covariance() -> Figure:
    """The route through inner products of tokens, for one example of one module with a wide input."""
    figure, axes = canvas(82, 40)
    block(axes, 3, 22, 19, 9, ORANGE, "a: T tokens x width")
    say(axes, 12.5, 33.2, "read once, whatever C is", 8)
    block(axes, 3, 5, 7, 9, BLUE, "g")
    say(axes, 6.5, 16.3, "C outputs,\nT x rank", 8)
    step(axes, 14, 5, 15, 9, GREY, "in its eigenbasis:\n$Q_n$, and the rest")
    arrow(axes, (10, 9.5), (14, 9.5))
    step(axes, 29, 19, 20, 15, GREEN, "for all C at once:\n$K = a\\,a^T$, T x T, lower half\n$B = a\\,Q$, T x k")
    arrow(axes, (22, 26.5), (29, 26.5))
    step(
        axes,
        55,
        14,
        24,
        15,
        GREEN,
        "$P_c = g_c^T B$: kept\n$g_c^T K g_{c'} - P_c P_{c'}^T$: the rest\neach over its precision",
    )
    arrow(axes, (49, 26.5), (55, 23))
    arrow(axes, (29, 9.5), (55, 17.5))
    say(axes, 67, 35.5, "covariance, C x C:\nno Jacobian is formed")
    arrow(axes, (67, 29), (67, 33))
    step(axes, 47, 2, 32, 7.5, GREY, "where the difference cancels:\n$K = (a - BQ^T)(a - BQ^T)^T$, and again")
    arrow(axes, (70, 14), (70, 9.5))
    arrow(axes, (63, 9.5), (63, 14))
    return figure


def vocabulary() -> Figure:
    """Products of the vocabulary's weight and all samples, through bounded scratch."""
    figure, axes = canvas(82, 42)
    block(axes, 3, 5, 10, 22.8, GREY)
    block(axes, 3, 16.4, 10, 3.8, ORANGE)
    say(axes, 8, 29.5, "W: V x d", 8.5)
    say(axes, 8, 2.5, "read from memory once\nfor a group of columns", 8)
    for i in range(6):
        block(axes, 20 + i * 3.2, 29, 3.2, 8, BLUE if i < 4 else GREY)
    say(axes, 29.6, 39, "samples of all examples side by side: d x (N S)", 8.5)
    for i in range(6):
        for j in range(6):
            color = GREEN if j == 3 and i < 4 else "white"
            block(axes, 20 + i * 3.2, 5 + j * 3.8, 3.2, 3.8, color)
    arrow(axes, (13, 18.3), (20, 18.3))
    say(axes, 29.6, 2.5, "all columns of a group, then the next tokens", 8)
    step(axes, 45, 15, 13, 12, GREY, "scratch\nof bounded size:\nsome V x some S")
    arrow(axes, (39.2, 18.3), (45, 19.5))
    step(axes, 62, 24, 17, 10, GREEN, "1: bias, cap,\nlog-sum-exp of\neach sample")
    step(axes, 62, 7, 17, 11, GREEN, "2: mean over S of\nexp(logit - lse),\nentropy, ...")
    arrow(axes, (58, 23), (62, 28))
    arrow(axes, (58, 19), (62, 13))
    arrow(axes, (70.5, 24), (70.5, 18))
    say(axes, 70.5, 3.5, "N x V, or N numbers", 8)
    say(axes, 60, 38.5, "no N x S x V tensor", 8.5)
    return figure


def main() -> None:
    """Write every figure."""
    for draw in (outer_product, incremental_svd, jacobian_covariance, vocabulary):
        with styled():
            save_figure(draw(), HERE / f"{draw.__name__.replace('_', '-')}.svg")


if __name__ == "__main__":
    main()
