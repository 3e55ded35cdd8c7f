"""Ctrl-C at any moment of a fit, a prediction or a score: the model comes back as it was, and the posterior stays."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import llama
from snapshot import snapshot, unusual

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.model.measuring import measuring, undone, uninterrupted

ORDINARY, MANY = 40, 300


def interrupted(job: Callable[[], Any], seconds: float) -> bool:
    """Runs a job with a KeyboardInterrupt after some time, between any two instructions, as Ctrl-C sends it.

    Returns:
        Whether it came before the job had ended.
    """
    armed, finished = [True], False

    def interrupt(*_: Any) -> None:
        if armed[0]:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        job()
        finished = True
        armed[0] = False
    except KeyboardInterrupt:
        pass
    armed[0] = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    return not finished


def jobs() -> dict[str, tuple[Any, Callable[[], Any]]]:
    case = llama(lengths=(6,) * 4, targets=("q_proj", "v_proj"))
    laplace = blk.LaplaceLoRA(case.model, **case.arguments).fit([case.batch()], progress=False)
    texts = {key: value for key, value in case.batch().items() if key != "labels"}

    def fit() -> Any:
        return blk.LaplaceLoRA(case.model, curvature="exact", **case.arguments).fit([case.batch()], progress=False)

    return {
        "fit": (case, fit),
        "fit again": (case, lambda: laplace.fit([case.batch()], progress=False)),
        "predict": (case, lambda: laplace.predict(texts)),
        "score": (case, lambda: laplace.score(texts, 8, torch.Generator())),
        "verify": (case, lambda: laplace.verify(case.batch())),
    }


def run(name: str, times: int) -> None:
    case, job = jobs()[name]
    unusual(case.model)
    job()
    started = time.perf_counter()
    job()
    duration = time.perf_counter() - started
    before, moments = snapshot(case.model), random.Random(0)
    hit = 0
    for _ in range(times):
        hit += interrupted(job, moments.random() * duration + 1e-4)
        after = snapshot(case.model)
        assert after == before, {key for key in before if after.get(key) != before[key]}
    assert hit >= times // 4, "hardly any interrupt came in time"
    job()


@pytest.mark.parametrize("name", ["fit", "fit again", "predict", "score", "verify"])
def test_at_any_moment(name):
    run(name, ORDINARY)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fit", "predict", "score"])
def test_at_any_of_many_moments(name):
    run(name, MANY)


def test_what_an_interrupted_block_leaves_is_undone_in_the_end():
    """The step of a block whose own end was interrupted runs when measuring ends."""
    module, undoings = torch.nn.Linear(2, 2), []

    class Interrupted(Exception):
        pass

    def step() -> None:
        undoings.append(1)
        if len(undoings) == 1:
            raise Interrupted

    with pytest.raises(Interrupted), measuring(module), undone(step):
        pass
    assert len(undoings) == 2


def test_work_that_nothing_interrupts():
    done = []

    def work() -> None:
        for _ in range(20):
            time.sleep(0.002)
            done.append(1)

    interrupted(lambda: uninterrupted(work), 0.01)
    assert len(done) == 20


def test_an_error_of_the_work_is_raised():
    def work() -> None:
        raise RuntimeError("its own")

    with pytest.raises(RuntimeError, match="its own"):
        uninterrupted(work)
