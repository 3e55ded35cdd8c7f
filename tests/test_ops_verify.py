"""Verification on the user's machine: every kind of fault is found, and the file that remembers it stays sound."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import time

import planted
import pytest
import torch

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops import dispatch
from bayesian_lora_kernels.ops.dispatch import Implementation, choose, register
from bayesian_lora_kernels.ops.verify import machine, verifier
from bayesian_lora_kernels.ops.verify.judge import Verdict, judge
from bayesian_lora_kernels.ops.verify.machine import Runtime
from bayesian_lora_kernels.ops.verify.process import Worker
from bayesian_lora_kernels.ops.verify.store import Store
from bayesian_lora_kernels.ops.verify.verifier import Claim, Evidence, Verifier

CPU = torch.device("cpu")
EVIDENCE = Evidence("planted:SUITE", "planted:variants")
FAULTS = {
    "one_wrong_tile": r"33 x 40: error \d\.\de-04, limit 2e-05",
    "one_row_left_unwritten": "an output holds NaN or infinity",
    "reads_masked_rows": "an output holds NaN or infinity",
    "two_calls_differ": "two calls with the same inputs differ",
    "writes_beside_its_output": "wrote outside of its output",
    "changes_its_input": "changed its inputs",
    "raises": r"RuntimeError: Triton Error \[CUDA\]: out of resource",
}
FACTS = {"gpu": "none", "sources": "1"}


def claim(name):
    return Claim("gram", "triton", f"planted:{name}", "planted:reference", EVIDENCE)


def call(rows=30, width=40):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, width, generator=generator)
    return torch.full((width, width), float("nan")), x, torch.rand(rows, generator=generator) < 0.8


def in_process(request):
    """What the worker does, without its process."""
    from bayesian_lora_kernels.ops.verify.worker import answer

    return answer(request)


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    for name in ("BLK_VERIFY", "WORLD_SIZE", "BLK_IMPL", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BLK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, FACTS)


@pytest.fixture
def worker():
    one = Worker()
    yield one
    one.close()


def judged(name):
    return judge(planted.SUITE.problems(CPU), planted.SUITE, getattr(planted, name), planted.reference, Runtime(CPU))


def test_what_is_right_passes():
    verdict = judged("right")
    assert verdict.passed
    assert verdict.problems == 3 * 3  # seeds
    assert 0 < verdict.error < 1e-6 < verdict.limit
    assert str(verdict) == f"passed (error {verdict.error:.1e}, limit 2e-05)"


@pytest.mark.parametrize(("name", "reason"), FAULTS.items())
def test_every_fault_fails(name, reason):
    verdict = judged(name)
    assert verdict.state == "failed"
    assert re.search(reason, verdict.reason)


def test_without_a_problem_nothing_is_proven():
    verdict = judge([], planted.SUITE, planted.right, planted.reference, Runtime(CPU))
    assert (verdict.state, verdict.reason) == ("inconclusive", "no problem exercises it")


def test_no_memory_proves_nothing():
    def greedy(out, x, mask):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    verdict = judge(planted.SUITE.problems(CPU), planted.SUITE, greedy, planted.reference, Runtime(CPU))
    assert verdict.state == "inconclusive"
    assert "20 GiB" in verdict.reason


def test_a_process_of_its_own_survives_crash_and_hang(worker):
    def request(name, variant="wide"):
        return {
            "device": "cpu",
            "suite": EVIDENCE.suite,
            "variants": EVIDENCE.variants,
            "variant": variant,
            "function": f"planted:{name}",
            "reference": "planted:reference",
        }

    assert worker.ask(request("right")).passed
    assert worker.ask(request("right", "narrow")).problems == 3
    assert worker.ask(request("right", "unheard of")).state == "inconclusive"
    crashed = worker.ask(request("crashes"))
    assert crashed.state == "failed"
    assert "signal SIGSEGV" in crashed.reason
    start = time.monotonic()
    hung = worker.ask(request("hangs"), seconds=8)
    assert (hung.state, hung.reason) == ("failed", "no result within 8 s")
    assert time.monotonic() - start < 30
    assert worker.ask(request("one_wrong_tile")).state == "failed"
    absent = worker.ask(request("no such name"))
    assert absent.state == "inconclusive"
    assert "no such name" in absent.reason


def test_a_python_that_cannot_be_started_proves_nothing(worker, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    verdict = worker.ask({"function": "planted:right"})
    assert verdict.state == "inconclusive"
    assert "no process could be started" in verdict.reason


def test_a_verdict_is_asked_for_once_and_kept(store, tmp_path):
    asked = []

    def ask(request):
        asked.append(request["variant"])
        return in_process(request)

    one = Verifier(store, ask)
    arguments = call()
    assert one.refuses(claim("right"), arguments) is None
    assert arguments[0].isnan().all()  # none of it was written
    assert one.refuses(claim("right"), call()) is None
    assert one.refuses(claim("right"), call(width=9)) is None
    assert asked == ["wide", "narrow"]
    content = json.loads(store.path.read_text())
    assert content["machine"] == FACTS
    assert set(content["verdicts"]) == {"gram triton wide", "gram triton narrow"}
    assert all(verdict["shadowed"] for verdict in content["verdicts"].values())

    def unwanted(request):
        raise AssertionError("asked again")

    assert Verifier(Store(tmp_path, FACTS), unwanted).refuses(claim("right"), call()) is None


def test_what_failed_stays_out(store, tmp_path):
    one = Verifier(store, in_process)
    reason = one.refuses(claim("one_wrong_tile"), call())
    assert reason.startswith("gram triton wide: failed: 33 x 40: error")
    assert "limit 2e-05" in reason
    assert Verifier(Store(tmp_path, FACTS), None).refuses(claim("one_wrong_tile"), call()) == reason
    assert one.refuses(claim("one_wrong_tile"), call(width=9)) is None  # another unit, which is right


def test_a_real_call_is_compared_too(store, tmp_path):
    one = Verifier(store, in_process)
    reason = one.refuses(claim("wrong_when_large"), call(rows=600))
    assert "a real call differs from the reference by 1.0e+00, limit 4e-05" in reason
    assert Store(tmp_path, FACTS).verdict("gram triton wide").state == "failed"
    out, x, mask = call(width=9)
    x[0] = float("nan")  # counted: this call tells nothing
    mask[0] = True
    assert "not finite" in one.refuses(claim("right"), (out, x, mask))
    assert one.refuses(claim("right"), call(width=9)) is None


def test_the_reference_takes_over_where_it_is_faster(store, tmp_path):
    one = Verifier(store, in_process)
    assert "measured to be faster" in one.refuses(claim("slow"), call())
    assert list(json.loads(store.path.read_text())["choices"].values()) == ["reference"]
    again = Verifier(Store(tmp_path, FACTS), None)
    assert "measured to be faster" in again.refuses(claim("slow"), call())
    assert again.refuses(claim("slow"), call(rows=3000)) is not None  # another size is measured by itself


@pytest.mark.parametrize("why", ["deterministic", "one of many"])
def test_no_times_where_a_choice_must_not_vary(why, store, monkeypatch):
    if why == "one of many":
        monkeypatch.setenv("WORLD_SIZE", "4")
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert Verifier(store, in_process).refuses(claim("slow"), call()) is None
    assert json.loads(store.path.read_text())["choices"] == {}


def test_modes(store, monkeypatch):
    one = Verifier(store, None)
    monkeypatch.setenv("BLK_VERIFY", "0")
    assert "not verified on this machine, and BLK_VERIFY=0 is set" in one.refuses(claim("right"), call())
    monkeypatch.setenv("BLK_VERIFY", "trust")
    assert one.refuses(claim("one_wrong_tile"), call()) is None
    monkeypatch.setenv("BLK_VERIFY", "sure")
    with pytest.raises(ValueError, match=r"BLK_VERIFY: expected one of .*got 'sure'"):
        one.refuses(claim("right"), call())
    monkeypatch.setenv("BLK_VERIFY", "auto")
    assert Verifier(store, in_process).refuses(claim("right"), call()) is None
    monkeypatch.setenv("BLK_VERIFY", "0")  # what was verified counts
    assert Verifier(store, None).refuses(claim("right"), call()) is None


DAMAGES = {
    "corrupt": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "foreign": lambda text: text.replace('"sources": "1"', '"sources": "2"'),
    "another format": lambda text: text.replace('"format": 1', '"format": 0'),
    "no verdict": lambda text: text.replace('"passed"', '"perfect"'),
    "a verdict of text": lambda text: text.replace('"problems": 3', '"problems": "3"'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_is_not_its_own_counts_for_nothing_and_is_replaced(damage, store, tmp_path, caplog):
    store.keep_verdict("u", Verdict("passed", problems=3))
    store.path.write_text(damage(store.path.read_text()))
    with caplog.at_level(logging.INFO, logger="bayesian_lora_kernels"):
        again = Store(tmp_path, FACTS)
    assert again.verdict("u") is None
    assert "left out" in caplog.text
    again.keep_verdict("v", Verdict("failed", reason="tried"))
    assert Store(tmp_path, FACTS).verdict("v").reason == "tried"


def test_another_machine_has_another_file(store, tmp_path):
    store.keep_verdict("u", Verdict("passed"))
    assert Store(tmp_path, {**FACTS, "driver": "580.1"}).verdict("u") is None
    assert Store(tmp_path, FACTS).verdict("u").passed


def test_inconclusive_is_not_kept(store, tmp_path):
    store.keep_verdict("u", Verdict("inconclusive", reason="no memory"))
    assert store.verdict("u").state == "inconclusive"  # this process does not try again
    store.keep_verdict("v", Verdict("passed"))
    assert Store(tmp_path, FACTS).verdict("u") is None
    assert Store(tmp_path, FACTS).verdict("v").passed


def test_a_folder_that_cannot_be_written(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")  # a folder that nobody can make, root included
    store = Store(blocked / "cache", FACTS)
    with caplog.at_level(logging.INFO, logger="bayesian_lora_kernels"):
        one = Verifier(store, in_process)
        assert one.refuses(claim("right"), call()) is None
        assert one.refuses(claim("one_wrong_tile"), call()) is None  # the same unit, known to be right
    assert "cannot be written" in caplog.text
    assert list(tmp_path.iterdir()) == [blocked]


def test_a_failure_midway_leaves_the_file(store, tmp_path, monkeypatch):
    store.keep_verdict("u", Verdict("passed"))
    before = store.path.read_bytes()

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dump", stop)
    with pytest.raises(KeyboardInterrupt):
        store.keep_verdict("v", Verdict("passed"))
    assert store.path.read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


TOGETHER = """
    import sys, torch, planted
    from pathlib import Path
    from bayesian_lora_kernels.ops.verify.store import Store
    from bayesian_lora_kernels.ops.verify.verifier import Claim, Evidence, Verifier
    from bayesian_lora_kernels.ops.verify.worker import answer

    def ask(request):
        print("asked", request["variant"], flush=True)
        return answer(request)

    one = Verifier(Store(Path(sys.argv[1]), {"gpu": "none", "sources": "1"}), ask)
    claim = Claim("gram", "triton", "planted:right", "planted:reference", Evidence("planted:SUITE", "planted:variants"))
    for width in (40, 9):
        call = torch.empty(width, width), torch.randn(30, width), torch.ones(30, dtype=torch.bool)
        assert one.refuses(claim, call) is None
