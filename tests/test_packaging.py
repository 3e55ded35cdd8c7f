"""What is declared is what is tested: constraints-floors.txt has the lowest versions that pyproject.toml allows."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_floors_are_those_of_pyproject() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert dependencies is not None
    floors = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', dependencies[1]))
    assert set(floors) == {"numpy", "peft", "safetensors", "torch", "tqdm", "transformers"}
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints-floors.txt").read_text(), re.MULTILINE))
    assert {name: pins[name].removesuffix(".0") for name in floors} == {
        name: floor.removesuffix(".0") for name, floor in floors.items()
    }
    assert '\nrequires-python = ">=3.10"\n' in project  # and FLOOR_PYTHON in the Makefile
