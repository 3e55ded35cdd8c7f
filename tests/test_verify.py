"""The self-test on a user's own model agrees where there is nothing to find, and notices what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from models import Case, bert, gpt2, llama, mlp, seq2seq, t5
from snapshot import untouched, unusual
from torch import nn

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.verification import Agreement, Verification

MODELS = {
    "llama": llama,
    "llama, float32": lambda: llama(dtype=torch.float32),
    "llama, bfloat16": lambda: llama(dtype=torch.bfloat16),
    "llama, adapted head": lambda: llama(targets=("q_proj", "lm_head")),
    "llama, whole vocabulary": lambda: llama(classes=None),
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "encoder and decoder": seq2seq,
    "mlp": mlp,
    "mlp, one score": lambda: mlp(classes=1),
}


def verify(case: Case, **more) -> Verification:
    return blk.LaplaceLoRA(case.model, **{**case.arguments, **more}).verify(case.batch())


@pytest.mark.parametrize("name", MODELS)
def test_agrees(name):
    case = MODELS[name]()
    unusual(case.model)
    with untouched(case.model):
        found = verify(case)
    assert found.ok, str(found)
    compared = {one.what.split(",")[0]: one for one in found.agreements if one.error is not None}
    assert "Jacobians against autograd" in compared
    assert sum(one.error is not None for one in found.agreements) >= 3
    assert "fit of the examples in pieces against in one piece" in {one.what for one in found.agreements}


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 1.5 * g


def test_a_backward_pass_that_is_wrong_is_noticed():
    """Autograd and the captured Jacobians agree on it; differences do not."""
    case = mlp()

    class Wrong(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return WrongBackward.apply(self.inner(x))

    case.model = Wrong(case.model)
    found = verify(case)
    assert not found.ok
    assert [one.what for one in found.agreements if not one.ok] == [
        "derivative along a direction, backward pass against differences"
    ]
    assert "DIFFERS" in str(found)


def test_without_checks_it_still_notices():
    """`check="off"` believes what `verify` does not."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, 3 * self.weight, self.bias)

    case = mlp()
    case.model = nn.Sequential(Scaled(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with pytest.raises(ValueError, match="Scaled, a subclass"):
        verify(case)
    found = verify(case, check="off")
    assert not found.ok
    assert "0" in {one.where for one in found.agreements if not one.ok}


@pytest.mark.parametrize("build", [llama, mlp])
def test_a_batch_of_nothing(build):
    case = build()
    batch = case.batch()
    empty = {k: v[:0] for k, v in batch.items()} if isinstance(batch, dict) else tuple(v[:0] for v in batch)
    with untouched(case.model), pytest.raises(ValueError, match="verify: expected at least one example"):
        blk.LaplaceLoRA(case.model, **case.arguments).verify(empty)


def test_the_report():
    report = Verification((Agreement("this", "there", 1e-9, 1e-8), Agreement("that", "", None, 1e-8, "no reason")))
    assert report.ok
    assert json.loads(json.dumps(report.as_dict()))["agreements"][1]["error"] is None
    assert str(report).splitlines()[2].startswith("not compared")
    assert not Verification((Agreement("this", "", float("nan"), 1.0),)).ok