"""


def environment(**more):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", **more}


def test_of_many_processes_one_verifies(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(TOGETHER), str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(WORLD_SIZE="3")) for _ in range(3)]
    said = [process.communicate(timeout=120)[0].decode().split("\n") for process in started]
    assert all(process.returncode == 0 for process in started)
    assert sorted(line for lines in said for line in lines if line) == ["asked narrow", "asked wide"]
    assert set(json.loads(next(tmp_path.glob("*.json")).read_text())["verdicts"]) == {
        "gram triton narrow",
        "gram triton wide",
    }


def test_two_that_write_at_once_lose_nothing(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from bayesian_lora_kernels.ops.verify.judge import Verdict
        from bayesian_lora_kernels.ops.verify.store import Store

        store = Store(Path(sys.argv[1]), {"gpu": "none", "sources": "1"})
        for i in range(50):
            store.keep_verdict(f"{sys.argv[2]} {i}", Verdict("passed"))
    """
    started = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path), name], env=environment())
        for name in "ab"
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert len(json.loads(next(tmp_path.glob("*.json")).read_text())["verdicts"]) == 100


@pytest.fixture
def gram(monkeypatch, tmp_path):
    """Dispatch to the planted implementations as if the CPU were a device where they are to be verified."""
    monkeypatch.setattr(dispatch, "_registry", {name: dict(offered) for name, offered in dispatch._registry.items()})
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(dispatch, "_default", None)
    monkeypatch.setattr(dispatch, "machine_refuses", lambda name: None)
    monkeypatch.setattr(dispatch, "_device_to_verify", lambda arguments: arguments[0].device)
    monkeypatch.setattr(verifier, "_verifiers", {})
    monkeypatch.setattr(verifier, "ask", in_process)

    def run(name, arguments):
        register("gram", "reference", Implementation("planted", "reference"))
        register("gram", "triton", Implementation("planted", name, evidence=EVIDENCE))
        choose("gram", "auto", *arguments)(*arguments)
        return arguments[0]

    return run


