"""Checkpoints of a group: a process is killed, the others fail, and the same fit goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense import relative
from interrupted import case, differences, laplace
from ranks import resumed
from ranks.start import run
from torch import Tensor


def fits(tmp_path: Path, name: str, size: int, *arguments: Any, timeout: float = 60.0) -> list[Any]:
    folder = tmp_path / name
    folder.mkdir()
    return run(resumed.fit, size, folder, *arguments, timeout=timeout)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """What does not depend on the choice of eigenvectors: factors, and the curvature itself."""
    for name in expected:
        layer, _, key = name.rpartition(".")
        if key in ("a", "s"):
            assert relative(found[name], expected[name]) < 1e-10, name
        if key == "kept":
            assert relative(dense(found, layer), dense(expected, layer)) < 1e-10, name


def dense(tensors: dict[str, Tensor], layer: str) -> Tensor:
    """The part of a layer's curvature in the span of its bases."""
    s, a, values = (tensors[f"{layer}.{key}"] for key in ("basis_s", "basis_a", "kept"))
    basis = torch.kron(s, a)
    return basis @ (values.reshape(-1, 1) * basis.mT)


def test_a_checkpoint_stands_until_all_processes_have_their_result(tmp_path):
    expected = fits(tmp_path, "whole", 2, "kfac, low-rank", "turns", None, {})
    (tmp_path / "failed").mkdir()
    found = run(resumed.fails_at_the_end, 2, tmp_path / "failed", tmp_path / "kept")
    assert found == ["rank 1 of the group failed: RuntimeError: planted", "planted"]
    assert len([*(tmp_path / "kept").glob("0/rank-*-of-2/*.json")]) == 2
    found = fits(tmp_path, "again", 2, "kfac, low-rank", "turns", tmp_path / "kept", {})
    for own, other in zip(found, expected, strict=True):
        assert differences(own, other) == []


@pytest.mark.parametrize(("setting", "before"), [("kfac, low-rank", 1), ("ekfac", 3)])
def test_a_killed_process_and_the_same_group_again(setting, before, tmp_path):
    """One process is at another place than the other: also in another pass."""
    expected = fits(tmp_path, "whole", 2, setting, "turns", None, {})
    stops = {1: before}
    killed = fits(tmp_path, "killed", 2, setting, "turns", tmp_path / "kept", stops, timeout=6)
    assert killed[1] is None
    assert "rank 1 of the group did not come" in killed[0]
    assert {path.name for path in (tmp_path / "kept" / "0").iterdir()} == {"rank-0-of-2", "rank-1-of-2"}
    found = fits(tmp_path, "again", 2, setting, "turns", tmp_path / "kept", {})
    for own, other in zip(found, expected, strict=True):
        assert differences(own, other) == []
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "sizes", "stops"),
    [
        ("kfac, exact Fisher", (2, 3), {1: 1}),
        pytest.param("kfac, exact Fisher", (2, 1), {0: 1}, marks=pytest.mark.slow),
        pytest.param("ekfac, exact Fisher", (1, 2), {0: 6}, marks=pytest.mark.slow),
        ("ekfac, exact Fisher", (3, 2), {2: 1}),
    ],
)
def test_another_number_of_processes(setting, sizes, stops, tmp_path):
    """Every example counts once, in whatever batch it comes."""
    (expected,) = fits(tmp_path, "whole", 1, setting, "turns", None, {})
    fits(tmp_path, "killed", sizes[0], setting, "turns", tmp_path / "kept", stops, timeout=6)
    found = fits(tmp_path, "again", sizes[1], setting, "turns", tmp_path / "kept", {})
    for one in found:
        assert one["n_examples"] == expected["n_examples"] == 8
        assert float(one["log_likelihood"]) == pytest.approx(float(expected["log_likelihood"]), rel=1e-12)
        compare(one, expected)
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.slow
def test_killed_while_it_takes_over_and_afterwards(tmp_path):
    """Before anything of the new processes is written, and when they have gone on."""
    setting, kept = "ekfac, exact Fisher", tmp_path / "kept"
    (expected,) = fits(tmp_path, "whole", 1, setting, "turns", None, {})
    fits(tmp_path, "two", 2, setting, "turns", kept, {0: 1}, timeout=6)
    before = {path: path.read_bytes() for path in (kept / "0").rglob("*.safetensors")}
    fits(tmp_path, "three", 3, setting, "turns", kept, {2: 0}, timeout=6)  # as it reads which examples it has
    assert {path: path.read_bytes() for path in (kept / "0").rglob("*.safetensors")} == before
    fits(tmp_path, "three again", 3, setting, "turns", kept, {1: 2}, timeout=6)  # in the pass
    assert {path.parent.parent.name for path in kept.rglob("checkpoint.json")} == {"1"}
    fits(tmp_path, "and again", 3, setting, "turns", kept, {0: 2}, timeout=6)
    found = fits(tmp_path, "two again", 2, setting, "turns", kept, {})
    for one in found:
        assert one["n_examples"] == 8
        compare(one, expected)
    assert list(kept.iterdir()) == []


def test_other_data_than_what_was_counted(tmp_path):
    setting, kept = "kfac, exact Fisher", tmp_path / "kept"
    fits(tmp_path, "two", 2, setting, "turns", kept, {0: 1}, timeout=6)
    one = case()
    with pytest.raises(ValueError, match="checkpoint of 2 processes has counted examples that no loader has now"):
        laplace(one, setting).fit(one.loader(2)[2:], progress=False, checkpoint=kept)
    with pytest.raises(ValueError, match="expected a loader that can start again, got an iterator"):
        laplace(one, setting).fit(iter(one.loader(2)), progress=False, checkpoint=kept)
    assert {path.name for path in (kept / "0").iterdir()} == {"rank-0-of-2", "rank-1-of-2"}
    laplace(one, setting).fit(one.loader(2), progress=False, checkpoint=kept)
