"""Packages: whose documentation is a sentence from? Shift: comments in the code of the same packages."""

from __future__ import annotations

import ast
import importlib.util
import io
import random
import re
import tokenize
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from torch import nn

from .encoder import TextTask, sequence_classifier
from .task import REQUIREMENTS, Example, MissingPackage, Splits, Training, drawn, shares

PACKAGES = {
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "sympy": "sympy",
}
TRAIN, HELD_OUT, TEST, SHIFT = 240, 100, 400, 300
PER_FILE = 3

# What would give the answer away, and code of others.
NAMES = re.compile(r"\b(numpy|np|scipy|sklearn|scikit|sympy|networkx|nx|matplotlib|mpl|plt|pyplot)\b", re.IGNORECASE)
LEFT_OUT = {"tests", "testing", "externals", "extern", "_externals", "_lib", "_vendored", "conftest.py"}
SENTENCE = re.compile(r"(?<=[.?!])\s+(?=[A-Z])")


class Packages(TextTask):
    """A source file is a document; a few sentences of each are used."""

    name = "packages"
    n_classes = len(PACKAGES)
    training = Training(epochs=10, learning_rate=5e-3)

    @cached_property
    def texts(self) -> tuple[list[Example], list[Example]]:
        """Sentences of docstrings, and comments that are no such sentence; each text once, none of two packages."""
        owners: dict[str, set[int]] = {}
        found: tuple[list[Example], list[Example]] = ([], [])
        for label, (package, distribution) in enumerate(PACKAGES.items()):
            for path, name in _files(package, distribution):
                source = path.read_text(encoding="utf-8", errors="replace")
                for which, read in enumerate((_sentences, _comments)):
                    for text in read(source):
                        owners.setdefault(_plain(text), set()).add(label)
                        found[which].append(Example(text, label, name))
        seen: set[str] = set()
        result: tuple[list[Example], list[Example]] = ([], [])
        for which in (0, 1):
            for example in found[which]:
                plain = _plain(example.content)
                if plain not in seen and len(owners[plain]) == 1:
                    seen.add(plain)
                    result[which].append(example)
        return result

    def make(self, seed: int) -> Splits:
        """As many of each class in every split, as far as there are."""
        rng = random.Random(seed)
        sentences, comments = self.texts
        train, held_out, test, shift = [], [], [], []
        for label in range(self.n_classes):
            own = [sentence for sentence in sentences if sentence.label == label]
            files = shares((sentence.source for sentence in own), (TRAIN, HELD_OUT, TEST), rng)
            for split, part, count in zip((train, held_out, test), files, (TRAIN, HELD_OUT, TEST), strict=True):
                here = [sentence for sentence in own if sentence.source in part]
                split += drawn(here, -(-count // self.n_classes), rng, PER_FILE)
            here = [comment for comment in comments if comment.label == label and comment.source in files[2]]
            shift += drawn(here, -(-SHIFT // self.n_classes), rng, PER_FILE)
        pairs = ((train, TRAIN), (held_out, HELD_OUT), (test, TEST), (shift, SHIFT))
        return Splits(*(drawn(split, count, rng) for split, count in pairs))

    def build(self, seed: int) -> nn.Module:
        return sequence_classifier(self.folder, self.n_classes, seed)


def _files(package: str, distribution: str) -> Iterator[tuple[Path, str]]:
    """Source files of an installed package, without tests and code of others: where it is, and its name."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise MissingPackage(f"{package} is not installed; run: pip install {distribution} (see {REQUIREMENTS})")
    folder = Path(found.submodule_search_locations[0])
    for path in sorted(folder.rglob("*.py")):
        if not LEFT_OUT & set(path.relative_to(folder).parts) and not path.name.startswith("test_"):
            yield path, f"{package}/{path.relative_to(folder).as_posix()}"


def _sentences(source: str) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        for paragraph in (text or "").split("\n\n"):
            for sentence in SENTENCE.split(" ".join(paragraph.split())):
                if sentence[:1].isupper() and sentence.endswith(".") and _is_prose(sentence):
                    yield sentence


def _comments(source: str) -> Iterator[str]:
    """Comments on lines of their own; those on consecutive lines are one."""
    lines: dict[int, str] = {}
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
                lines[token.start[0]] = token.string.lstrip("#:! ").strip()
    except (tokenize.TokenError, SyntaxError):
        return
    block: list[str] = []
    for number in sorted(lines):
        if number - 1 not in lines:
            block = []
        block.append(lines[number])
        if number + 1 not in lines and _is_prose(" ".join(block)):
            yield " ".join(block)


def _is_prose(text: str) -> bool:
    """A sentence of ordinary length and mostly of plain words, which names none of the packages."""
    words = text.split()
    if not 8 <= len(words) <= 18 or NAMES.search(text) or not text.isascii():
        return False
    plain = sum(word.strip("(),.;:'\"").isalpha() for word in words)
    return plain >= 0.85 * len(words) and not any(mark in text for mark in (">>>", "::", "http", "\\", "====", "----"))


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))
