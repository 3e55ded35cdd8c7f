"""What is captured from a running model: Jacobians equal autograd's, and the model never notices."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from dense import jacobians, relative
from models import Case, bert, gpt2, llama, lora, mlp, randomise, seq2seq, t5
from torch import Tensor, nn

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.forward import Forward
from bayesian_lora_kernels.model.jacobians import Jacobians
from bayesian_lora_kernels.model.layers import find_layers
from bayesian_lora_kernels.model.measuring import measuring
from bayesian_lora_kernels.model.pieces import capture


def two_adapters(active: list[str]) -> Case:
    case = llama()
    other = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    case.model.add_adapter("other", other)
    randomise(case.model).double()
    case.model.base_model.set_adapter(active)
    return case


def under_checkpointing(case: Case) -> Case:
    case.model.train()
    case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return case


def all_biases() -> Case:
    """LoRA with bias="all" on a module whose biases are all in nn.Linear."""
    case = mlp()
    case.model = lora(case.model, ["twice"], bias="all").double()
    return case


def parts_called_apart() -> Case:
    """A trainable bias alone, and a trainable weight without its bias."""
    return mlp(trainable=("first.bias", "twice.weight", "last.weight", "last.bias"))


LAST_HEAD = ("q_proj", "v_proj", "lm_head")

# name: (case, padding of the batch, which examples)
CASES: dict[str, tuple[Callable[[], Case], dict, list[int] | None]] = {
    "llama, class ids": (llama, {}, None),
    "llama, whole vocabulary": (lambda: llama(classes=None), {}, None),
    "llama, left padding": (llama, {"side": "left", "extra": 3}, None),
    "llama, right padding": (llama, {"side": "right", "extra": 3}, None),
    "llama, one example": (lambda: llama(lengths=(4,)), {}, None),
    "llama, one token": (lambda: llama(lengths=(1, 1, 1), targets=("v_proj", "o_proj")), {}, None),
    "llama, one token padded": (lambda: llama(lengths=(1, 2, 1)), {"side": "left"}, None),
    "llama, every linear": (lambda: llama(targets="all-linear"), {}, None),
    "llama, rank-stabilised": (lambda: llama(use_rslora=True), {}, None),
    "llama, bias": (lambda: llama(bias="lora_only"), {}, None),
    "llama, checkpointing": (lambda: under_checkpointing(llama()), {"side": "left"}, None),
    "llama, first of two adapters": (lambda: two_adapters(["default"]), {}, None),
    "llama, two adapters at once": (lambda: two_adapters(["default", "other"]), {}, None),
    "gpt2": (gpt2, {}, None),
    "gpt2, left padding": (gpt2, {"side": "left", "extra": 2}, None),
    "bert": (bert, {"extra": 1}, None),
    "bert, bias": (lambda: bert(bias="lora_only"), {}, None),
    "bert, one score": (lambda: bert(classes=1), {}, None),
    "bert, checkpointing": (lambda: under_checkpointing(bert(lora_dropout=0.0)), {}, None),
    "t5": (t5, {"extra": 1}, None),
    "encoder and decoder": (seq2seq, {}, None),
    "encoder and decoder, no decoder mask": (lambda: seq2seq(decoder_mask=False), {}, None),
    "mlp": (mlp, {}, None),
    "mlp, one example": (lambda: mlp(n=1), {}, None),
    "mlp, one score": (lambda: mlp(classes=1), {}, None),
    "mlp, tokens": (lambda: mlp(tokens=4), {}, None),
    "mlp, checkpointed": (lambda: mlp(checkpointed=True), {}, None),
    "mlp, tokens checkpointed": (lambda: mlp(tokens=4, checkpointed=True), {}, None),
    "mlp, some parameters": (parts_called_apart, {}, None),
    "mlp, every bias": (all_biases, {}, None),
}


def captured(case: Case, batch) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Logits, and `{module: [N, C, d_out, d_in]}` twice: formed while capturing, and from inputs and gradients."""
    forward = Forward(case.model, None, case.arguments.get("class_token_ids"))
    layers = find_layers(case.model, None, forward.head_rows)
    names = [layer.name for layer in layers]
    formed, assembled = [], []
    with measuring(case.model):
        recorded = capture(layers, forward, Batch.of(batch))
        for c in range(recorded.logits.shape[1]):
            cotangent = torch.zeros_like(recorded.logits)
            cotangent[:, c] = 1
            formed.append(recorded.backward(cotangent, weight_gradients=names))
            gradients = recorded.backward(cotangent)
            assembled.append({})
            for name, (a, mask, _) in recorded.inputs.items():
                valid = torch.ones(a.shape[:2], dtype=a.dtype) if mask is None else mask.to(a.dtype)
                assembled[-1][name] = torch.einsum("nt,nto,nti->noi", valid, gradients[name], a)
    stack = [{n: torch.stack([part[n] for part in parts], dim=1) for n in names} for parts in (formed, assembled)]
    return recorded.logits.detach(), stack[0], stack[1]


@pytest.mark.parametrize("name", CASES)
def test_captured_jacobians_are_those_of_autograd(name):
    build, padding, which = CASES[name]
    case = build()
    logits, truth = jacobians(case)
    got, formed, assembled = captured(case, case.batch(which, **padding))
    assert relative(got, logits) < 1e-10
    assert list(formed) == list(truth)
    for module in truth:
        assert truth[module].abs().max() > 0, module
        assert relative(formed[module], truth[module]) < 1e-10, module
        assert relative(assembled[module], truth[module]) < 1e-10, module


