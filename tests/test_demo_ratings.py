"""Rated sentences of the file that vaderSentiment's source distribution is."""

from __future__ import annotations

import io
import tarfile

import pytest

from bayesian_lora_kernels.demo.ratings import FILES, INNER, read_ratings

LINES = {
    "movies": "1\t-2.5\tA dull film without one idea.\n2\t3\tMoving, and beautifully played.\n3\t0.7\tIt is long, too.",
    "amazon": "1\t2\tToo short\n2\t0.9\tIt works well so far.\n3\t0.9\tIt works well so far.",
    "editorials": "1_1\t-0.8\tThe plan is bad for all.",
    "tweets": "1\t-3\t" + "no " * 61,
}


def archive(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"folder/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def test_clear_sentences_each_once(tmp_path):
    inner = archive({FILES[kind]: text.encode() for kind, text in LINES.items()})
    path = tmp_path / "source.tar.gz"
    path.write_bytes(archive({"setup.py": b"", INNER: inner}))
    assert read_ratings(path) == {
        "movies": [("A dull film without one idea.", 0), ("Moving, and beautifully played.", 1)],
        "amazon": [("It works well so far.", 1)],
        "editorials": [("The plan is bad for all.", 0)],
        "tweets": [],
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file; get it with pip download"),
        (b"no archive", "expected the source distribution of vaderSentiment 3.3.2"),
        (archive({"setup.py": b""}), f"it holds no {INNER}"),
        (archive({INNER: archive({})}), f"it holds no {FILES['movies']}"),
        (archive({INNER: archive({FILES["movies"]: b"a line without tabs"})}), "expected the source distribution"),
    ],
    ids=["none", "no archive", "another archive", "an empty archive", "another file"],
)
def test_other_files_are_refused(tmp_path, content, words):
    path = tmp_path / "source.tar.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RuntimeError, match=words):
        read_ratings(path)
