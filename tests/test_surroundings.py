"""What goes on around a call: threads, autocast, default dtypes and devices. Every answer is the plain call's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import transformers
from dense import relative
from situations import adapted, judge, labelled, padded
from torch import Tensor

import bayesian_lora_kernels as blk

IDS = [11, 12, 13]
PROBS = ("pairwise", "scalar", "probit", "mc", "bridge", "map")


def llama(classes: int | None = None) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        **({"num_labels": classes} if classes else {}),
    )
    if classes:
        return adapted(transformers.LlamaForSequenceClassification(config), ["q_proj", "v_proj"], task_type="SEQ_CLS")
    return adapted(transformers.LlamaForCausalLM(config), ["q_proj", "v_proj"], task_type="CAUSAL_LM")


BATCH = labelled(padded([6, 4, 5, 6], 40))
OTHER = labelled(padded([3, 5], 40, seed=8))


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def probs(prediction: Any, method: str) -> Tensor:
    try:
        return prediction.probs(method, 64, noise())
    except ValueError as error:
        if "method" in str(error):
            pytest.skip(f"no method {method}")
        raise


def fitted(**settings: Any) -> blk.LaplaceLoRA:
    settings = {"class_token_ids": IDS, "rank": None, "prior_precision": 0.1, **settings}
    return blk.LaplaceLoRA(llama(), **settings).fit([BATCH, OTHER], progress=False)


def tokens() -> dict[str, Tensor]:
    return {k: v for k, v in BATCH.items() if k != "labels"}


# Each takes a posterior that was fitted outside, and gives tensors.
WORK: dict[str, Callable[[blk.LaplaceLoRA], Any]] = {
    "mean": lambda la: la.predict(BATCH).mean,
    "covariance": lambda la: la.predict(BATCH).covariance,
    "two logits": lambda la: la.predict(BATCH, outputs=2).covariance,
    "evidence": lambda la: la.log_marginal_likelihood(1e-2),
    "sampled weights": lambda la: torch.cat([x.flatten() for x in la.sample_weights(2, noise()).values()]),
    "sampled logits": lambda la: la.predict(BATCH).sample(3, noise()),
    "vocabulary, probabilities": lambda la: la.predict(tokens(), outputs="vocabulary").probs(
        n_samples=8, generator=noise()
    ),
    "vocabulary, covariance": lambda la: la.predict(tokens(), outputs="vocabulary").covariance(
        torch.tensor([3, 7], device="cpu")
    ),
    "score": lambda la: la.score(tokens(), n_samples=8, generator=noise()).log_prob,
    "density": lambda la: la.predict(BATCH).distribution().covariance_matrix,
    "distribution": lambda la: la.predict(BATCH).variance,
}
WORK |= {f"probabilities, {m}": lambda la, m=m: probs(la.predict(BATCH), m) for m in PROBS}


def tuned(**settings: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        laplace = fitted().optimize_prior_precision(**settings)
        prior = laplace.prior_precision
        return torch.stack([v.double() for v in prior.values()]) if isinstance(prior, dict) else prior.double()

    return run


# Each starts from the model, so that the fit is inside too.
FITS: dict[str, Callable[[], Any]] = {
    "kfac": lambda: fitted().predict(BATCH).covariance,
    "ekfac": lambda: fitted(curvature="ekfac").predict(BATCH).covariance,
    "exact": lambda: fitted(curvature="exact").predict(BATCH).covariance,
    "low rank": lambda: fitted(rank=2, rank_threshold=4).predict(BATCH).covariance,
    "sampled Fisher": lambda: fitted(fisher="mc").predict(BATCH).covariance,
    "evidence of a fit": lambda: fitted().log_marginal_likelihood(1e-2),
    "tuned": tuned(),
    "tuned per module": tuned(per_module=True),
    "tuned on held-out data": tuned(method="nll", val_loader=[OTHER]),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def hooks_on_saved_tensors() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        yield


SURROUNDINGS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], tuple[str, ...]]] = {
    "nothing": (nullcontext, ()),
    "no_grad": (torch.no_grad, ()),
    "inference mode": (torch.inference_mode, ()),
    "inference mode in no_grad": (lambda: torch.inference_mode(), ()),
    "default float64": (lambda: default_dtype(torch.float64), ()),
    "default bfloat16": (lambda: default_dtype(torch.bfloat16), ("default dtype",)),
    "default device meta": (lambda: default_device("meta"), ("device",)),
    "a device context": (lambda: torch.device("meta"), ("device",)),
    "anomaly mode": (torch.autograd.detect_anomaly, ()),
    "deterministic": (deterministic, ()),
    "one thread": (one_thread, ()),
    "saved tensors on the CPU": (torch.autograd.graph.save_on_cpu, ()),
    "hooks on saved tensors": (hooks_on_saved_tensors, ()),
    "disabled hooks on saved tensors": (lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"), ()),
}


@pytest.fixture(scope="module")
def laplace() -> blk.LaplaceLoRA:
    return fitted()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", WORK)
@pytest.mark.parametrize("where", SURROUNDINGS)
def test_every_call_is_the_plain_call(laplace: blk.LaplaceLoRA, where: str, what: str):
    around, words = SURROUNDINGS[where]
    expected = WORK[what](laplace)

    def ours() -> Any:
        with around():
            return WORK[what](laplace)

    judge(ours, words, lambda got: relative(got, expected), 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", FITS)
@pytest.mark.parametrize("where", SURROUNDINGS)
def test_every_fit_is_the_plain_fit(where: str, what: str):
    around, words = SURROUNDINGS[where]
    expected = FITS[what]()
    build = llama()

    def ours() -> Any:
        before, globals()["llama"] = globals()["llama"], lambda: build  # the model is made outside
        try:
            with around():
                return FITS[what]()
        finally:
            globals()["llama"] = before

    judge(ours, words, lambda got: relative(got, expected), 1e-5)


# Autocast: the model's own forward decides about its precision; the package's algebra does not change with it.


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # what it computes is not the question here
            return self.second(torch.tanh(self.first(x)))


X, Y = torch.randn(16, 6, generator=noise()), torch.arange(16) % 3


def plain_fit(model: Any, **settings: Any) -> blk.LaplaceLoRA:
    return blk.LaplaceLoRA(model, rank=None, **{"prior_precision": 1e-4, **settings}).fit([(X, Y)], progress=False)


AUTOCAST: dict[str, Callable[[Any, blk.LaplaceLoRA], Any]] = {
    "covariance": lambda m, la: la.predict((X, None)).covariance,
    "mean": lambda m, la: la.predict((X, None)).mean,
    "sampled weights": lambda m, la: torch.cat([x.flatten() for x in la.sample_weights(2, noise()).values()]),
    "evidence": lambda m, la: la.log_marginal_likelihood(1e-2),
    "kfac": lambda m, la: plain_fit(m).predict((X, None)).covariance,
    "ekfac": lambda m, la: plain_fit(m, curvature="ekfac").predict((X, None)).covariance,
    "exact": lambda m, la: plain_fit(m, curvature="exact").predict((X, None)).covariance,
    "evidence of a fit": lambda m, la: plain_fit(m).log_marginal_likelihood(1e-2),
    "tuned": lambda m, la: plain_fit(m).optimize_prior_precision().prior_precision,
    "tuned on held-out data": lambda m, la: (
        plain_fit(m).optimize_prior_precision("nll", val_loader=[(X, Y)]).prior_precision
    ),
    "factors": lambda m, la: torch.cat([x.flatten() for f in plain_fit(m).factors.values() for x in (f.a, f.s)]),
}
AUTOCAST |= {f"probabilities, {p}": lambda m, la, p=p: probs(la.predict((X, None)), p) for p in PROBS}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("what", AUTOCAST)
def test_under_autocast(what: str, dtype: torch.dtype):
    torch.manual_seed(0)
    model = Plain().eval()
    laplace = plain_fit(model)
    expected = AUTOCAST[what](model, laplace)

    def ours() -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return AUTOCAST[what](model, laplace)

    judge(ours, ("autocast",), lambda got: relative(got, expected), 1e-4)


class Bare(Plain):
    """Under autocast the model itself computes in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).float()


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact"])
def test_a_model_that_autocast_changes(curvature: str):
    """As a forward= that opens autocast itself: the same numbers, whoever opens it."""
    torch.manual_seed(0)
    model = Bare().eval()

    def inside(m: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m(batch[0])

    expected = plain_fit(model, forward=inside, curvature=curvature).predict((X, None))

    def ours() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain_fit(model, curvature=curvature).predict((X, None))

    judge(
        ours,
        ("autocast",),
        lambda got: {
            "mean": relative(got.mean, expected.mean),
            "covariance": relative(got.covariance, expected.covariance),
        },
        1e-3,
    )


# Threads


def together(jobs: list[Callable[[], Any]], rounds: int) -> list[str]:
    """Runs every job in a thread of its own, and returns what they complain of."""
    complaints: list[str] = []
    start = threading.Barrier(len(jobs))

    def work(job: Callable[[], Any]) -> None:
        start.wait()
        try:
            for _ in range(rounds):
                complaint = job()
                if complaint:
                    complaints.append(complaint)
        except Exception as error:
            complaints.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return complaints


def rows(i: int) -> dict[str, Tensor]:
    return {k: v[i : i + 1, : (None if v.ndim < 2 else 6)] if v.ndim > 1 else v[i : i + 1] for k, v in BATCH.items()}


def wrong(what: str, got: Tensor, expected: Tensor) -> str | None:
    if got.shape != expected.shape:
        return f"{what}: {list(got.shape)}"
    error = relative(got, expected)
    return f"{what} off by {error:.1e}" if error > 1e-6 else None


@pytest.mark.parametrize("causal", [False, True], ids=["classes", "causal"])
@pytest.mark.parametrize("curvature", ["kfac", "exact"])
def test_several_threads_predict(curvature: str, causal: bool):
    model = llama(None if causal else 3)
    arguments: dict[str, Any] = {"class_token_ids": IDS} if causal else {}
    found = blk.LaplaceLoRA(model, curvature=curvature, rank=None, **arguments).fit([BATCH], progress=False)
    expected = [found.predict(rows(i)).covariance for i in range(4)]
    jobs = [lambda i=i: wrong("covariance", found.predict(rows(i)).covariance, expected[i]) for i in range(4)]
    assert not together(jobs, 20)[:3]


@pytest.mark.parametrize("causal", [False, True], ids=["classes", "causal"])
def test_two_posteriors_of_one_model(causal: bool):
    model = llama(None if causal else 3)
    arguments: dict[str, Any] = {"class_token_ids": IDS} if causal else {}
    found = [blk.LaplaceLoRA(model, rank=None, **arguments).fit([b], progress=False) for b in (BATCH, OTHER)]
    expected = [f.predict(BATCH).covariance for f in found]
    jobs = [lambda k=k: wrong("covariance", found[k].predict(BATCH).covariance, expected[k]) for k in range(2)]
    assert not together(jobs, 20)[:3]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training mode"])
def test_a_thread_that_runs_the_plain_model(training: bool):
    """The model's own users see it as it is: every position, the whole vocabulary, its own mode."""
    model = llama()
    found = blk.LaplaceLoRA(model, class_token_ids=IDS, rank=None).fit([BATCH], progress=False)
    with torch.no_grad():
        expected = model(**tokens()).logits
    covariance = found.predict(BATCH).covariance
    model.train(training)  # no dropout in it: the numbers are the same

    def plain() -> str | None:
        with torch.no_grad():
            logits = model(**tokens()).logits
        return wrong("logits", logits, expected)

    jobs = [plain, lambda: wrong("covariance", found.predict(BATCH).covariance, covariance), plain]
    complaints = together(jobs, 25)
    assert not complaints[:3]
    assert model.training is training


def test_fit_in_one_thread_and_the_plain_model_in_another():
    model = llama()
    with torch.no_grad():
        expected = model(**tokens()).logits
    settings: dict[str, Any] = {"class_token_ids": IDS, "rank": None}
    factors = blk.LaplaceLoRA(model, **settings).fit([BATCH], progress=False).predict(BATCH).covariance

    def plain() -> str | None:
        with torch.no_grad():
            return wrong("logits", model(**tokens()).logits, expected)

    def fit() -> str | None:
        return wrong(
            "covariance",
            blk.LaplaceLoRA(model, **settings).fit([BATCH], progress=False).predict(BATCH).covariance,
            factors,
        )

    assert not together([plain, fit, plain], 12)[:3]


def test_modes_and_hooks_after_many_threads():
    model = llama()
    model.train()
    found = blk.LaplaceLoRA(model, class_token_ids=IDS, rank=None).fit([BATCH], progress=False)
    together([lambda i=i: found.predict(rows(i)) and None for i in range(4)], 15)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_harness_sees_what_threads_complain_of():
    assert together([lambda: None, lambda: "wrong"], 2) == ["wrong", "wrong"]
    assert wrong("x", torch.ones(2), torch.zeros(2) + 2)
