"""`blk` from the outside: exit codes, what is printed, what is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bayesian_lora_kernels import LaplaceLoRA, cli
from bayesian_lora_kernels.demo.methods import NAMES
from bayesian_lora_kernels.demo.report import COLUMNS, LAST
from bayesian_lora_kernels.demo.run import JSON_NAME, PLOT_NAME, RISK_NAME


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick demo of two runs: its output, folder and the additional JSON file."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("demo")
    arguments = ["demo", "--quick", "--seeds", "2", "--out", str(folder / "out"), "--json", str(folder / "copy.json")]
    result = subprocess.run(
        [sys.executable, "-m", "bayesian_lora_kernels.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, folder


def test_demo_writes_its_files(quick):
    _, folder = quick
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted([JSON_NAME, PLOT_NAME, RISK_NAME])
    for name in (PLOT_NAME, RISK_NAME):
        assert (folder / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "copy.json").read_text() == (folder / "out" / JSON_NAME).read_text()


def test_demo_prints_what_it_writes(quick):
    output, folder = quick
    content = json.loads((folder / "copy.json").read_text())
    assert content["seeds"] == [0, 1]
    for name in ("test", "shift"):
        assert list(content["results"][name]) == list(NAMES)
        for row in content["results"][name].values():
            assert ("ood_auroc" in row) == (name == "test")
            for metric, statistic in row.items():
                assert len(statistic["values"]) == 2
                if metric not in COLUMNS | LAST:
                    continue
                assert f"{statistic['mean']:.3f} ±{statistic['standard_error']:.3f}" in output
    assert "less temperature scaling (lower in)" in output
    assert set(content["differences_to_temperature_scaling"]["shift"]) == {*NAMES} - {"temperature"}
    assert all(len(folds["folds"]) == 2 for folds in content["folds"])
    for sentence in content["conclusions"]:
        assert sentence in output
    assert all(value > 0 for runs in content["chosen"].values() for run in runs for value in run.values())


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["demo", "--seeds", "0"], ["demo", "--seeds", "x"]])
def test_bad_use(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"blk( demo)?: .*; see blk( demo)? --help", line)


def test_paths_are_checked_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bayesian_lora_kernels.demo.run.run_demo", lambda *_, **__: pytest.fail("it began"))
    assert cli.main(["demo", "--quick", "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert f"blk demo: --json {tmp_path}/no/x.json: the folder {tmp_path}/no does not exist" in capsys.readouterr().err


def test_demo_says_which_package_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else object())
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    assert "the demo needs matplotlib: pip install matplotlib" in capsys.readouterr().err


def test_doctor(tmp_path, capsys):
    path = tmp_path / "doctor.json"
    assert cli.main(["doctor", "--json", str(path)]) == 0
    report, output = json.loads(path.read_text()), capsys.readouterr().out
    assert report["ok"]
    assert set(report["implementations"]) == {"reference", "triton", "native"}
    for entry in report["implementations"].values():
        assert entry["available"] or f"cannot run: {entry['reason']}" in output
    assert all(version is None or version in output for version in report["versions"].values())
    assert output.count("pass  ") == len(report["checks"])


def test_doctor_fails_where_the_reference_does(capsys, monkeypatch):
    def broken(self, loader, progress=True):
        raise RuntimeError("out of order")

    monkeypatch.setattr(LaplaceLoRA, "fit", broken)
    assert cli.main(["doctor"]) == 1
    assert "FAIL" in (output := capsys.readouterr().out)
    assert "RuntimeError: out of order" in output


@pytest.fixture
def planted_kernels(monkeypatch, tmp_path):
    """`blk doctor --verify` finds these, and judges them on the CPU."""
    from bayesian_lora_kernels.commands import kernels
    from bayesian_lora_kernels.ops.verify import verifier, worker

    evidence = verifier.Evidence("planted:SUITE", "planted:variants")
    found = [
        verifier.Claim("gram", name, f"planted:{name}", "planted:reference", evidence)
        for name in ("right", "two_calls_differ")
    ]
    monkeypatch.setattr(kernels, "claims", lambda: found)
    monkeypatch.setattr(kernels, "machine_refuses", lambda name: None)
    monkeypatch.setattr(verifier, "ask", worker.answer)
    monkeypatch.setattr(verifier, "_verifiers", {})
    monkeypatch.setenv("BLK_CACHE", str(tmp_path))


@pytest.mark.usefixtures("planted_kernels")
def test_doctor_verifies_kernels(tmp_path, capsys):
    path = tmp_path / "doctor.json"
    assert cli.main(["doctor", "--verify", "--json", str(path)]) == 1
    report, printed = json.loads(path.read_text()), capsys.readouterr().out
    kernels = report["kernels"]
    states = {row["unit"]: row["state"] for row in kernels["units"]}
    assert states == {
        "gram right narrow": "passed",
        "gram right wide": "passed",
        "gram two_calls_differ narrow": "failed",
        "gram two_calls_differ wide": "failed",
    }
    assert not report["ok"]
    assert re.search(r"gram right wide +passed +\d\.\de-\d\d +2e-05 +6 +\d+\.\d", printed)
    assert "gram two_calls_differ wide: 33 x 40: two calls with the same inputs differ" in printed
    (device,) = kernels["devices"]
    kept = json.loads(Path(device["file"]).read_text())
    assert kept["machine"] == device["facts"]
    assert {unit: verdict["state"] for unit, verdict in kept["verdicts"].items()} == states
    assert cli.main(["doctor", "--verify", "right"]) == 0


@pytest.mark.usefixtures("planted_kernels")
@pytest.mark.parametrize(("pattern", "said"), [("nothing of the kind", "that finds a unit"), ("(", "a regular")])
def test_doctor_verifies_only_what_there_is(pattern, said, capsys):
    assert cli.main(["doctor", "--verify", pattern]) == 2
    assert said in capsys.readouterr().err


def test_doctor_needs_a_device_to_verify_on(capsys, monkeypatch):
    from bayesian_lora_kernels.commands import kernels

    monkeypatch.setattr(kernels, "machine_refuses", lambda name: "no CUDA device is present")
    assert cli.main(["doctor", "--verify"]) == 2
    assert "--verify: nothing to verify: no CUDA device is present" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench_times_what_is_right(dtype, tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert cli.main(["bench", "--device", "cpu", "--quick", "--dtype", dtype, "--json", str(path)]) == 0
    rows, output = json.loads(path.read_text())["rows"], capsys.readouterr().out
    assert {row["operation"] for row in rows} >= {"outer_product", "grouped_jacobian_covariance", "small_eigh"}
    for row in rows:
        if row["implementation"] == "reference":
            assert 0 < row["seconds"]["p20"] <= row["seconds"]["median"] <= row["seconds"]["p80"]
        assert row["operation"] in output
        assert row["reason"] is None or row["reason"] in output


def test_bench_shows_no_time_of_what_is_wrong(capsys, monkeypatch):
    from bayesian_lora_kernels.ops.square_sum import reference

    true = reference.grouped_square_sum

    def wrong(out, xs, masks):
        true(out, xs, masks)
        out *= 1.0 if xs[0].dtype == torch.float64 else 1.01

    monkeypatch.setattr(reference, "grouped_square_sum", wrong)
    assert cli.main(["bench", "--device", "cpu", "--quick"]) == 1
    assert "wrong: relative error 1.0e-02" in capsys.readouterr().out
