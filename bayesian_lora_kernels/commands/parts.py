"""What a command prints, in parts, each of which is its plain text as `str`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Group: TypeAlias = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, names of the columns, rows


@dataclass(frozen=True)
class Table:
    """Cells in columns.

    Attributes:
        rows: of equal length.
        left: how many columns are aligned to the left; the others are to the right.
        header: how many of the rows are titles.
        plain: the plain text, if it is laid out otherwise.
    """

    rows: Sequence[Sequence[str]]
    left: int = 1
    header: int = 1
    plain: str = ""

    def __str__(self) -> str:
        if self.plain:
            return self.plain
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = []
        for row in self.rows:
            cells = [
                cell.ljust(width) if i < self.left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


@dataclass(frozen=True)
class Facts:
    """One `name  value` a line."""

    items: Sequence[tuple[str, str]]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.items)
        return "\n".join(f"{name.ljust(width)}  {value}" for name, value in self.items)


@dataclass(frozen=True)
class Advice:
    """A sentence, and the command that it ends in."""

    text: str
    command: str

    def __str__(self) -> str:
        return f"{self.text}: {self.command}"


@dataclass(frozen=True)
class Groups:
    """Groups of columns side by side, each under a title that may have several lines.

    Attributes:
        first: words on the left, the first row their titles.
        groups: of numbers, of as many rows less the titles.
        header: whether to show titles and names.
    """

    first: Sequence[Sequence[str]]
    groups: Sequence[Group]
    header: bool = True

    def __str__(self) -> str:
        return "\n".join(self.lines()[0 if self.header else self.height :])

    @property
    def height(self) -> int:
        """Lines of the header."""
        return max(title.count("\n") + 1 for title, _, _ in self.groups) + 1

    def lines(self) -> list[str]:
        """With the header."""
        above = self.height - 1
        blocks = [[""] * above + str(Table(self.first, left=len(self.first[0]))).split("\n")]
        for name, names, rows in self.groups:
            title = name.split("\n")
            width = column_width(names)
            block = ["  ".join(cell.rjust(width) for cell in row) for row in (names, *rows)]
            wide = max(map(len, [*title, *block]))
            title = [""] * (above - len(title)) + title
            blocks.append([*(line.center(wide) for line in title), *(line.rjust(wide) for line in block)])
        left = max(map(len, blocks[0]))
        return [" | ".join([head.ljust(left), *rest]).rstrip() for head, *rest in zip(*blocks, strict=True)]


def column_width(names: Sequence[str]) -> int:
    """Of a group of numbers."""
    return max(6, *map(len, names))


Part: TypeAlias = str | Table | Facts | Advice | Groups
