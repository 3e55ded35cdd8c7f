"""A batch for which memory runs out is measured in smaller pieces, and every example of it counts once."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import llama, mlp
from snapshot import untouched

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.curvature import passes
from bayesian_lora_kernels.model.capture import Capture

SETTINGS = {
    "kfac, exact": {"curvature": "kfac", "fisher": "exact"},
    "kfac, mc": {"curvature": "kfac", "fisher": "mc"},  # the draws of lost columns are drawn again
    "kfac, empirical": {"curvature": "kfac", "fisher": "empirical"},
    "ekfac, exact": {"curvature": "ekfac", "fisher": "exact"},
    "exact, exact": {"curvature": "exact", "fisher": "exact"},
}
MESSAGES = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "host": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
}


@contextmanager
def short(monkeypatch: pytest.MonkeyPatch, method: str, at: int, error: Exception, most: int = 0):
    """The `at`-th call of a method of captures runs out of memory as it ends; or all of more than `most` examples."""
    calls, failed, original = [0], [], getattr(Capture, method)

    def planted(self: Capture, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)  # after it has written what it writes
        calls[0] += 1
        n = len(self.logits)
        if calls[0] == at or 0 < most < n:
            failed.append(n)
            raise error
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Capture, method, planted)
        yield failed


def test_a_model_that_processes_share_is_not_run_in_smaller_pieces(monkeypatch):
    """The others would not know: what one of them cannot hold ends the fit."""
    one = mlp(n=8)
    monkeypatch.setattr(passes, "sharing", lambda model: "some processes")
    with (
        short(monkeypatch, "run", 0, MESSAGES["gpu"], most=2),
        pytest.raises(torch.OutOfMemoryError, match="other processes that FSDP shards the model over cannot know"),
    ):
        blk.LaplaceLoRA(one.model).fit(one.loader(4), progress=False)


def measured(laplace: blk.LaplaceLoRA) -> dict[str, torch.Tensor]:
    """What two fits have in common whatever pieces their data came in."""
    curvature = laplace.posterior.curvature
    if curvature.factors is None:  # its rows come in the order of the pieces
        rows = {name: curvature.store.rows(name) for name in curvature.store.names}
        return {name: row.mT @ row for name, row in rows.items()}
    found = {name: torch.kron(f.s, f.a) for name, f in curvature.factors.items()}
    eigenvalues = {f"{name} eigenvalues": one.spectrum()[0] for name, one in curvature._layers.items()}
    return {**found, **eigenvalues}


def agree(found: blk.LaplaceLoRA, expected: blk.LaplaceLoRA) -> None:
    assert found.n_examples == expected.n_examples
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
    ours, theirs = measured(found), measured(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert float((ours[name] - value).abs().max()) <= 1e-11 * float(value.abs().max()), name


def fitted(case: Any, settings: dict[str, Any], loader: Any) -> blk.LaplaceLoRA:
    return blk.LaplaceLoRA(case.model, **{**case.arguments, "rank": None, **settings}).fit(loader, progress=False)


@pytest.mark.parametrize("method", ["run", "backward"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_at_any_moment(setting, method, monkeypatch):
    """Every forward and backward pass of the fit in turn, those of the checks and of the second pass among them."""
    case = llama(lengths=(5, 3, 6, 4, 4, 5), layers=1)
    loader, error = case.loader(4), MESSAGES["gpu"]
    expected = fitted(case, SETTINGS[setting], loader)
    hits = 0
    for at in range(1, 30):
        with short(monkeypatch, method, at, error) as failed, untouched(case.model):
            agree(fitted(case, SETTINGS[setting], loader), expected)
        if not failed:
            break
        hits += 1
    assert hits == at - 1 >= 2


def test_sampled_columns_each_count_once(monkeypatch):
    """Some of the samples of a batch are drawn for all of its examples at once, the others for half of them."""
    case = mlp(n=8)
    expected = fitted(case, {"fisher": "exact"}, [case.batch()])
    with short(monkeypatch, "backward", 200, MESSAGES["gpu"]) as failed:
        found = fitted(case, {"fisher": "mc", "fisher_samples": 600}, [case.batch()])
    assert failed == [8]
    for name, factors in expected.factors.items():
        assert float((found.factors[name].s - factors.s).norm()) < 0.06 * float(factors.s.norm())
        assert torch.allclose(found.factors[name].a, factors.a, rtol=1e-12)


@pytest.mark.parametrize("error", MESSAGES)
@pytest.mark.parametrize("method", ["run", "backward"])
def test_smaller_pieces_from_then_on(method, error, monkeypatch, caplog):
    case = mlp(n=16)
    expected = fitted(case, {}, case.loader(8))
    caplog.set_level(logging.INFO, "bayesian_lora_kernels")
    with short(monkeypatch, method, 0, MESSAGES[error], most=3) as failed:
        agree(fitted(case, {}, case.loader(8)), expected)
    assert failed == [8, 4]  # the second batch is tried with 2 at once
    assert [record.message for record in caplog.records] == [
        "batch 0: memory ran out with 8 examples at a time: from here on 4",
        "batch 0: memory ran out with 4 examples at a time: from here on 2",
    ]


@pytest.mark.parametrize("method", ["run", "backward"])
def test_one_example_that_does_not_fit(method, monkeypatch):
    case = mlp(n=4)
    laplace = fitted(case, {}, case.loader(4))
    before = laplace.posterior.curvature
    with (
        short(monkeypatch, method, 0, MESSAGES["host"], most=0.5),
        untouched(case.model),
        pytest.raises(torch.OutOfMemoryError, match=r"^batch 0: a single example does not fit .*can't allocate"),
    ):
        laplace.fit(case.loader(4), progress=False)
    assert laplace.posterior.curvature is before


def test_other_errors_are_not_retried(monkeypatch):
    case, error = mlp(n=4), RuntimeError("an error of the model's")
    for method in ("run", "backward"):
        with short(monkeypatch, method, 1, error) as failed, pytest.raises(RuntimeError, match="of the model's"):
            fitted(case, {}, case.loader(4))
        assert failed == [4]


def test_what_nobody_can_cut_is_refused_as_for_want_of_budget(monkeypatch):
    """A column that every piece gets whole, and that the examples of the batch share out among them."""
    case = mlp(n=4)
    inputs, labels = case.batch()
    batch = {"inputs": inputs, "shift": torch.arange(12.0, dtype=torch.float64).reshape(12, 1), "labels": labels}

    def forward(model: Any, batch: Any) -> Any:
        shift = batch["shift"].reshape(4, 3)[: len(batch["inputs"])]
        return model(batch["inputs"]) + shift[:, :1] + torch.arange(len(shift))[:, None]

    laplace = blk.LaplaceLoRA(case.model, forward=forward, fisher="exact")
    with (
        short(monkeypatch, "run", 1, MESSAGES["gpu"]),
        pytest.raises(ValueError, match="shift: the batch is too large for one piece"),
    ):
        laplace.fit([batch], progress=False)


def test_the_graph_of_the_whole_is_gone_while_the_parts_run(monkeypatch):
    """Or the parts would need more memory than the whole."""
    import weakref

    case = mlp(n=8)
    graphs: list[weakref.ref[Any]] = []
    alive: list[int] = []
    run = Capture.run

    def seen(self: Capture, *args: Any, **kwargs: Any) -> None:
        alive.append(sum(graph() is not None for graph in graphs))
        run(self, *args, **kwargs)
        graphs.append(weakref.ref(self.logits.grad_fn))

    monkeypatch.setattr(Capture, "run", seen)
    with short(monkeypatch, "backward", 1, MESSAGES["gpu"]):
        fitted(case, {"check": "off"}, [case.batch()])
    assert len(alive) == 3
    assert alive[1] == 0
