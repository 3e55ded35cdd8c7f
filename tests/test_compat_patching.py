"""blk.patch: everywhere, reversible, for known versions only; and the peer's own tests under it."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from peers import sources

import bayesian_lora_kernels as blk
import bayesian_lora_kernels.compat.bayesian_lora as ours
from bayesian_lora_kernels.compat import patching


@pytest.fixture
def theirs() -> Iterator[Any]:
    module = pytest.importorskip("bayesian_lora", reason="the peer, bayesian_lora 0.0.6, is not installed")
    yield module
    blk.unpatch("bayesian_lora")


@pytest.fixture
def user() -> Iterator[ModuleType]:
    """A module that imported two functions, one under another name, and one of ours."""
    module = ModuleType("a_user_of_bayesian_lora")
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def test_patch_reaches_every_module_and_unpatch_puts_everything_back(theirs, user, caplog):
    import bayesian_lora.kfac
    import bayesian_lora.main

    original = bayesian_lora.main.variance
    user.their_variance, user.factors_of = original, bayesian_lora.kfac.calculate_kronecker_factors
    user.our_variance = ours.variance
    with caplog.at_level(logging.INFO, logger="bayesian_lora_kernels"):
        replaced = blk.patch("bayesian_lora")
    wanted = {"bayesian_lora.variance", "bayesian_lora.main.variance", "bayesian_lora.main.jacobian_mean"}
    wanted |= {"bayesian_lora.kfac.incremental_svd", f"{user.__name__}.their_variance", f"{user.__name__}.factors_of"}
    assert wanted <= set(replaced)
    assert all(name in caplog.text for name in wanted)
    assert theirs.variance is bayesian_lora.main.variance is user.their_variance
    assert user.their_variance.__wrapped__ is ours.variance
    assert bayesian_lora.main.stable_cholesky.__wrapped__ is ours.stable_cholesky
    user.imported_later = theirs.model_evidence
    assert blk.patch("bayesian_lora") == []  # nothing is left of theirs
    restored = blk.unpatch("bayesian_lora")
    assert set(restored) == {*replaced, f"{user.__name__}.imported_later"}
    assert theirs.variance is bayesian_lora.main.variance is user.their_variance is original
    assert user.our_variance is ours.variance
    assert user.imported_later is bayesian_lora.main.model_evidence
    assert blk.unpatch("bayesian_lora") == []


def test_unknown_packages_versions_and_absent_ones_are_refused(theirs, monkeypatch):
    with pytest.raises(ValueError, match="expected one of bayesian_lora, bayesadapt, got 'laplace'"):
        blk.patch("laplace")
    with pytest.raises(ValueError, match="expected one of bayesian_lora, bayesadapt, got 'laplace'"):
        blk.unpatch("laplace")
    monkeypatch.setattr(patching, "version", lambda name: "0.0.7")
    with pytest.raises(RuntimeError, match=r"bayesian_lora 0\.0\.7 is not known, expected 0\.0\.6"):
        blk.patch("bayesian_lora")
    assert not hasattr(theirs.variance, "__wrapped__")

    def absent(name: str) -> str:
        raise patching.PackageNotFoundError(name)

    monkeypatch.setattr(patching, "version", absent)
    with pytest.raises(ModuleNotFoundError, match="bayesian_lora is not installed"):
        blk.patch("bayesian_lora")


def test_importing_the_package_imports_no_peer():
    code = (
        "import sys, bayesian_lora_kernels\n"
        "import bayesian_lora_kernels.compat.bayesian_lora, bayesian_lora_kernels.compat.laplace_lora\n"
        "assert not {'bayesian_lora', 'laplace', 'curvlinops', 'jaxtyping'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=sources.ROOT)


def test_bayesian_lora_s_own_tests_pass_with_our_functions(theirs):
    printed = sources.run(sources.find("bayesian_lora-0.0.6/tests/test_kfac.py"), "patched_bayesian_lora")
    assert "8 passed" in printed
