"""The measuring harness: a dry run goes through every case, results can be read, and nothing stops the rest."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.cases import all_cases
from benchmarks.gpu_report import __main__ as command
from benchmarks.gpu_report import end_to_end, kernels, suite, timing
from benchmarks.gpu_report.environment import environment
from benchmarks.gpu_report.plot import draw
from benchmarks.gpu_report.report import Report, each

ROOT = Path(__file__).parents[1]


def dry_run(section: str, folder: Path, *options: str) -> dict:
    arguments = ("--section", section, "--out", str(folder), "--dry-run", *options)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_report", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    content = json.loads((folder / f"{section}.json").read_text())
    bad = [row for row in content["rows"] if row["status"] in ("failed", "red")]
    assert not bad, bad
    assert done.returncode == 0, done.stderr[-2000:]
    with (folder / f"{section}.csv").open(newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == [row["case"] for row in content["rows"]]
    table = (folder / f"{section}.md").read_text()
    assert all(f"| {row['case']} | {row['provider']} | {row['status']} |" in table for row in content["rows"])
    assert all(row["detail"] for row in content["rows"] if row["status"] == "skipped")
    return content


def test_dry_run_of_the_kernels_measures_every_case(tmp_path):
    content = dry_run("kernels", tmp_path)
    cases = all_cases()
    assert {row["case"] for row in content["rows"]} == {case.name for case in cases}
    for case in cases:
        rows = {row["provider"]: row for row in content["rows"] if row["case"] == case.name}
        wanted = {provider.name: provider.absent for provider in case.providers(torch.device("cpu"))}
        assert rows.keys() == wanted.keys()
        for name, absent in wanted.items():
            if absent is None and wanted["reference"] is None:
                assert rows[name]["status"] == "measured", rows[name]
                assert rows[name]["values"]["us"] > 0
    assert (tmp_path / "kernels.png").stat().st_size > 1000
    (tmp_path / "kernels.png").unlink()
    assert draw(Report.read(tmp_path, "kernels")) == "kernels.png"


def test_dry_run_of_a_prediction(tmp_path):
    content = dry_run("end_to_end", tmp_path, "--only", "predict 1B$")
    assert {row["provider"] for row in content["rows"]} == {"plain", "triton", "reference"}
    (ours,) = (row for row in content["rows"] if row["provider"] == "reference")
    assert ours["values"]["times_plain"] > 0


@pytest.mark.slow
def test_dry_run_of_the_whole_end_to_end(tmp_path):
    content = dry_run("end_to_end", tmp_path)
    assert {row["case"] for row in content["rows"]} == {setting.name for setting in end_to_end.SETTINGS}


@pytest.mark.slow
def test_dry_run_of_the_tests_section_collects_them(tmp_path):
    content = dry_run("tests", tmp_path)
    assert {row["case"] for row in content["rows"]} == suite.steps(torch.device("cpu"), True).keys()
    assert (tmp_path / "tests.log").exists()


def test_work_is_what_the_floors_were_counted_from():
    """At the rates of the H100 of the targets: 3.0 TB/s and 798 TFLOP/s."""
    floors = [(case, case.floor_us) for case in all_cases() if case.floor_us is not None]
    assert len(floors) >= 8
    for case, floor in floors:
        assert 1e6 * case.work().floor(3.0e12, 798e12) == pytest.approx(floor, rel=0.2), case.name


def test_names_of_cases_are_unique():
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)


def test_a_failure_is_a_row_and_the_rest_goes_on(tmp_path):
    report = Report(tmp_path, "kernels", until=time.time() + 60)

    def run(name):
        with report.attempt(name, "triton"):
            if name == "second":
                raise ValueError("a message to be found")
            report.add(name, "triton", "measured", us=1.5)

    each(report, ["first", "second", "third"], run)
    assert [row.status for row in report.rows] == ["measured", "failed", "measured"]
    assert "a message to be found" in report.rows[1].detail
    again = Report.read(tmp_path, "kernels")
    assert again.rows == report.rows
    assert again.running is None


def test_what_does_not_fit_is_skipped_and_said(tmp_path):
    report = Report(tmp_path, "kernels", until=time.time() - 1)
    each(report, ["one"], lambda name: pytest.fail("ran"))
    assert (report.rows[0].status, report.rows[0].detail) == ("skipped", "the section's time was over")


def test_a_process_brought_down_is_started_again_without_that_provider(tmp_path, monkeypatch):
    starts = []

    def process(*arguments, **options):
        report = Report.read(tmp_path, "kernels", time.time() + 60)
        starts.append(report.excluded)
        if len(starts) == 1:
            report.add("done", "triton", "measured")
            report.add("case", "reference", "measured")
            report.running = ["case", "triton", "illegal memory access"]
            report.write()
            return SimpleNamespace(returncode=75)
        assert report.done("done")
        assert not report.done("case")
        report.add("case", "triton", "failed", report.why_excluded("case", "triton"))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(command.subprocess, "run", process)
    arguments = SimpleNamespace(seconds=60.0, out=tmp_path, section="kernels")
    report = command.supervise(arguments)
    assert len(starts) == 2
    assert [(row.case, row.status) for row in report.rows] == [("done", "measured"), ("case", "failed")]
    assert "illegal memory access; the process ended with code 75" in report.rows[1].detail


def test_times_are_of_calls_in_turns():
    order = []

    def call(name, seconds):
        def run(which):
            order.append((name, which))
            time.sleep(seconds)

        return run

    watch = timing.Stopwatch(torch.device("cpu"))
    calls = {"quick": call("quick", 0.001), "slow": call("slow", 0.02)}
    samples = timing.interleaved(watch, calls, [0, 1, 2], seconds=10.0, rounds=4)
    assert order[4:] == [(name, turn % 3) for turn in range(4) for name in calls]
    quick, slow = (samples[name].values() for name in calls)
    assert quick["launches"] == slow["launches"] == 4
    assert 1000 <= quick["us_p20"] <= quick["us"] <= quick["us_p80"]
    assert slow["us"] >= 20000
    assert samples["slow"].values(share=0.5)["us"] == pytest.approx(2 * slow["us"])


class StandInEvent:
    """Two milliseconds between any two; the device comes to it where it was kept busy for less than `needed`."""

    needed, busy = 0.0, 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    synchronize = record

    def query(self):
        return self.busy < self.needed

    def elapsed_time(self, other):
        return 2.0


def test_a_call_whose_launches_the_device_waited_for_is_seen(monkeypatch):
    """A stand-in of a host that takes so long that the device, kept busy for a while, begins before all is issued."""
    pace = 1e7 / 0.002  # what `_cycles_per_second` finds by the stand-in's two milliseconds

    def sleep(cycles):
        StandInEvent.busy = cycles / pace

    for name, value in {"Event": StandInEvent, "_sleep": sleep, "synchronize": lambda device=None: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    watch = timing.Stopwatch(torch.device("cuda"))
    late = {}
    for needed in (0.0, 2 * 1e-4, 2 * timing.LONGEST):
        monkeypatch.setattr(StandInEvent, "needed", needed)
        samples = timing.interleaved(watch, {"one": lambda _: None}, [0], seconds=1.0, rounds=6)["one"]
        assert len(samples.device) == 6
        late[needed] = samples.values()["late"]
    assert list(late.values()) == [0, 0, 6]  # more time helps, where more time can


def test_what_only_a_gpu_runs_runs_on_a_stand_in(monkeypatch):
    """The branches of timing for a CUDA device, with torch.cuda's answers made up."""
    slept, properties = [], SimpleNamespace(L2_cache_size=50_000_000, multi_processor_count=132)
    made_up = {
        "Event": StandInEvent,
        "_sleep": slept.append,
        "synchronize": lambda device=None: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 350,
        "get_device_properties": lambda device: properties,
        "get_device_name": lambda device: "a stand-in",
    }
    for name, value in made_up.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)
    device = torch.device("cuda")
    watch = timing.Stopwatch(device)
    calls = []
    samples = timing.interleaved(watch, {"one": calls.append}, [0, 1], seconds=1.0, rounds=7)
    assert samples["one"].values()["us"] == pytest.approx(2000)
    assert len(samples["one"].device) == 7
    assert len(samples["one"].host) == timing.HOST_ROUNDS
    assert len(calls) == 2 + 7 + timing.HOST_ROUNDS
    assert len(slept) == 3 + 7  # to find its pace, then before every timed call
    assert all(cycles > 0 for cycles in slept)
    assert timing.peak_bytes(lambda: None, device) == 250
    assert kernels._copies(10**8, device) == 3
    assert kernels._copies(10**9, device) == 1
    found = environment(device)
    assert found["device"] == "a stand-in"
    assert found["multiprocessors"] == 132


def test_counts_of_a_pytest_run_that_was_ended():
    output = "tests/test_a.py::test_one PASSED [ 10%]\ntests/test_a.py::test_two FAILED [ 20%]\ntests/test_a.py::test_t"
    assert suite.counts(output) == {"passed": 1, "failed": 1}
    workers = "[gw1] [ 3%] PASSED tests/test_a.py::test_one\n[gw0] [ 5%] SKIPPED tests/test_a.py::test_two\n[gw0] [ "
    assert suite.counts(workers) == {"passed": 1, "skipped": 1}
    assert suite.counts("noise\n==== 3 passed, 2 skipped in 1.0s ====") == {"passed": 3, "skipped": 2}


def test_without_a_device_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    arguments = ["--section", "kernels", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_report", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "no CUDA device is present; --dry-run" in done.stderr
