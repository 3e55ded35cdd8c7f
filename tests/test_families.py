"""The table of docs/models.md is not right by accident: planted faults come out as WRONG or FAILED."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import cells
from families.cells import Errors, Measured, Result, Row, measure
from families.recipes import FAMILIES, VARIANTS, Recipe
from families.table import TITLES, Notes, document, first_sentence, table

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.curvature.likelihood import Classification
from bayesian_lora_kernels.predictive.distribution import LogitPosterior
from bayesian_lora_kernels.predictive.vocabulary import VocabularyPosterior

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
GPT2 = next(one for one in FAMILIES if one.name == "GPT-2")  # float64 throughout


def of(recipe: Recipe, *columns: str) -> dict[str, Result]:
    return measure(recipe, {name: cells.COLUMNS[name] for name in columns}).cells


def kinds(found: dict[str, Result]) -> set[str]:
    return {one.kind for one in found.values()}


def test_a_family_without_a_fault():
    found = of(GPT2, *cells.COLUMNS)
    assert kinds(found) == {"right"}
    exact = [one.error for name, one in found.items() if name not in ("bfloat16", "saved")]
    assert all(0 < error < 1e-10 for error in exact)
    assert 1e-4 < found["bfloat16"].error < cells.HALF_TOLERANCE


def scaled(function: Callable[..., Any], part: str = "") -> Callable[..., Any]:
    """The same, with one of the tensors that come back one per cent too large."""

    def off(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return found._replace(**{part: 1.01 * getattr(found, part)}) if isinstance(found, tuple) else 1.01 * found

    return off


def too_wide(predict: Callable[..., LogitPosterior]) -> Callable[..., LogitPosterior]:
    def off(*args: Any, **kwargs: Any) -> LogitPosterior:
        found = predict(*args, **kwargs)
        return replace(found, covariance=1.01 * found.covariance)

    return off


def test_a_covariance_that_is_one_per_cent_too_large(monkeypatch):
    monkeypatch.setattr(blk.LaplaceLoRA, "predict", too_wide(blk.LaplaceLoRA.predict))
    found = of(GPT2, "kfac", "ekfac", "exact")
    assert kinds(found) == {"wrong"}
    assert all(0.009 < one.error < 0.011 and "covariance" in one.text for one in found.values())


def test_a_curvature_that_is_one_per_cent_too_large(monkeypatch):
    """The precision, which the truth of K-FAC and EKFAC takes from the posterior, is checked itself."""
    monkeypatch.setattr(Classification, "exact_columns", scaled(Classification.exact_columns))
    assert kinds(of(GPT2, "kfac", "ekfac", "exact")) == {"wrong"}


@pytest.mark.parametrize("method", ["sample", "covariance"])
def test_a_fault_in_the_vocabulary(method: str, monkeypatch):
    monkeypatch.setattr(VocabularyPosterior, method, scaled(getattr(VocabularyPosterior, method)))
    assert of(GPT2, "vocabulary")["vocabulary"].kind == "wrong"


@pytest.mark.parametrize("part", ["log_prob_map", "log_prob", "entropy", "mutual_information"])
def test_a_fault_in_a_score(part: str, monkeypatch):
    monkeypatch.setattr(blk.LaplaceLoRA, "score", scaled(blk.LaplaceLoRA.score, part))
    assert of(GPT2, "score")["score"].text.startswith(part)


def test_a_fault_after_loading(monkeypatch):
    load = blk.LaplaceLoRA.from_pretrained

    def off(model: Any, folder: str) -> blk.LaplaceLoRA:
        laplace = load(model, folder)
        laplace.prior_precision = 1.01
        return laplace

    monkeypatch.setattr(blk.LaplaceLoRA, "from_pretrained", off)
    assert of(GPT2, "saved")["saved"].kind == "wrong"


def test_an_exception_from_inside_a_model():
    def fault() -> Any:
        raise AttributeError("'NoneType' object has no attribute 'shape'")

    found = of(replace(GPT2, base=fault), "kfac", "score", "bfloat16")
    assert kinds(found) == {"failed"}
    assert found["kfac"].text.startswith("AttributeError: 'NoneType' object has no attribute 'shape' (test_families.py")


def test_a_value_error_that_is_not_the_packages():
    """A model raises it, and the package lets it through: nobody said what to do."""

    def fault(*_: Any) -> None:
        raise ValueError("you have to specify something")

    hooked = replace(GPT2, prepare=lambda model: model.get_base_model().transformer.register_forward_pre_hook(fault))
    assert of(hooked, "kfac")["kfac"].kind == "failed"


def test_a_refusal_is_the_packages_own():
    prompt = next(one for one in VARIANTS if one.name == "prompt tuning")
    found = of(prompt, "kfac")["kfac"]
    assert found.kind == "refused"
    assert "outside nn.Linear" in found.text


def test_nothing_compared_is_not_right():
    def empty(measured: Measured) -> Errors:
        return {}

    assert measure(GPT2, {"kfac": empty}).cells["kfac"].kind == "failed"
    assert measure(GPT2, {"kfac": lambda measured: {"a": 0.0, "b": float("nan")}}).cells["kfac"].kind == "wrong"

    def still(model: Any) -> None:
        """An adapter without effect: no logit depends on A while B is zero."""
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.zero_()

    found = of(replace(GPT2, prepare=still), "kfac")["kfac"]
    assert found.kind == "failed"
    assert "nothing to compare: no logit depends on" in found.text


def test_left_out_layers_are_named():
    row = Row("x", {name: Result("right", 1e-12) for name in TITLES}, ["a.lora_magnitude_vector.default"])
    notes = Notes()
    assert "| x (1) |" in table("family", [row], notes)
    assert "does not cover lora_magnitude_vector" in notes.text()


def test_the_document_says_what_is_wrong():
    results = dict.fromkeys(TITLES, Result("none"))
    results |= {"kfac": Result("wrong", 0.3, "mean is off by 3.0e-01"), "exact": Result("failed", text="KeyError: 3.")}
    results |= {"ekfac": Result("right", 3e-7), "saved": Result("right", 0.0), "bfloat16": Result("right", 0.03)}
    text = document([Row("x", results, [])], [], {"PEFT": "1"})
    assert "| x | **WRONG** (1) | < 1e-5 | **FAILED** (2) | - | - | < 1e-12 | < 10 % |" in text
    assert "\n1. mean is off by 3.0e-01.\n2. KeyError: 3.\n" in text


def test_the_first_sentence_of_an_error():
    names = ", ".join(f"base_model.model.layers.{i}.q_proj.ia3_l.default" for i in range(3))
    text = f"ValueError: outside: {names} and 4 more. Freeze them, or not"
    assert first_sentence(text) == "ValueError: outside: ...q_proj.ia3_l.default and others."
    assert first_sentence("TypeError: one a.b; leave it out") == "TypeError: one a.b."


def test_the_document_is_what_the_tool_writes():
    """Its rows are the recipes, in their order, and none of its cells is a failure; CI measures them anew."""
    text = DOCUMENT.read_text()
    header = f"| {' | '.join(TITLES.values())} |"
    parts = text.split(header)[1:]
    assert len(parts) == 2
    for part, recipes in zip(parts, (FAMILIES, VARIANTS), strict=True):
        rows = [line for line in part.split("\n\n")[0].splitlines() if line.startswith("| ")]
        assert [re.sub(r" \(\d+\)$", "", row.split(" | ")[0][2:]) for row in rows] == [one.name for one in recipes]
        for row in rows:
            shown = [cell.strip() for cell in row.strip("|").split(" | ")[1:]]
            assert len(shown) == len(TITLES)
            assert all(re.fullmatch(r"< 1e-(12|5)|< 10 %|-|refused \(\d+\)", cell) for cell in shown), row
    versions = dict(re.findall(r"(transformers|PEFT|PyTorch) (\S+?)[,;]", text))
    assert text == document([], [], versions).split("## Families")[0] + text[text.index("## Families") :]


def test_columns_of_one_truth_have_one_class():
    cells = {name: Result("right", 1e-15) for name in TITLES} | {"score": Result("right", 1e-7)}
    shown = table("family", [Row("x", cells, [])], Notes()).splitlines()[2]
    assert shown == "| x" + 5 * " | < 1e-5" + " | < 1e-12 | < 10 % |"
