"""The exact curvature of several processes; `make test-distributed` has more."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import exact
from ranks.start import run

from benchmarks import exact_traffic


def some_checks(group, folder):
    exact.check_gram(group, "uneven", "llama")
    exact.check_posteriors(group, "empty")
    exact.check_samples(group, "uneven")
    exact.check_slices(group)
    exact.check_files(group, Path(folder) / "saved")
    exact.check_wrong_use(group)
    exact.check_failure(group)
    return "equal"


@pytest.mark.parametrize("size", [2, 3])
def test_processes_are_as_one(size, tmp_path):
    (tmp_path / "saved").mkdir()
    assert run(some_checks, size, tmp_path, str(tmp_path)) == ["equal"] * size


def test_traffic_is_as_modelled_whatever_the_number_of_batches(tmp_path):
    one, other = (run(exact_traffic.measured, 2, tmp_path, batches) for batches in (1, 6))
    assert one == other
    for found, modelled in one:
        assert found == pytest.approx(modelled, rel=1e-3)


def test_the_table_of_traffic_is_that_of_the_model():
    document = (Path(exact_traffic.__file__).parents[1] / "docs" / "performance.md").read_text()
    for row in exact_traffic.modelled():
        assert row in document
