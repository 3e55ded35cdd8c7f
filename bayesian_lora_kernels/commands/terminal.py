"""What is printed, in colours and in the width of a terminal, by rich; knows where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

from bayesian_lora_kernels.commands import parts

if TYPE_CHECKING:
    from rich.console import Console

GAP = 2  # between columns
# What is good and what is not, in lines of `blk doctor` (a name may stand before), and in its tables.
GOOD, BAD = "green", "bold red"
LINES = {GOOD: r"(?m)^  (?:\w+ +)?(?:pass|can run)\b", BAD: r"(?m)^  (?:\w+ +)?(?:FAIL|cannot run)\b|\bDOES NOT FIT\b"}
STATES = {"agrees": GOOD, "passed": GOOD, "DIFFERS": BAD, "failed": BAD}


def text_of(part: parts.Part, stream: TextIO) -> str | None:
    """A part as the terminal shows it; None where there is none, and for what is plain there, too."""
    console = _console(stream)
    if console is None:
        return None
    with console.capture() as captured:
        for renderable in _renderables(part, console):
            console.print(renderable, soft_wrap=getattr(renderable, "no_wrap", False))
    return "".join(f"{line.rstrip()}\n" for line in captured.get().split("\n")[:-1])


def labelled(label: str, message: str, colour: str, stream: TextIO) -> str | None:
    """`label: message` with the label in colour; None where there is no terminal."""
    console = _console(stream)
    if console is None:
        return None
    from rich.text import Text

    with console.capture() as captured:
        console.print(Text.assemble((label, f"bold {colour}"), f": {message}"), soft_wrap=True, end="")
    return captured.get()


def _console(stream: TextIO) -> Console | None:
    if not stream.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=stream, highlight=False, markup=False, emoji=False)


def _renderables(part: parts.Part, console: Console) -> Iterator[Any]:
    from rich.table import Table
    from rich.text import Text

    if isinstance(part, parts.Facts):
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in part.items:
            grid.add_row(Text(name), Text(value))
        yield grid
    elif isinstance(part, parts.Table):
        yield from (_table(piece, console.width) for piece in _pieces(part, console.width))
    elif isinstance(part, parts.Groups):
        for some in _screens(part, console.width, console.height):
            lines = some.lines()
            if some.header:
                yield Text("\n".join(lines[: some.height]), "bold", no_wrap=True)
            yield Text("\n".join(lines[some.height :]), no_wrap=True)
    elif isinstance(part, parts.Advice):
        yield Text(f"{part.text}:")
        yield Text(f"  {part.command}", "bold", no_wrap=True)
    else:
        text = Text(part)
        for style, pattern in LINES.items():
            text.highlight_regex(pattern, style)
        yield text


def _table(part: parts.Table, width: int) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    titles, rows = part.rows[: part.header], part.rows[part.header :]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for i, (title, wide) in enumerate(zip(zip(*titles, strict=True), _widths(part, width), strict=True)):
        justify: Any = "left" if i < part.left else "right"
        table.add_column(Text("\n".join(title)), justify=justify, width=wide, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, STATES.get(cell, "")) for cell in row))
    return table


def _pieces(part: parts.Table, width: int) -> Iterator[parts.Table]:
    """As it is where its numbers fit; else as many columns of them as do, beside the words, and the others below."""
    least, chosen = _least(part, width), list(range(part.left))
    for i in range(part.left, len(least)):
        if len(chosen) > part.left and sum(least[j] + GAP for j in chosen) + least[i] > width:
            yield replace(part, rows=[[row[j] for j in chosen] for row in part.rows])
            chosen = chosen[: part.left]
        chosen.append(i)
    yield replace(part, rows=[[row[j] for j in chosen] for row in part.rows])


def _least(part: parts.Table, width: int) -> list[int]:
    """How narrow a column may be: titles fold between words, words within a quarter of the width, numbers never."""
    found = []
    for i, column in enumerate(zip(*part.rows, strict=True)):
        title, cells = " ".join(column[: part.header]), column[part.header :]
        widest = max(map(len, cells), default=1)
        found.append(max(*map(len, title.split()), 1, min(widest, width // 4) if i < part.left else widest))
    return found


def _widths(part: parts.Table, width: int) -> list[int]:
    """Of the columns, so that they fit: the widest give way first."""
    widths = [max(map(len, column)) for column in zip(*part.rows, strict=True)]
    for least in (_least(part, width), [1] * len(widths)):
        while sum(widths) + GAP * (len(widths) - 1) > width and any(map(int.__gt__, widths, least)):
            widths[max((i for i, one in enumerate(widths) if one > least[i]), key=widths.__getitem__)] -= 1
    return widths


def _screens(part: parts.Groups, width: int, height: int) -> Iterator[parts.Groups]:
    """As it is where it fits; else groups below each other, of so few rows that each stays together on the screen."""
    bands = list(_bands(part, width))
    if len(bands) == 1:
        yield part
        return
    heading, *rows = part.first
    count = max(height // len(bands) - part.height, 1)
    for start in range(0, len(rows), count):
        some = slice(start, start + count)
        for band in bands:
            groups = [(title, names, numbers[some]) for title, names, numbers in band]
            yield parts.Groups([heading, *rows[some]], groups)


def _bands(part: parts.Groups, width: int) -> Iterator[list[parts.Group]]:
    """Groups that fit beside each other, those that are too wide alone in pieces of their columns."""
    pieces: list[parts.Group] = []
    left = max(map(len, str(parts.Table(part.first, left=len(part.first[0]))).split("\n")))
    for title, names, rows in part.groups:
        most = max((width - left - 1) // (parts.column_width(names) + 2), 1)
        for start in range(0, len(names), most):
            some = slice(start, start + most)
            pieces.append((title, names[some], [row[some] for row in rows]))
    band: list[parts.Group] = []
    for piece in pieces:
        if band and max(map(len, replace(part, groups=[*band, piece]).lines())) > width:
            yield band
            band = []
        band.append(piece)
    yield band
