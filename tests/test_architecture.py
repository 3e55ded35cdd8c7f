"""The house is as docs/architecture.md draws it: no module imports one that stands above it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import bayesian_lora_kernels as blk

PACKAGE = Path(blk.__file__).parent
DRAWING = PACKAGE.parent / "docs" / "architecture.md"
# From the ground up; those of one line know nothing of each other.
FLOORS = [
    {"config.py", "surroundings.py", "processes.py"},
    {"ops", "calibration"},
    {"model"},
    {"posterior"},
    {"curvature", "plots"},
    {"predictive"},
    {"verification.py", "memory_estimate.py", "saving.py"},
    {"laplace.py"},
    {"attribution", "crossfitting"},
    {"__init__.py"},
    {"demo", "compat", "integrations"},
    {"commands"},
    {"cli.py"},
]
LATER = {
    ("__init__.py", "bayesian_lora_kernels.compat"),  # `blk.patch`, when it is called
    ("calibration", "bayesian_lora_kernels.plots"),  # `calibration.reliability_diagram`, a name of old
}


def floor_of(part: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if part in floor)


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports when it is read."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only or not isinstance(node, ast.ImportFrom) or node.level:
            continue
        if node.module == "bayesian_lora_kernels":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif node.module and node.module.startswith("bayesian_lora_kernels."):
            yield node.module


def part_of(module: str) -> str:
    name = module.split(".")[1]
    return name if (PACKAGE / name).is_dir() else f"{name}.py" if (PACKAGE / f"{name}.py").exists() else "__init__.py"


def test_no_arrow_points_upwards():
    upward = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0]
        for module in imported(path):
            other = part_of(module)
            if (own, module) in LATER or other == own or floor_of(other) < floor_of(own):
                continue
            upward.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not upward


def test_compat_uses_nothing_private():
    private = []
    for path in sorted((PACKAGE / "compat").glob("*.py")):
        tree = ast.parse(path.read_text())
        own = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bayesian_lora_kernels"):
                private += [f"{path.name}: {alias.name}" for alias in node.names if alias.name.startswith("_")]
            if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr) and node.attr not in own:
                private.append(f"{path.name}: .{node.attr}")
    assert not private


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def test_every_part_is_drawn():
    drawing = DRAWING.read_text().split("```")[1]
    for floor in FLOORS:
        for part in floor - {"__init__.py"}:
            assert part in drawing, part
    files = {
        path.name for part in ("curvature", "posterior", "predictive", "model") for path in (PACKAGE / part).iterdir()
    }
    missing = {name for name in files if name.endswith(".py") and name != "__init__.py" and name not in drawing}
    assert not missing


def test_what_is_drawn_is_there():
    drawing = DRAWING.read_text().split("```")[1]
    there = {path.name for path in PACKAGE.rglob("*.py")}
    assert set(re.findall(r"[a-z_]+\.py", drawing)) <= there
