"""`benchmarks.loops`, `benchmarks.host_time` and `benchmarks.stream_columns`: that they say what is the case."""

from __future__ import annotations

import pytest
import torch

from benchmarks import stream_columns
from benchmarks.roofline.sass import Loop


def test_innermost_loops():
    from benchmarks.loops import innermost

    loops = (Loop(0, 9, (Loop(2, 3), Loop(4, 8, (Loop(5, 6),)))), Loop(10, 11))
    assert [(one.first, one.last) for one in innermost(loops)] == [(2, 3), (5, 6), (10, 11)]


def test_widths_of_loads_and_stores():
    from benchmarks.loops import widths

    names = ["LDG.E.128", "LDG.E.128.CONSTANT", "LDG.E", "LDG.E.U16", "STG.E.64", "LDS.128", "IMAD"]
    assert widths([(name, "") for name in names]) == "2 LDG.128 1 LDG.32 1 LDG.U16 1 STG.64"


@pytest.mark.interpret
def test_host_time_launches_nothing(monkeypatch, capsys):
    pytest.importorskip("triton")
    from benchmarks import host_time

    monkeypatch.setattr(host_time, "MODULES", 3)
    monkeypatch.setattr(host_time, "REPEATS", 1)
    out = torch.full((8, 8), float("nan"))
    with host_time.without_kernels():
        host_time.ops.outer_product(torch.ones(4, 8), out=out, impl="triton")
    assert out.isnan().all()
    host_time.main()
    rows = capsys.readouterr().out.strip().split("\n")[2:]
    assert len(rows) == 8
    assert all(0 < float(row.split("|")[2]) <= float(row.split("|")[3]) for row in rows)


@pytest.mark.parametrize("kind", ["1/i", "drift", "massive activations"])
def test_a_stream_is_within_a_tenth_of_the_best(kind, monkeypatch):
    for name, value in {"WIDTH": 96, "ROWS": 128, "BATCHES": 4, "RANK": 6}.items():
        monkeypatch.setattr(stream_columns, name, value)
    assert 1 - 1e-9 <= stream_columns.excess(kind, 22, 0) < 1.1
