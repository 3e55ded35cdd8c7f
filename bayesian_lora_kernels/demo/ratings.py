"""Rated sentences of four kinds, from the source distribution of vaderSentiment (MIT)."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

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


def read_ratings(path: Path) -> dict[str, list[tuple[str, int]]]:
    """Sentences that are clearly negative (0) or positive (1), each once.

    Args:
        path: of `vaderSentiment-3.3.2.tar.gz`.

    Returns:
        `{kind: [(sentence, label)]}`, in the order of the files.

    Raises:
        RuntimeError: if it is not there, or not that file.
    """
    try:
        with tarfile.open(path) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, INNER))) as inner:
            return {kind: _sentences(_member(inner, name)) for kind, name in FILES.items()}
    except FileNotFoundError:
        raise RuntimeError(f"{path}: no such file; get it with {DOWNLOAD}") from None
    except (OSError, ValueError, tarfile.TarError) as error:
        raise RuntimeError(f"{path}: expected the source distribution of vaderSentiment 3.3.2: {error}") from None


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """The content of the file of this name, whatever folder it is in."""
    for member in archive:
        file = archive.extractfile(member) if Path(member.name).name == name else None
        if file is not None:
            return file.read()
    raise ValueError(f"it holds no {name}")


def _sentences(content: bytes) -> list[tuple[str, int]]:
    found: dict[str, int] = {}
    for line in content.decode("utf-8", "replace").splitlines():
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= CLEAR and SHORTEST <= len(text.split()) <= LONGEST:
            found[text.strip()] = int(float(rating) > 0)
    return list(found.items())
