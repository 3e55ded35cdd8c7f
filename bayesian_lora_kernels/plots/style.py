"""How every picture looks: one palette, one size, and files that are the same whenever they are made again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe, Ito 2008, "Color universal design": told apart by everyone; yellow, faint on a white ground, is left out.
BLUE, VERMILION, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, ORANGE, BLACK = "#56B4E9", "#E69F00", "#000000"
# The same, light, for areas beneath something else.
PALE_BLUE, PALE_VERMILION, PALE_GREEN, PALE_GREY = "#A9CFE6", "#F3BF99", "#8FD1B5", "#E4E4E4"
SURE, UNSURE = "#ffffff", "#f27a54"  # the ends of a scale behind text, dark on all of it
INK, MUTED, GRID = "#222222", "#777777", "#E6E6E6"
COLORS: Final = (BLUE, VERMILION, GREEN, PINK, SKY, ORANGE, BLACK)  # of lines and areas, in this order
DASHES: Final = ("-", (0, (6, 1.5)), (0, (2.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (1, 1)))  # for who sees no colours
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")

WIDTH: Final = 8.3  # inches of a whole README: there a point is 1.4 pixels
SMALL, NORMAL, TITLE = 8.0, 9.0, 10.0  # points; nothing is smaller
STYLE: Final = {
    "figure.facecolor": "white",  # on a dark page too
    "savefig.facecolor": "white",
    "font.size": NORMAL,
    "axes.titlesize": TITLE,
    "axes.labelsize": NORMAL,
    "figure.titlesize": TITLE + 1,
    "figure.titleweight": "bold",
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.prop_cycle": f"cycler(color={list(COLORS)})",
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "mathtext.fontset": "dejavusans",
    "svg.fonttype": "none",  # words stay words
    "svg.hashsalt": "bayesian_lora_kernels",  # names inside a file do not change from one time to the next
}
UNDATED: Final = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


@contextmanager
def styled() -> Iterator[None]:
    """What is drawn inside looks as all pictures here, whatever the user's settings, which come back at the end.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("diagrams need matplotlib: pip install matplotlib") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """A figure of this size in inches."""
    from matplotlib.figure import Figure

    # A Figure of its own, not pyplot's: no window, no backend chosen, nothing kept alive.
    return Figure(figsize=(width, height), layout=layout)


def legend_below(figure: Any, axes: Iterable[Any], columns: int = 4) -> None:
    """One legend under all panels, where it hides nothing; what several of them name alike is there once.

    Args:
        figure: of matplotlib.
        axes: whose labelled artists it names.
        columns: at most.
    """
    handles: dict[str, Any] = {}
    for one in axes:
        handles |= {label: handle for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    if handles:
        rows = -(-len(handles) // columns)
        columns = -(-len(handles) // rows)
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns)


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write a figure, whole or not at all; the suffix of `path` says which format: .png, .svg, .pdf and others.

    The same figure makes the same file, whenever it is written.

    Args:
        figure: of matplotlib.
        path: of the file.
        dpi: pixels per inch, where the format has pixels.

    Raises:
        ValueError: for a suffix that matplotlib does not know.
        OSError: if the folder cannot be written to.
    """
    path = Path(path)
    formats = figure.canvas.get_supported_filetypes()
    suffix = path.suffix[1:].lower()
    if suffix not in formats:
        raise ValueError(f"{path}: expected a suffix among {', '.join(sorted(formats))}, got {path.suffix!r}")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as file, styled():
            figure.savefig(file, format=suffix, dpi=dpi, metadata=UNDATED.get(suffix))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are its owner's alone
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
