"""What fits and predictions launch on a GPU, and where they wait for it: counted on the meta device."""

from __future__ import annotations

import pytest

from benchmarks.passes import passes

KINDS = ("K-FAC", "EKFAC", "exact")
# Before rows of many layers were taken together, 2,247 and 16,176 for 448 matrices (benchmarks/results/passes.md).
AT_MOST = {"exact, once": 20, "exact, prediction": 130}


@pytest.fixture(scope="module")
def counted():
    return [passes(layers, kinds=KINDS) for layers in (2, 4)]


def test_launches_do_not_grow_with_the_number_of_modules(counted):
    shallow, deep = counted
    assert len(deep) == 4 * len(KINDS)
    for stretch, seen in deep.items():
        assert seen.launches == shallow[stretch].launches, stretch
        assert seen.launches.total() <= AT_MOST.get(stretch, 200), stretch


def test_a_batch_is_waited_for_once_at_most(counted):
    for stretch, seen in counted[1].items():
        if stretch.endswith("each batch"):
            passes_over_the_data = 2 if stretch.startswith("EKFAC") else 1
            assert seen.waits.total() <= passes_over_the_data, (stretch, seen.waits)


def test_a_prediction_is_waited_for_once(counted):
    for stretch, seen in counted[1].items():
        if stretch.endswith("prediction"):
            assert seen.waits.total() == 1, (stretch, seen.waits)


def test_a_new_prior_is_sent_once(counted):
    for stretch, seen in counted[1].items():
        if stretch.endswith("a new prior"):
            assert seen.waits.total() <= 2, (stretch, seen.waits)