@pytest.mark.parametrize("build", [lambda: llama(dtype=torch.float32), lambda: mlp(dtype=torch.float32)])
def test_captured_jacobians_in_float32(build):
    case = build()
    wide = copy.copy(case)
    wide.model = copy.deepcopy(case.model).double()
    if case.examples[0].is_floating_point():
        wide.examples = [x.double() for x in case.examples]
    _, formed, assembled = captured(case, case.batch())
    for module, truth in jacobians(wide)[1].items():
        assert formed[module].dtype == torch.float32
        assert relative(formed[module], truth) < 1e-5, module
        assert relative(assembled[module], truth) < 1e-5, module


@pytest.mark.parametrize("adapter", [{"targets": LAST_HEAD}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_an_adapted_head_is_restricted_to_the_rows_of_the_classes(adapter):
    case = llama(**adapter)
    ids = case.arguments["class_token_ids"]
    logits, truth = jacobians(case)  # of every row
    got, formed, _ = captured(case, case.batch(side="left", extra=2))
    assert relative(got, logits) < 1e-10
    heads = [name for name in truth if "lm_head" in name and "lora_A" not in name]
    assert len(heads) == 1
    for module in truth:
        expected = truth[module]
        if module in heads:
            others = [row for row in range(expected.shape[2]) if row not in ids]
            assert expected[:, :, others].abs().max() == 0
            expected = expected[:, :, ids]
        assert relative(formed[module], expected) < 1e-10, module


def test_class_ids_equal_the_whole_vocabulary_and_a_choice_of_outputs():
    some, whole = llama(), llama(classes=None)
    ids = torch.tensor(some.arguments["class_token_ids"])
    batches = [whole.batch(extra=1)]
    fitted = blk.LaplaceLoRA(whole.model, fisher="empirical", prior_precision=0.5).fit(batches, progress=False)
    chosen = fitted.predict(batches[0], outputs=ids)
    restricted = blk.LaplaceLoRA(some.model, class_token_ids=ids, prior_precision=0.5)
    restricted._fit = fitted._fit  # the same posterior: only the way to the logits differs
    predicted = restricted.predict(batches[0])
    assert relative(predicted.mean, chosen.mean) < 1e-12
    assert relative(predicted.covariance, chosen.covariance) < 1e-10


def test_dropout_is_off_while_measuring():
    quiet, noisy = bert(), bert(lora_dropout=0.5)
    for module in noisy.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    noisy.model.train()
    first, second = (blk.LaplaceLoRA(case.model).fit([case.batch()], progress=False) for case in (quiet, noisy))
    assert float(first.log_marginal_likelihood()) == pytest.approx(float(second.log_marginal_likelihood()), rel=1e-12)
    assert torch.equal(first.predict(quiet.batch()).covariance, second.predict(noisy.batch()).covariance)


@pytest.mark.parametrize("base_dtype", [torch.float64, torch.bfloat16], ids=str)
def test_projections_of_one_input_share_its_factor(base_dtype):
    case = llama(targets=("q_proj", "k_proj", "v_proj", "o_proj"), dtype=torch.float32).batch()
    model = llama(targets=("q_proj", "k_proj", "v_proj", "o_proj"), dtype=torch.float32).model
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(base_dtype)
        elif base_dtype == torch.float64:
            parameter.data = parameter.data.double()
    factors = (
        blk.LaplaceLoRA(model, class_token_ids=[1, 2]).fit([{**case, "labels": case["labels"] % 2}], False).factors
    )
    for layer in range(2):
        a = {p: [f for n, f in factors.items() if f"layers.{layer}." in n and f"{p}_proj.lora_A" in n] for p in "qkvo"}
        assert a["q"][0].a is a["k"][0].a
        assert a["q"][0].a is a["v"][0].a
        assert a["q"][0].a is not a["o"][0].a


def test_modules_called_with_different_inputs_do_not_share():
    case = mlp()
    factors = blk.LaplaceLoRA(case.model).fit([case.batch()], progress=False).factors
    assert len({id(f.a) for f in factors.values()}) == len(factors)


def test_an_input_changed_in_place_between_two_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            first = self.one(x)
            with torch.no_grad():
                x.mul_(2)
            return first + self.two(x)

    model = Model().double()
    with pytest.raises(ValueError, match="batch 0: one: its input was changed in place after it had used it"):
        blk.LaplaceLoRA(model).fit([(torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0]))], progress=False)
    model.one.weight.requires_grad_(False)  # its bias does not need the old x
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = (4 * x.T @ x / 4).clone()
    factors = blk.LaplaceLoRA(model).fit([(x.clone(), None)], progress=False).factors
    assert relative(factors["two"].a[:3, :3], expected) < 1e-12


def test_inputs_that_do_not_count_may_be_anything():
    """What a padded position holds has no part in a Jacobian, not even NaN."""
    case = llama()
    layers, forward = find_layers(case.model), Forward(case.model, None, [2, 5, 7])
    found = []
    for poison in (0.0, float("nan")):
        with measuring(case.model):
            recorded = capture(layers, forward, Batch.of(case.batch(side="right")))
            indices = torch.arange(3).expand(4, -1)
            jacobians_ = Jacobians(recorded, indices)
        for a, mask, _ in jacobians_.inputs.values():
            if mask is not None:
                a[~mask] = poison
        found.append({layer.name: jacobians_.matrix(layer.name) for layer in layers})
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())
    assert all(torch.isfinite(value).all() for value in found[1].values())
