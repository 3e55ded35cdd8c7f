"""Checkpoints of a group: a process is killed, the others fail, and the same fit goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interrupted import differences
from ranks import resumed
from ranks.start import run


def fits(tmp_path: Path, name: str, size: int, *arguments: Any, timeout: float = 60.0) -> list[Any]:
    folder = tmp_path / name
    folder.mkdir()
    return run(resumed.fit, size, folder, *arguments, timeout=timeout)


@pytest.mark.parametrize(("setting", "before"), [("kfac, low-rank", 1), ("ekfac", 3)])
def test_a_killed_process_and_the_same_group_again(setting, before, tmp_path):
    """One process is at another place than the other: also in another pass."""
    expected = fits(tmp_path, "whole", 2, setting, "turns", None, {})
    stops = {1: before}
    killed = fits(tmp_path, "killed", 2, setting, "turns", tmp_path / "kept", stops, timeout=3)
    assert killed[1] is None
    assert "rank 1 of the group did not come" in killed[0]
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"rank-0", "rank-1"}
    found = fits(tmp_path, "again", 2, setting, "turns", tmp_path / "kept", {})
    for own, other in zip(found, expected, strict=True):
        assert differences(own, other) == []
    assert list((tmp_path / "kept").iterdir()) == []
