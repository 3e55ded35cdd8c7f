"""Choosing an implementation: the argument, the process's default, the environment, and what the machine can do."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops import dispatch
from bayesian_lora_kernels.ops.dispatch import Implementation, choose, register

X = torch.randn(4, 3)


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.setattr(dispatch, "_registry", {name: dict(offered) for name, offered in dispatch._registry.items()})
    monkeypatch.setattr(dispatch, "_default", None)
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.delenv("BLK_IMPL", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def able(monkeypatch, *names):
    """Pretend that this machine can run these, and no others."""
    monkeypatch.setattr(dispatch, "machine_refuses", lambda name: None if name in names else f"no {name} today")


def fake(operation, name, **options):
    register(operation, name, Implementation("operator", "add", **options))


def test_every_operation_has_a_reference():
    report = ops.backends()
    assert list(report) == ["reference", "triton", "native"]
    operations = sorted(name for name in ops.__all__ if name.islower() and name not in ("backends", "set_default_impl"))
    assert report["reference"] == {
        "available": True,
        "reason": None,
        "operations": operations,
    }
    assert "small_eigh" in report["native"]["operations"]
    for name in ("triton", "native"):
        assert report[name]["available"] == (report[name]["reason"] is None)


def test_an_explicit_choice_that_cannot_run_says_why(monkeypatch):
    with pytest.raises(
        RuntimeError, match=r"outer_product: impl='native' cannot run: outer_product has none; it has reference, triton"
    ):
        ops.outer_product(X, impl="native")
    fake("outer_product", "triton")
    able(monkeypatch, "reference")
    with pytest.raises(RuntimeError, match=r"outer_product: impl='triton' cannot run: no triton today"):
        ops.outer_product(X, impl="triton")
    able(monkeypatch, "reference", "triton")
    fake("outer_product", "triton", refuses=lambda outs, xs, *rest: f"{xs[0].dtype} is too narrow")
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run: torch.float32 is too narrow"):
        ops.outer_product(X, impl="triton")


def test_auto_takes_the_first_that_runs_and_logs_the_others_once(monkeypatch, caplog):
    fake("outer_product", "triton")
    fake("outer_product", "native", suits_auto=lambda *arguments: False)
    able(monkeypatch, "reference", "native")
    with caplog.at_level(logging.INFO, logger="bayesian_lora_kernels"):
        for _ in range(3):
            assert choose("outer_product", "auto", X).__module__.endswith("outer_product.reference")
    assert [record.getMessage() for record in caplog.records] == ["outer_product: triton left out: no triton today"]
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    able(monkeypatch, "reference", "triton", "native")
    assert choose("outer_product", "auto", X).__module__ == "_operator"
    assert choose("outer_product", "native", X).__module__ == "_operator"  # right, only not faster


def test_defaults(monkeypatch, caplog):
    fake("outer_product", "triton")
    able(monkeypatch, "reference", "triton")
    monkeypatch.setenv("BLK_IMPL", "reference")  # read at every call
    assert choose("outer_product", "auto", X).__module__.endswith("reference")
    assert choose("outer_product", "triton", X).__module__ == "_operator"  # an argument wins
    ops.set_default_impl("triton")  # and the process's choice over the environment
    assert choose("outer_product", "auto", X).__module__ == "_operator"
    with caplog.at_level(logging.INFO, logger="bayesian_lora_kernels"):  # one that never had such a kernel still runs
        ops.small_eigh(X[None, :3])
    assert "small_eigh: triton left out: small_eigh has no triton implementation" in caplog.messages
    able(monkeypatch, "reference")
    for call in (lambda: choose("outer_product", "auto", X), lambda: ops.small_eigh(X[None, :3])):
        with pytest.raises(RuntimeError, match=r"cannot run: no triton today"):
            call()
    ops.set_default_impl(None)
    monkeypatch.setenv("BLK_IMPL", "cublas")
    with pytest.raises(ValueError, match=r"environment variable BLK_IMPL: expected impl to be one of .*got 'cublas'"):
        ops.outer_product(X)
    with pytest.raises(ValueError, match=r"set_default_impl: expected impl to be one of"):
        ops.set_default_impl("fast")


def test_triton_needs_a_device_or_its_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert dispatch.machine_refuses("triton") == "Triton is not installed"
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in dispatch.machine_refuses("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.machine_refuses("triton") is None


def test_importing_is_light():
    """No Triton, no native extension, no initialised GPU, no changed environment."""
    code = (
        "import os, sys, torch; before = dict(os.environ); triton = 'triton' in sys.modules\n"
        "import bayesian_lora_kernels.ops as ops\n"
        "assert triton or 'triton' not in sys.modules\n"
        "assert 'bayesian_lora_kernels._native' not in sys.modules\n"
        "assert not torch.cuda.is_initialized() and dict(os.environ) == before\n"
        "assert not any(name.endswith('.reference') for name in sys.modules if name.startswith('bayesian'))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
