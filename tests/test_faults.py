"""Fits with checkpoints under kill -9; more of them: make test-faults."""

from __future__ import annotations

import faults


def test_kill_minus_nine():
    same, when = faults.kills(2, seed=1)
    assert same == 2, when
