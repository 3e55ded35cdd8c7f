"""What makes docs/models.md: a fault that is planted is seen, and the document is in the form that it is made in."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families.cells import COLUMNS, Result, Row, cell, measure
from families.recipes import FAMILIES, VARIANTS
from families.table import TITLES, document, first_sentence

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.posterior.posterior import Posterior
from bayesian_lora_kernels.posterior.prior import Prior

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
LLAMA = FAMILIES[0]


def one(column: str, recipe: Any = LLAMA) -> Result:
    return measure(recipe, {column: COLUMNS[column]}).cells[column]


def test_a_right_cell_has_an_error_of_rounding():
    assert LLAMA.name == "Llama"
    found = one("ekfac")
    assert found.kind == "right"
    assert 0 < found.error < 1e-5


@pytest.mark.parametrize("column", ["kfac", "ekfac", "exact", "bfloat16"])
def test_a_covariance_that_is_off_is_wrong(column: str, monkeypatch: pytest.MonkeyPatch):
    predict, factor = blk.LaplaceLoRA.predict, 1.1 if column == "bfloat16" else 1.0001

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = predict(self, *args, **kwargs)
        return replace(found, covariance=factor * found.covariance)

    monkeypatch.setattr(blk.LaplaceLoRA, "predict", scaled)
    found = one(column)
    assert found.kind == "wrong"
    assert "covariance" in found.text


@pytest.mark.parametrize("column", ["vocabulary", "score"])
def test_samples_of_another_prior_are_wrong(column: str, monkeypatch: pytest.MonkeyPatch):
    own = blk.LaplaceLoRA._sampler

    def of_another_prior(self: Any, *args: Any) -> Any:
        sampler = own(self, *args)
        sampler.posterior = Posterior(sampler.posterior.curvature, Prior(1.1 * sampler.posterior.prior.precision))
        return sampler

    monkeypatch.setattr(blk.LaplaceLoRA, "_sampler", of_another_prior)
    assert one(column).kind == "wrong"


def test_an_exception_from_elsewhere_is_a_failure(monkeypatch: pytest.MonkeyPatch):
    for kind in (AttributeError, ValueError):  # raised in this file, which is not the package's

        def broken(*_: Any, kind: type[Exception] = kind, **__: Any) -> Any:
            raise kind("no such thing")

        monkeypatch.setattr(blk.LaplaceLoRA, "predict", broken)
        found = one("exact")
        assert found.kind == "failed"
        assert f"{kind.__name__}: no such thing (test_families.py" in found.text


def test_an_empty_comparison_is_a_failure():
    assert cell(lambda: {}) == Result("failed", text="nothing was compared")
    assert cell(lambda: {"mean": float("nan"), "covariance": 0.0}).kind == "wrong"
    assert cell(lambda: None).kind == "none"


def test_a_refusal_is_quoted():
    recipe = next(recipe for recipe in VARIANTS if recipe.name == "VeRA")
    found = one("kfac", recipe)
    assert found.kind == "refused"
    assert "outside nn.Linear" in first_sentence(found.text)
    right = {name: Result("right", 1e-12) for name in TITLES}
    assert "| Llama" + 6 * " | <1e-10" + " | <5% |" in document([Row("Llama", right, [])], [], {"PEFT": "1"})
    right["score"] = Result("right", 1e-7)  # one cell rounds in float32, so may the others
    assert "| Llama" + 5 * " | <1e-05" + " | <1e-10 | <5% |" in document([Row("Llama", right, [])], [], {"PEFT": "1"})
    bad = dict.fromkeys(TITLES, Result("wrong", 1.0, "mean is off")) | {"score": Result("failed", text="TypeError: x")}
    text = document([Row("Llama", bad, [])], [], {"PEFT": "1"})
    assert "**WRONG** (1)" in text
    assert "**FAILED** (2)" in text
    assert "1. mean is off.\n2. TypeError: x.\n" in text


def test_the_document_has_every_row_and_no_fault():
    text = DOCUMENT.read_text()
    tables, _, notes = text.partition("## Notes\n")
    rows = [line.split(" | ") for line in tables.splitlines() if line.startswith("| ") and line.count("|") == 9]
    names = [row[0].removeprefix("| ") for row in rows]
    expected = ["family", *(one.name for one in FAMILIES), "adapter", *(one.name for one in VARIANTS)]
    assert [re.sub(r" \(\d+\)$", "", name) for name in names] == expected
    cells = [part.removesuffix(" |") for row in rows if row[0] not in ("| family", "| adapter") for part in row[1:]]
    assert {re.sub(r"\d+\)", "n)", part) for part in cells} == {"<1e-10", "<1e-05", "<5%", "-", "refused (n)"}
    quoted = {int(number) for number in re.findall(r"\((\d+)\)", " ".join(map(" ".join, rows)))}
    assert quoted == {int(line.split(".")[0]) for line in notes.strip().splitlines()}
