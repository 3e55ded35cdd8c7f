"""Rated sentences of four kinds, from the source distribution of vaderSentiment (MIT)."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import NamedTuple

FILES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
LABELS = ("negative", "positive")
FILE = "vaderSentiment-3.3.2.tar.gz"
DOWNLOAD = "pip download --no-deps --no-binary :all: --no-build-isolation vaderSentiment==3.3.2"
INNER = "hutto_ICWSM_2014.tar.gz"
CLEAR = 0.8  # of mean ratings from -4 to 4: what is closer to 0 is left out
SHORTEST, LONGEST = 4, 60  # words


class Row(NamedTuple):
    """A line of a file: its number, of documents with the sentence's (`3_12`); mean rating from -4 to 4; text."""

    number: str
    rating: float
    text: str


def read_rows(path: Path) -> dict[str, list[Row]]:
    """All that the files hold.

    Args:
        path: of `vaderSentiment-3.3.2.tar.gz`.

    Returns:
        `{kind: rows}`, in the order of the files.

    Raises:
        RuntimeError: if it is not there, or not that file.
    """
    try:
        with tarfile.open(path) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, INNER))) as inner:
            return {kind: _rows(_member(inner, name)) for kind, name in FILES.items()}
    except FileNotFoundError:
        raise RuntimeError(f"{path}: no such file; get it with {DOWNLOAD}") from None
    except (OSError, ValueError, tarfile.TarError) as error:
        raise RuntimeError(f"{path}: expected the source distribution of vaderSentiment 3.3.2: {error}") from None


def read_ratings(path: Path) -> dict[str, list[tuple[str, int]]]:
    """Sentences that are clearly negative (0) or positive (1), each once.

    Args:
        path: of `vaderSentiment-3.3.2.tar.gz`.

    Returns:
        `{kind: [(sentence, label)]}`, in the order of the files.

    Raises:
        RuntimeError: if it is not there, or not that file.
    """
    return {kind: _sentences(rows) for kind, rows in read_rows(path).items()}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """The content of the file of this name, whatever folder it is in."""
    for member in archive:
        file = archive.extractfile(member) if Path(member.name).name == name else None
        if file is not None:
            return file.read()
    raise ValueError(f"it holds no {name}")


def _rows(content: bytes) -> list[Row]:
    split = (line.split("\t", 2) for line in content.decode("utf-8", "replace").splitlines())
    return [Row(number, float(rating), text.strip()) for number, rating, text in split]


def _sentences(rows: list[Row]) -> list[tuple[str, int]]:
    found: dict[str, int] = {}
    for row in rows:
        if abs(row.rating) >= CLEAR and SHORTEST <= len(row.text.split()) <= LONGEST:
            found[row.text] = int(row.rating > 0)
    return list(found.items())
