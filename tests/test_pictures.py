"""The docs' pictures of committed results, with a made-up file of a GPU's measurements."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks import pictures, soak
from benchmarks.gpu_report.plot import roofline
from benchmarks.gpu_report.report import Report, Row

pytest.importorskip("matplotlib")


def labelled(axes: Any) -> dict[str, Any]:
    handles, names = axes.get_legend_handles_labels()
    return dict(zip(names, handles, strict=True))


def test_speed_and_memory_are_those_of_the_file() -> None:
    content = json.loads((pictures.CPU / "smollm2.json").read_text())
    left, right = pictures.speed_and_memory(content).axes
    names = [text.get_text() for text in left.get_yticklabels()]
    assert names[0] == "training step"
    assert len(names) == len(content["results"])
    bars = {name: (left.patches[i].get_width(), right.patches[i].get_width()) for i, name in enumerate(names)}
    for name, one in content["results"].items():
        drawn = bars[pictures.NAMES.get(name, name)]
        assert drawn == (median(one["seconds"]), one["peak_bytes"] / 2**20)
    texts = dict(zip(names, (text.get_text() for text in left.texts), strict=True))
    assert texts["bayesian_lora: predict"] == f"{median(content['results']['bayesian_lora: predict']['seconds']):.2f} s"
    step = content["results"]["training step"]
    assert left.lines[0].get_xdata()[0] == median(step["seconds"])


ESTIMATED = {
    "outer_product 8x8": {"floor_us": 10.0, "target_us": 15.0, "H100": {"us": 20.0}, "A100": {"us": 50.0}},
    "small_eigh 4": {"floor_us": 1.0, "target_us": None, "H100": {"us": 5.0}, "A100": {"us": 7.0}},
}


def write_measurements(folder: Path, device: str, us: dict[str, float]) -> None:
    rows = [{"case": name, "provider": "triton", "status": "measured", "values": {"us": x}} for name, x in us.items()]
    rows += [{**rows[0], "provider": "addmm", "values": {"us": 1.0}}, {**rows[0], "status": "red", "values": {}}]
    folder.mkdir()
    (folder / "kernels.json").write_text(json.dumps({"environment": {"device": device}, "rows": rows}))


def test_estimates_beside_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    assert pictures.measured_times("H100") == {}
    write_measurements(tmp_path / "a100-2027-01", "NVIDIA A100-SXM4", {"small_eigh 4": 9.0})
    write_measurements(tmp_path / "h100-2027-01", "NVIDIA H100 80GB HBM3", {"small_eigh 4": 99.0})
    write_measurements(tmp_path / "h100-2027-02", "NVIDIA H100 80GB HBM3", {"small_eigh 4": 6.5})
    measured = pictures.measured_times("H100")
    assert measured == {"small_eigh 4": 6.5}
    axes = pictures.kernel_times(ESTIMATED, measured, "H100").axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["small_eigh\n4", "outer_product\n8x8"]
    marks = labelled(axes)
    bars = marks.pop("estimate, ± 30%")
    assert {name: list(zip(mark.get_xdata(), mark.get_ydata(), strict=True)) for name, mark in marks.items()} == {
        "estimate": [(5.0, 0), (20.0, 1)],
        "floor: memory, arithmetic": [(1.0, 0), (10.0, 1)],
        "target": [(15.0, 1)],
        "measured": [(6.5, 0)],
    }
    assert [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars] == [
        pytest.approx((3.5, 6.5)),
        pytest.approx((14.0, 26.0)),
    ]
    assert "1 of 2 cases measured" in axes.get_title()


def test_without_measurements_the_picture_says_so() -> None:
    axes = pictures.kernel_times(ESTIMATED, {}, "A100").axes[0]
    assert "nothing measured yet" in axes.get_title()
    assert set(labelled(axes)) == {"estimate", "estimate, ± 30%"}  # floors and targets are of the H100


def test_the_soak() -> None:
    readings = [{"fits": n, "predictions": 50 * n, "resident": 10**8 + n * 10**5} for n in (1, 3, 5)]
    whole, above = (axes.lines[0] for axes in soak.draw(readings).axes)
    assert list(whole.get_xdata()) == list(above.get_xdata()) == [50, 150, 250]
    assert list(whole.get_ydata()) == pytest.approx([100.1, 100.3, 100.5])
    assert list(above.get_ydata()) == pytest.approx([0.0, 0.2, 0.4])


def test_a_roofline_has_the_rates_of_what_was_measured(tmp_path: Path) -> None:
    report = Report(tmp_path, "kernels", environment={"device": "a GPU"}, until=0.0)
    report.roofs = {"bytes_per_second": 1e12, "operations_per_second": 1e14}
    report.cases = {"small": {"flops": 1e9, "bytes": 1e8}, "large": {"flops": 1e12, "bytes": 1e9}}
    shares = {"matmul_share": 0.5}
    report.rows = [
        Row("small", "triton", "measured", values={"us": 200.0, **shares}),
        Row("large", "triton", "measured", values={"us": 20000.0, **shares}),
        Row("large", "addmm", "red"),
    ]
    (axes,) = roofline(report).axes
    marks = labelled(axes)
    points = list(zip(marks["triton"].get_xdata(), marks["triton"].get_ydata(), strict=True))
    assert points == [pytest.approx((10, 5e12)), pytest.approx((1000, 5e13))]
    roof = marks["roofs of this run"]
    assert (roof.get_xdata()[1], roof.get_ydata()[1]) == pytest.approx((100, 1e14))
    assert set(marks) == {"triton", "roofs of this run"}
    report.rows = report.rows[2:]
    assert roofline(report) is None
