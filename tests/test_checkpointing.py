"""Gradient checkpointing both ways: the numbers of the model without it, or the error that says what to do."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from dense import relative
from sharded import BATCHES, IDS, llama
from situations import REFUSALS, adapted
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bayesian_lora_kernels as blk

BATCH = (torch.ones(4, 5).double().cumsum(0).sin(), torch.arange(4) % 3)


def covariance(model: nn.Module, batches: list[Any], **settings: Any) -> Tensor:
    laplace = blk.LaplaceLoRA(model, rank=None, **settings).fit(batches, progress=False)
    return laplace.predict(batches[0]).covariance


@functools.cache
def expected() -> Tensor:
    return covariance(llama(), BATCHES, class_token_ids=IDS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_of_transformers(reentrant: bool, train: bool):
    """Also under re-entrant checkpointing layers run again in the backward pass: memory is saved as in training."""
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train(train)
    layer = model.get_base_model().model.layers[0]
    function, runs = layer._gradient_checkpointing_func, []
    layer.mlp.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    laplace = blk.LaplaceLoRA(model, rank=None, class_token_ids=IDS, check="off").fit(BATCHES, progress=False)
    assert len(runs) > len(BATCHES)
    assert all(runs)
    assert relative(laplace.predict(BATCHES[0]).covariance, expected()) < 1e-10
    assert layer._gradient_checkpointing_func is function
    assert {module.training for module in model.modules()} == {train}


class Own(nn.Module):
    """Checkpoints by itself, in every mode."""

    def __init__(self, reentrant: bool | None, with_graph: bool = True):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.reentrant, self.with_graph = reentrant, with_graph

    def body(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.c(self.body(x))
        x = x.clone().requires_grad_(self.with_graph)
        return self.c(checkpoint(self.body, x, use_reentrant=self.reentrant))


class Frozen(Own):
    """What is checkpointed carries no posterior, but gradients to what does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(checkpoint(lambda h: torch.tanh(self.b(h)), self.a(x), use_reentrant=True))


class Twice(Own):
    """One layer inside and outside."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(checkpoint(self.a, x.clone().requires_grad_(), use_reentrant=True) + self.a(x))


def seeded(build: Any) -> Any:
    torch.manual_seed(0)
    return build().double()


def test_a_module_that_checkpoints_by_itself():
    whole = covariance(seeded(lambda: Own(None)), [BATCH])
    assert relative(covariance(seeded(lambda: Own(False)), [BATCH]), whole) < 1e-12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "build", [lambda: Own(True), lambda: Own(True, False), lambda: Frozen(True), lambda: Twice(True)]
)
def test_reentrant_checkpointing_of_its_own_is_refused(build: Any):
    """loss.backward() has gradients there which no other way to differentiate sees."""
    model = seeded(build)
    if isinstance(model, Frozen):
        model.b.requires_grad_(False)
    with pytest.raises(REFUSALS, match="use_reentrant=False"):
        blk.LaplaceLoRA(model).fit([BATCH], progress=False)


def test_an_encoder_that_runs_without_gradients():
    """It says nothing about its adapter, and the error says that; what else calls it may run without."""

    class Encoder(nn.Module):
        def __init__(self, both: bool):
            super().__init__()
            self.both, self.a, self.c = both, nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                first = self.a(x)
            return self.c(first + self.a(x) if self.both else first)

    with pytest.raises(ValueError, match=r"a: it runs without gradients, under torch.no_grad"):
        blk.LaplaceLoRA(seeded(lambda: Encoder(False))).fit([BATCH], progress=False)
    model = seeded(lambda: Encoder(True))
    laplace = blk.LaplaceLoRA(model, prior_precision=1e6, curvature="exact").fit([BATCH], progress=False)
    rows = []
    for one in model(BATCH[0])[0]:
        gradients = torch.autograd.grad(one, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    jacobian = torch.stack(rows)
    assert relative(laplace.predict(BATCH).covariance[0] * 1e6, jacobian @ jacobian.T) < 1e-3


# Half precision


def halved(dtype: torch.dtype, adapter: bool) -> Any:
    """A tiny model in half precision, with or without its adapter, and the float32 model of the same numbers."""
    narrow = llama(causal=False).to(dtype)
    if not adapter:
        for name, p in narrow.named_parameters():
            if "lora_" in name:
                p.data = p.data.float()
    wide = llama(causal=False)
    wide.load_state_dict({name: value.double() for name, value in narrow.state_dict().items()})
    return narrow, wide


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact"])
@pytest.mark.parametrize("adapter", [True, False], ids=["all", "base"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, adapter: bool, curvature: str):
    """Off by the rounding of the model's own passes: half the digits of a tiny model's logits, and no more."""
    narrow, wide = halved(dtype, adapter)
    off = relative(
        covariance(narrow, BATCHES, curvature=curvature, fisher="exact").double(),
        covariance(wide, BATCHES, curvature=curvature, fisher="exact"),
    )
    assert off < {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype], off


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact"])
def test_autocast_of_a_transformer(curvature: str):
    wide = covariance(llama(causal=False).float(), BATCHES, curvature=curvature, fisher="exact")
    with torch.autocast("cpu", torch.bfloat16):
        narrow = covariance(llama(causal=False).float(), BATCHES, curvature=curvature, fisher="exact")
    assert 1e-5 < relative(narrow, wide) < 0.05


def test_adapters_alone_in_half_precision():
    """LoRA in bfloat16 beside layers in float32, for which PEFT casts inputs."""
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), ["0", "2"]).float()
    wide = covariance(model, [(BATCH[0].float(), BATCH[1])], fisher="exact")
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.bfloat16()
    narrow = covariance(model, [(BATCH[0].float(), BATCH[1])], fisher="exact")
    assert 1e-6 < relative(narrow, wide) < 0.05