def truth(arguments):
    planted.reference(out := arguments[0].clone(), *arguments[1:])
    return out


@pytest.mark.parametrize("name", ["right", *FAULTS])
def test_auto_is_right_whatever_the_kernel_does(name, gram, caplog):
    arguments = call()
    with caplog.at_level(logging.INFO, logger="bayesian_lora_kernels"):
        for _ in range(2):
            torch.testing.assert_close(gram(name, arguments), truth(arguments))
    left_out = [one for one in caplog.messages if "triton left out" in one]
    assert len(left_out) == (name != "right")
    assert all(f"{name} triton wide: failed:" in one for one in left_out)


def test_a_launch_that_raises_falls_back(gram, caplog, monkeypatch):
    """Verified, and later it cannot be launched after all."""
    arguments = call()
    gram("right", arguments)
    monkeypatch.setattr(planted, "right", planted.raises)
    with caplog.at_level(logging.INFO, logger="bayesian_lora_kernels"):
        torch.testing.assert_close(gram("right", call()), truth(arguments))
        torch.testing.assert_close(gram("right", call()), truth(arguments))
    assert sum("a launch raised RuntimeError: Triton Error" in one for one in caplog.messages) == 1
    assert "right triton wide: failed: a launch raised" in caplog.messages[-1]


