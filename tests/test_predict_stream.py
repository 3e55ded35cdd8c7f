"""`blk predict` on files of any length: in parts, with results written as they come, and from where it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import test_commands
from test_commands import CHOICES, LABELS, PROMPTS, blk, by_hand, error_of, padded, read_lines, write_data

from bayesian_lora_kernels.commands import output, predict
from bayesian_lora_kernels.plots.logits import REACH

made, place, fitted = test_commands.made, test_commands.place, test_commands.fitted
MANY = [f"{word} {prompt}" for word in ("blue", "red", "tree") for prompt in PROMPTS]


@pytest.fixture
def many(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_data(fitted / "many.jsonl", MANY, LABELS * 3)
    monkeypatch.setattr(predict, "TOGETHER", 7)
    return fitted


def stopped_after(parts: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The next predictions fail after so many parts."""
    original, seen = predict._rows, []

    def rows(*args: Any) -> Any:
        if len(seen) == parts:
            raise error
        seen.append(1)
        return original(*args)

    monkeypatch.setattr(predict, "_rows", rows)


def test_parts_are_the_whole(many: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert blk("predict", "--json", "parts.jsonl", data="many.jsonl") == 0
    in_parts = capsys.readouterr().out
    monkeypatch.setattr(predict, "TOGETHER", 1024)
    assert blk("predict", "--json", "whole.jsonl", data="many.jsonl") == 0
    assert capsys.readouterr().out == in_parts
    for one, other in zip(read_lines("parts.jsonl"), read_lines("whole.jsonl"), strict=True):
        assert (one["line"], one["label"], one["prediction"]) == (other["line"], other["label"], other["prediction"])
        for key in ("map", "laplace", "logit_std"):
            assert one[key] == pytest.approx(other[key], abs=1e-5)
    assert not list(many.glob("*.part*"))


def test_a_picture_of_the_first_lines(made: Path, many: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the means and standard deviations that Python gives, also where a run stopped before it drew."""
    pytest.importorskip("matplotlib")
    truth = by_hand(made).optimize_prior_precision().predict(padded(MANY[:6], "right"), differences=True)
    assert blk("predict", "--json", "whole.jsonl", "--plot", "whole.svg", data="many.jsonl") == 0
    assert f"first 6 of {len(MANY)} lines drawn in whole.svg" in capsys.readouterr().out
    figure = predict.picture(read_lines("whole.jsonl")[:6], CHOICES, "Laplace")
    for i, axes in enumerate(figure.axes[::2]):
        order = truth.mean[i].argsort(descending=True)
        hills = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) > 2]
        assert [(x[0] + x[-1]) / 2 for x in hills] == pytest.approx(truth.mean[i, order].tolist(), abs=1e-4)
        wanted = truth.variance[i, order].sqrt().tolist()
        assert [(x[-1] - x[0]) / 2 / REACH for x in hills] == pytest.approx(wanted, abs=1e-4)
        assert f"{CHOICES[LABELS[i]]} (answer)" in [text.get_text() for text in axes.get_yticklabels()]
        assert axes.get_title("left") == f"line {i + 1}"
    with monkeypatch.context() as stops:
        stopped_after(1, stops, KeyboardInterrupt())
        assert blk("predict", "--json", "p.jsonl", "--plot", "p.svg", data="many.jsonl") == 130
    assert not Path("p.svg").exists()
    assert blk("predict", "--json", "p.jsonl", "--plot", "p.svg", data="many.jsonl") == 0
    assert Path("p.svg").read_bytes() == Path("whole.svg").read_bytes()


def test_a_table_that_nobody_reads_to_its_end(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `| head`: the file is written all the same."""
    given_up = []

    def closed(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(output, "show", closed)
    monkeypatch.setattr(output, "give_up_stdout", lambda: given_up.append(True))
    assert blk("predict", "--json", "all.jsonl", data="many.jsonl") == 0
    assert given_up
    assert len(read_lines("all.jsonl")) == len(MANY)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("full")])
def test_it_goes_on_where_it_stopped(
    many: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    assert blk("predict", "--json", "whole.jsonl", data="many.jsonl") == 0
    with monkeypatch.context() as stops:
        stopped_after(2, stops, error)
        if isinstance(error, KeyboardInterrupt):
            assert blk("predict", "--json", "p.jsonl", data="many.jsonl") == 130
        else:
            with pytest.raises(MemoryError):
                blk("predict", "--json", "p.jsonl", data="many.jsonl")
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not Path("p.jsonl").exists()
    with open("p.jsonl.part", "ab") as file:  # a row of which a part was written
        file.write(b'{"line": 1')
    seen = []
    original = predict._rows
    monkeypatch.setattr(predict, "_rows", lambda job, *rest: (seen.extend(job.examples), original(job, *rest))[1])
    assert blk("predict", "--json", "p.jsonl", data="many.jsonl") == 0
    assert [example.line for example in seen] == list(range(15, len(MANY) + 1))
    assert Path("p.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert not list(many.glob("*.part*"))
    assert f"14 of {len(MANY)} lines are there already" in capsys.readouterr().err


def test_a_part_of_another_run_is_refused(many: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as stops:
        stopped_after(1, stops, KeyboardInterrupt())
        assert blk("predict", "--json", "p.jsonl", data="many.jsonl") == 130
    kept = Path("p.jsonl.part").read_bytes()
    capsys.readouterr()
    assert "left by a run with other options; remove it" in error_of(
        capsys, "predict", "--json", "p.jsonl", "--method", "probit", data="many.jsonl"
    )
    assert "with other data;" in error_of(capsys, "predict", "--json", "p.jsonl")
    Path("p.jsonl.part").write_text("what is this\n")
    assert "with other data, options, posterior;" in error_of(capsys, "predict", "--json", "p.jsonl", data="many.jsonl")
    assert kept.count(b"\n") == 8


def test_a_run_that_fails_before_its_first_result_leaves_nothing(many: Path, capsys: Any) -> None:
    (file,) = Path("adapter").glob("laplace-*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert "damaged" in error_of(capsys, "predict", "--json", "p.jsonl", data="many.jsonl")
    assert not list(many.glob("p.jsonl*"))


def test_a_broken_line_is_found_before_anything_is_written(many: Path, capsys: Any) -> None:
    with open("many.jsonl", "a") as file:
        file.write("not JSON\n")
    message = error_of(capsys, "predict", "--json", "p.jsonl", data="many.jsonl")
    assert f"many.jsonl:{len(MANY) + 1}: not JSON" in message
    assert not list(many.glob("p.jsonl*"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_killed_and_in_bounded_memory(fitted: Path) -> None:
    """kill -9 in mid-run; the file has four times the bytes that the process may take beyond its beginning."""
    lines = [json.dumps({"prompt": prompt, "note": "x" * 400_000}) for prompt in PROMPTS]
    with open("long.jsonl", "w") as file:
        for _ in range(30):
            file.write("\n".join(lines) + "\n")
    size = Path("long.jsonl").stat().st_size
    code = (
        "import resource, sys\n"
        "from bayesian_lora_kernels.commands import predict\n"
        "from bayesian_lora_kernels.cli import main\n"
        "predict.TOGETHER = 16\n"
        "code = main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    command = [sys.executable, "-c", code, "predict", "adapter", "long.jsonl", "--device", "cpu", "--json", "p.jsonl"]
    command += ["--choices", *CHOICES]

    def run(**options: Any) -> Any:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)

    first = run()
    part = Path("p.jsonl.part")
    deadline = time.monotonic() + 120
    while not (part.exists() and part.read_bytes().count(b"\n") > 40):
        assert first.poll() is None, first.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    second = run()
    _, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert "lines are there already" in err
    rows = read_lines("p.jsonl")
    assert [row["line"] for row in rows] == list(range(1, 30 * len(PROMPTS) + 1))
    for row in rows:  # those before the kill and those after it
        assert row["laplace"] == pytest.approx(rows[(row["line"] - 1) % len(PROMPTS)]["laplace"], abs=1e-5)
    peak = int(err.split()[-1]) * 1024
    short = subprocess.run(
        [*command[:4], "adapter", "data.jsonl", *command[6:]], capture_output=True, text=True, check=True
    )
    assert peak - int(short.stderr.split()[-1]) * 1024 < size / 4
