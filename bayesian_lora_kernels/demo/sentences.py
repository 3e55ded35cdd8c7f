"""Sentences of Python's standard library: its docstrings, and the comments between its lines of code."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Absent from some installations, or no prose of one module.
EXCLUDED = frozenset(
    {
        "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "tkinter", "turtledemo",
        "distutils", "ensurepip", "pydoc_data", "encodings", "lib-dynload", "__pycache__", "__phello__",
    }
)  # fmt: skip
FEWEST_WORDS, MOST_WORDS = 5, 40

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n\s*\n")
_WORD = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]")
_NAME_PARTS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_")

Sentence = tuple[str, ...]
Document = list[Sentence]  # the sentences of one docstring or one comment


@dataclass
class Module:
    """The text of one top-level module or package of the standard library."""

    name: str
    docstrings: list[Document] = field(default_factory=list)
    comments: list[Document] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many sentences there are."""
        return sum(map(len, self.docstrings)) + sum(map(len, self.comments))


def read_standard_library(
    only: Iterable[str] | None = None, watch: Callable[[Sequence[Path]], Iterable[Path]] = iter
) -> dict[str, Module]:
    """Every sentence of 5 to 40 words, each once, in the order of the files' names.

    A module's own name is taken out of its sentences. Words are in lower case, identifiers split into their parts,
    digits and punctuation are words of their own.

    Args:
        only: names of the modules to read; None: all.
        watch: wraps the list of files, for a progress bar.

    Returns:
        `{name: Module}`, by name.

    Raises:
        RuntimeError: if this Python comes without the sources of its standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    wanted = None if only is None else frozenset(only)
    files = [path for path in _source_files(root) if wanted is None or _module_name(root, path) in wanted]
    modules: dict[str, Module] = {}
    seen: set[Sentence] = set()
    for path in watch(files):
        source = path.read_text(encoding="utf-8", errors="replace")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # a file for another version of Python
            continue
        name = _module_name(root, path)
        module = modules.setdefault(name, Module(name))
        for texts, documents in (
            (_docstrings(tree), module.docstrings),
            (_comments(source, tree), module.comments),
        ):
            for text in texts:
                document = _new_sentences(text, name, seen)
                if document:
                    documents.append(document)
    if not modules:
        raise RuntimeError(f"expected Python's standard library with its sources in {root}, found none")
    return dict(sorted(modules.items()))


def words(text: str) -> list[str]:
    """Lower-case words of a text, identifiers in their parts, digits and punctuation by themselves."""
    return _WORD.findall(_NAME_PARTS.sub(" ", text).lower())


def _source_files(root: Path) -> list[Path]:
    def excluded(path: Path) -> bool:
        return any(p in EXCLUDED or p.startswith("config-") for p in path.relative_to(root).parts)

    return sorted((path for path in root.rglob("*.py") if not excluded(path)), key=lambda p: p.relative_to(root).parts)


def _module_name(root: Path, path: Path) -> str:
    return path.relative_to(root).parts[0].removesuffix(".py")


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def _comments(source: str, tree: ast.Module) -> Iterator[str]:
    """Comments that have a line to themselves; neighbouring lines belong together."""
    inside: set[int] = set()  # lines within a string
    for node in ast.walk(tree):
        if isinstance(node, (ast.Constant, ast.JoinedStr)) and node.end_lineno is not None:
            inside.update(range(node.lineno, node.end_lineno + 1))
    block: list[str] = []
    for number, line in enumerate(source.splitlines(), start=1):
        stripped = line.strip()
        if stripped.startswith("#") and number not in inside:
            block.append(stripped.lstrip("#!: "))
        elif block:
            yield "\n".join(block)
            block = []
    if block:
        yield "\n".join(block)


def _new_sentences(text: str, module: str, seen: set[Sentence]) -> Document:
    result = []
    for part in _SENTENCE_END.split(text):
        if ">>>" in part:
            continue
        sentence = tuple(word for word in words(part) if word != module)
        count = sum(word.isalpha() for word in sentence)
        if FEWEST_WORDS <= count <= MOST_WORDS and sentence not in seen:
            seen.add(sentence)
            result.append(sentence)
    return result