def test_a_launch_that_raises_while_it_adds_up_says_so(gram, monkeypatch):
    gram("right", call())
    monkeypatch.setattr(planted, "right", planted.raises)
    adding = planted.Suite(planted.SUITE.problems, planted.SUITE.comparable, planted.SUITE.limit, accumulates=bool)
    monkeypatch.setitem(verifier._attributes, "planted:SUITE", adding)
    with pytest.raises(
        RuntimeError, match=r"gram: .* a launch raised .*; it is left out from now on: repeat what you did"
    ):
        gram("right", call())
    torch.testing.assert_close(gram("right", arguments := call()), truth(arguments))


def test_no_memory_is_the_callers_affair(gram, monkeypatch):
    gram("right", call())

    def greedy(out, x, mask):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(planted, "right", greedy)
    with pytest.raises(torch.OutOfMemoryError):
        gram("right", call())


def test_facts_change_with_what_a_result_depends_on(monkeypatch, tmp_path):
    machine.facts.cache_clear()
    before = machine.facts(CPU)
    assert before["torch"] == torch.__version__
    assert len(before["sources"]) == 64
    (tmp_path / "kernel.py").write_text("one = 1\n")
    one = machine._digest(tmp_path)
    (tmp_path / "kernel.py").write_text("one = 2\n")
    assert machine._digest(tmp_path) != one
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    machine.facts.cache_clear()
    assert machine.facts(CPU) != before
    machine.facts.cache_clear()


def test_a_process_with_a_passed_cache_spends_little_on_it(tmp_path):
    """Under 50 ms: the facts of the machine, the file, the question; the median of five processes."""
    code = """
        import sys, time, torch, planted
        from bayesian_lora_kernels.ops import dispatch
        from bayesian_lora_kernels.ops.verify import machine
        from bayesian_lora_kernels.ops.verify.verifier import Claim, Evidence, verifier, VARIABLE

        claim = Claim(
            "gram", "triton", "planted:right", "planted:reference", Evidence("planted:SUITE", "planted:variants")
        )
        call = torch.empty(40, 40), torch.randn(30, 40), torch.ones(30, dtype=torch.bool)
        start = time.perf_counter()
        assert verifier(torch.device("cpu")).refuses(claim, call) is None
        print(time.perf_counter() - start)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    there = environment(BLK_CACHE=str(tmp_path))
    seconds = [
        float(subprocess.run(command, env=there, check=True, capture_output=True, timeout=120).stdout) for _ in range(6)
    ][1:]
    assert sorted(seconds)[2] < 0.05, seconds


def test_every_claim_can_be_looked_up():
    """Suites, variants and references of all implementations that wait for a GPU are where they are said to be."""
    pytest.importorskip("triton")
    for one in dispatch.claims():
        for path in (one.function, one.reference, one.evidence.suite, one.evidence.variants):
            assert verifier.attribute(path) is not None
    assert {one.operation for one in dispatch.claims()} <= set(ops.backends()["reference"]["operations"])


def test_a_sample_that_goes_another_way_is_not_compared(store):
    """The whole call is, so that nothing runs that was not judged."""
    seen = []

    def narrow(arguments):
        return arguments[0][:9, :9], arguments[1][:, :9], arguments[2]

    def watched(out, x, mask):
        seen.append(x.shape[1])
        planted.right(out, x, mask)

    suite = planted.Suite(planted.SUITE.problems, planted.SUITE.comparable, planted.SUITE.limit, sample=narrow)
    verifier._attributes.update({"planted:OTHER": suite, "planted:watched": watched})
    one = Verifier(store, lambda request: Verdict("passed"))
    evidence = Evidence("planted:OTHER", "planted:variants")
    assert one.refuses(Claim("gram", "triton", "planted:watched", "planted:reference", evidence), call()) is None
    assert set(seen) == {40}


def test_without_memory_to_compare_the_reference_runs_and_the_next_call_tries_again(store, monkeypatch):
    one = Verifier(store, in_process)

    def greedy(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setitem(verifier._attributes, "planted:right", greedy)
    assert "no memory to compare" in one.refuses(claim("right"), call())
    monkeypatch.setitem(verifier._attributes, "planted:right", planted.right)
    assert one.refuses(claim("right"), call()) is None
