"""The model comes back as it was, from whatever is done with it, whether that succeeds or fails."""

from __future__ import annotations

import pytest
import torch
from models import bert, gpt2, llama, mlp, t5
from snapshot import snapshot, untouched, unusual
from torch import nn

import bayesian_lora_kernels as blk

MODELS = {
    "llama": lambda: llama(targets=("q_proj", "v_proj", "lm_head")),
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "mlp": lambda: mlp(checkpointed=True),
}
SETTINGS = {
    "kfac": {"curvature": "kfac", "fisher": "mc"},
    "kfac, low-rank": {"curvature": "kfac", "rank": 2, "rank_threshold": 4},
    "ekfac": {"curvature": "ekfac"},
    "exact": {"curvature": "exact"},
}


@pytest.mark.filterwarnings("ignore::bayesian_lora_kernels.posterior.evidence.PriorPrecisionWarning")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_after_everything_worked(name, setting, tmp_path):
    case = MODELS[name]()
    unusual(case.model)
    noise = torch.Generator().manual_seed(0)
    with untouched(case.model), torch.inference_mode(mode=False):
        laplace = blk.LaplaceLoRA(case.model, **{**case.arguments, **SETTINGS[setting]})
        laplace.fit(case.loader(2), progress=False)
        laplace.optimize_prior_precision().optimize_prior_precision("nll", val_loader=case.loader(3)[:1])
        laplace.predict(case.batch()).probs(generator=noise)
        laplace.predict(case.batch(), outputs=2)
        laplace.sample_weights(2, noise)
        laplace.save_pretrained(tmp_path)
        blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)


def test_a_snapshot_sees_what_changes():
    """The check itself: each of these would be noticed."""
    changes = {
        "mode": lambda m: m.train(not m.training),
        "one module's mode": lambda m: m.last.eval(),
        "requires_grad": lambda m: m.last.weight.requires_grad_(False),
        "grad": lambda m: setattr(m.last.weight, "grad", torch.zeros_like(m.last.weight)),
        "weights": lambda m: m.last.weight.data.mul_(1.5),
        "hooks": lambda m: m.last.register_forward_hook(lambda *_: None),
        "forward": lambda m: setattr(m.last, "forward", lambda x: x),
        "random numbers": lambda m: torch.rand(1),
    }
    for what, change in changes.items():
        model = mlp().model
        before = snapshot(model)
        change(model)
        assert snapshot(model) != before, what


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "bert", "mlp"])
def test_after_forward_failed(name, setting):
    """An exception in the middle of the model, in the second batch, in fit and in predict."""
    case = MODELS[name]()
    unusual(case.model)
    laplace = blk.LaplaceLoRA(case.model, **{**case.arguments, **SETTINGS[setting]})
    laplace.fit(case.loader(2), progress=False)
    evidence = laplace.log_marginal_likelihood()
    inner = [m for m in case.model.modules() if isinstance(m, nn.Linear)][-1]
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("the model's own error")

    handle = inner.register_forward_pre_hook(fail)
    with untouched(case.model), pytest.raises(KeyError, match="the model's own error"):
        laplace.fit(case.loader(2), progress=False)
    calls[:] = [1]
    with untouched(case.model), pytest.raises(KeyError, match="the model's own error"):
        laplace.predict(case.batch())
    handle.remove()
    assert laplace.log_marginal_likelihood() == evidence
    laplace.predict(case.batch())


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact"])
def test_after_backward_failed(curvature):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("no gradient today")

    case = mlp()
    laplace = blk.LaplaceLoRA(case.model, curvature=curvature, forward=lambda m, batch: Fails.apply(m(batch[0])))
    with untouched(case.model), pytest.raises(RuntimeError, match="no gradient today"):
        laplace.fit([case.batch()], progress=False)


def test_after_an_interrupt():
    case = mlp(n=6)

    def loader():
        yield case.batch([0, 1])
        raise KeyboardInterrupt

    laplace = blk.LaplaceLoRA(case.model)
    unusual(case.model)
    with untouched(case.model), pytest.raises(KeyboardInterrupt):
        laplace.fit(loader(), progress=False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", MODELS)
def test_under_a_mode_without_gradients(name, mode):
    """Somebody's `torch.no_grad()` around a prediction does not matter."""
    case = MODELS[name]()
    laplace = blk.LaplaceLoRA(case.model, **case.arguments)
    expected = laplace.fit([case.batch()], progress=False).predict(case.batch()).covariance
    before = case.batch()
    with mode(), untouched(case.model):
        assert torch.equal(laplace.predict(before).covariance, expected)
        assert torch.equal(laplace.predict(case.batch()).covariance, expected)
        laplace.fit([case.batch()], progress=False)
    assert torch.equal(laplace.predict(before).covariance, expected)


def test_nothing_is_kept_alive():
    """The graph of a batch goes when the batch is done."""
    import gc
    import weakref

    case = mlp()
    seen = []
    case.model.last.register_forward_hook(lambda m, a, y: seen.append(weakref.ref(y)))
    for check, calls in (("off", 4), ("first", 6)):  # the first batches also run in reversed order
        seen.clear()
        laplace = blk.LaplaceLoRA(case.model, check=check).fit(case.loader(2), progress=False)
        laplace.predict(case.batch())
        gc.collect()
        assert len(seen) == calls
        assert all(ref() is None for ref in seen)
