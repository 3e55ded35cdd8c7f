"""Every code block of the documentation runs, and prints what its page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from pages import PAGES, ROOT, blocks, pictures, run, same

# What cannot run in a test, and why.
NOT_RUN = {
    "README.md": 1,  # stands for a user's own adapter and files
    "docs/bayes-adapt.md": 3,  # in a checkout of BayesAdapt
    "docs/index.md": 1,  # stands for a user's own adapter and files
    "docs/influence.md": 1,  # stands for a user's own adapter and files
    "docs/migrating.md": 1,  # laplace-torch
    "docs/spread-models.md": 1,  # a sharded model
    "docs/tutorials/reward-model.md": 1,  # examples/best_of_n.py, which tests/test_examples.py runs
}
RUNNABLE = [page for page in PAGES if any(block.runs for block in blocks(page.read_text(encoding="utf-8")))]


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", RUNNABLE, ids=_name)
def test_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for shown, found in run(page, tmp_path):
            where = f"{_name(page)}:{shown.line}"
            for before, now in ((shown.printed, found.printed), (shown.code, found.code)):
                assert same(before, now), f"{where}: python -m pages writes it anew\n--- page\n{before}--- now\n{now}"
    finally:
        torch.set_num_threads(threads)
    for picture in pictures(page):
        if page.parent.name in ("tutorials", "howto"):
            assert (tmp_path / picture).stat().st_size > 1000, picture


def test_few_blocks_are_not_run() -> None:
    skipped = {_name(page): sum(not block.runs for block in blocks(page.read_text(encoding="utf-8"))) for page in PAGES}
    assert {name: count for name, count in skipped.items() if count} == NOT_RUN


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    """Files, folders and headings, as GitHub finds them; external ones by their form."""
    pages = [
        *PAGES,
        *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "examples/README.md")),
    ]
    seen = 0
    for page in pages:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
            seen += 1
            if "://" in target:
                assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/\S*)?", target), f"{_name(page)}: {target}"
                continue
            file, _, heading = target.partition("#")
            found = page.parent / file if file else page
            assert found.exists(), f"{_name(page)}: {target}"
            assert not heading or heading in _anchors(found), f"{_name(page)}: {target}"
    assert seen > 100


def test_equations_have_a_number_and_a_function() -> None:
    """The function's name follows, before the next equation; that it exists is nitpicky Sphinx's affair."""
    numbers = []
    for page in PAGES:
        _, *displayed = re.split(r"^ *\$\$\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for text in displayed:
            equation, end, after = text.partition("$$ (eq:")
            numbers.append(after.partition(")")[0])
            assert end, f"{_name(page)}: no number\n{equation}"
            assert "{py:" in after, f"{_name(page)}: no function\n{equation}"
    assert len(numbers) == len(set(numbers)) > 20


@pytest.mark.parametrize(
    ("shown", "printed", "equal"),
    [
        ("a 1.00 and 2,000\n", "a 1.05 and 2,010\n", True),
        ("a 1.00\n", "a 1.50\n", False),
        ("a 1.00\n", "b 1.00\n", False),
        ("a 1.00\nb\n", "a 1.00\n", False),
        ("time 1.3 s\n", "time 41.0 s\n", True),
        ("x    -0.01 y\n", "x  0.01 y\n", True),
        ("x 1.0e-05\n", "x 0.02\n", True),
        ("", "a\n", False),
    ],
)
def test_what_counts_as_the_same(shown: str, printed: str, equal: bool) -> None:
    assert same(shown, printed) is equal


def test_blocks_of_a_page() -> None:
    text = "a\n\n```python\nx = 1\n```\n\n```text\n1\n```\n\n```console no-run\n$ blk\n```\n<!-- setup\ny = 2\n-->\n"
    found = [(one.language, one.code, one.printed, one.runs, one.line) for one in blocks(text)]
    assert found == [
        ("python", "x = 1\n", "1\n", True, 3),
        ("console", "$ blk\n", "", False, 11),
        ("setup", "y = 2\n", "", True, 14),
    ]
