"""Every bad input is refused with what was expected, what came and where; the model stays as it was, a fit usable."""

from __future__ import annotations

import peft
import pytest
import torch
from models import bert, llama, lora, mlp, randomise
from snapshot import untouched
from torch import nn

import bayesian_lora_kernels as blk

NAN, INF = float("nan"), float("inf")


def frozen():
    model = mlp().model
    return model.requires_grad_(False)


def alora():
    return lora(llama().model.unload(), ["o_proj"], alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM")


def embedding():
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))


def nothing_linear():
    model = embedding()
    model[1].requires_grad_(False)
    return model


def norms():
    return nn.ModuleDict({f"norm{i}": nn.LayerNorm(3) for i in range(4)} | {"fc": nn.Linear(3, 2)})


def tied():
    model = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)})
    model["two"].weight = model["one"].weight
    return model


def plain():
    return mlp().model


CONSTRUCTION = {
    "no trainable parameter": (frozen, {}, ValueError, r"no trainable parameter: expected .* requires_grad=True"),
    "aLoRA": (alora, {}, ValueError, r"o_proj.lora_A.default: expected plain LoRA or DoRA, its adapter is a ALora"),
    "embedding": (embedding, {}, ValueError, r"parameters outside nn.Linear: 0.weight. Freeze .* pass modules='\.\*'"),
    "embedding alone": (nothing_linear, {}, ValueError, r"outside nn.Linear: 0.weight. .* and none is trainable"),
    "many norms": (norms, {}, ValueError, r"norm0.weight, norm0.bias, .* and 3 more"),
    "tied weights": (tied, {}, ValueError, r"shared by several modules.*one.weight, two.weight"),
    "not a module": (lambda: "gpt2", {}, TypeError, r"model: expected an nn.Module, got str"),
    "forward": (plain, {"forward": 3}, TypeError, r"forward: expected a callable\(model, batch\) -> logits, got int"),
    "pattern": (plain, {"modules": "nothing.*"}, ValueError, r"modules: nothing.* matches no .*there are first, twice"),
    "names": (plain, {"modules": ["last", "lost"]}, ValueError, r"modules: lost matches no trainable nn.Linear"),
    "no names": (plain, {"modules": []}, ValueError, r"modules: an empty list matches no"),
    "kind of names": (plain, {"modules": 3}, TypeError, r"modules: expected a regular expression or a list.* got int"),
    "likelihood": (plain, {"likelihood": "poisson"}, ValueError, r"likelihood: expected one of .*got 'poisson'"),
    "curvature": (
        plain,
        {"curvature": "full"},
        ValueError,
        r"curvature: expected one of kfac, ekfac, exact.*, got 'full'",
    ),
    "fisher": (
        plain,
        {"fisher": "true"},
        ValueError,
        r"fisher: expected one of auto, mc, exact, empirical, got 'true'",
    ),
    "tokens": (plain, {"tokens": "first"}, ValueError, r"tokens: expected one of expand, reduce, last, got 'first'"),
    "rank 0": (plain, {"rank": 0}, ValueError, r"rank: expected at least 1, got 0"),
    "rank 1.5": (plain, {"rank": 1.5}, TypeError, r"rank: expected a positive int or None, got 1.5"),
    "threshold": (plain, {"rank_threshold": -1}, ValueError, r"rank_threshold: expected at least 1, got -1"),
    "samples": (plain, {"fisher_samples": 0}, ValueError, r"fisher_samples: expected at least 1, got 0"),
    "budget": (plain, {"memory_budget": 0}, ValueError, r"memory_budget: expected at least 1, got 0"),
    "row dtype": (
        plain,
        {"row_dtype": torch.int8},
        TypeError,
        r"row_dtype: expected a floating-point .*got torch.int8",
    ),
    "prior 0": (plain, {"prior_precision": 0.0}, ValueError, r"prior_precision: expected a finite positive .*got 0.0"),
    "prior -1": (plain, {"prior_precision": -1}, ValueError, r"prior_precision: expected a finite positive .*got -1"),
    "prior NaN": (plain, {"prior_precision": NAN}, ValueError, r"prior_precision: .*positive number, got nan"),
    "prior inf": (plain, {"prior_precision": INF}, ValueError, r"prior_precision: .*positive number, got inf"),
    "priors": (
        plain,
        {"prior_precision": torch.ones(3)},
        ValueError,
        r"one positive number, got a tensor of shape \[3\]",
    ),
    "prior None": (plain, {"prior_precision": None}, TypeError, r"prior_precision: expected .* got NoneType"),
    "prior text": (plain, {"prior_precision": "big"}, TypeError, r"prior_precision: expected .* got str"),
    "a module's": (plain, {"prior_precision": {"first": 1.0}}, ValueError, r"one number for each of 3 .*last, twice"),
    "a wrong one": (
        plain,
        {"prior_precision": {"first": 1.0, "twice": 1.0, "last": -2.0}},
        ValueError,
        r"prior_precision: expected a finite positive number, got -2.0",
    ),
    "class ids": (lambda: llama().model, {"class_token_ids": [3, 13]}, ValueError, r"ids from 0 to 12, got 3 to 13"),
    "negative ids": (lambda: llama().model, {"class_token_ids": [-1, 3]}, ValueError, r"from 0 to 12, got -1 to 3"),
    "ids twice": (
        lambda: llama().model,
        {"class_token_ids": [3, 3]},
        ValueError,
        r"expected distinct ids, got \[3, 3\]",
    ),
    "no ids": (lambda: llama().model, {"class_token_ids": []}, ValueError, r"expected \[C\] integers, got"),
    "ids of floats": (
        lambda: llama().model,
        {"class_token_ids": [1.0]},
        ValueError,
        r"\[C\] integers, got torch.float",
    ),
    "ids without a head": (lambda: bert().model, {"class_token_ids": [1, 2]}, ValueError, r"expected a causal LM with"),
    "ids and forward": (
        lambda: llama().model,
        {"class_token_ids": [1, 2], "forward": lambda m, b: m(**b).logits},
        ValueError,
        r"class_token_ids: expected none together with forward",
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_construction(name):
    build, arguments, error, message = CONSTRUCTION[name]
    model = build()
    if not isinstance(model, nn.Module):
        with pytest.raises(error, match=message):
            blk.LaplaceLoRA(model, **arguments)
        return
    with untouched(model), pytest.raises(error, match=message):
        blk.LaplaceLoRA(model, **arguments)


def test_other_trainable_parameters_are_fine_if_the_modules_are_chosen():
    model = embedding()
    batch = (torch.tensor([[1], [2]]), torch.tensor([0, 1]))
    forward = lambda m, b: m(b[0])[:, 0]  # noqa: E731
    laplace = blk.LaplaceLoRA(model, forward=forward, modules=["1"]).fit([batch], progress=False)
    assert list(laplace.posterior) == ["1"]


X, Y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 1, 0])


def with_entry(x, value):
    x = x.clone()
    x[2, 1] = value
    return x


def two(loader_of_one):
    return [(X, Y), loader_of_one]


# name: (loader, arguments, error, message)
FIT = {
    "empty loader": ([], {}, ValueError, r"loader: expected at least one batch with at least one example, got none"),
    "empty batch": ([(X[:0], Y[:0])], {}, ValueError, r"loader: expected at least one batch with at least one example"),
    "NaN input": (two((with_entry(X, NAN), Y)), {}, ValueError, r"batch 1: the logits are not finite"),
    "infinite input": (two((with_entry(X, INF), Y)), {}, ValueError, r"batch 1: the logits are not finite"),
    "no labels": (
        two((X, None)),
        {"fisher": "empirical"},
        ValueError,
        r"labels: the empirical Fisher needs them, .*none",
    ),
    "only inputs": ([X], {"fisher": "empirical"}, ValueError, r"labels: the empirical Fisher needs them"),
    "label too large": (two((X, Y + 1)), {}, ValueError, r"batch 1: labels: expected class indices from 0 to 2, got 3"),
    "label negative": ([(X, Y - 1)], {}, ValueError, r"batch 0: labels: expected class indices from 0 to 2, got -1"),
    "label ignored": ([(X, Y - 100)], {}, ValueError, r"labels: expected class indices from 0 to 2, got -100"),
    "labels of floats": (
        [(X, Y.double())],
        {},
        ValueError,
        r"class indices of shape \[5\], got torch.float64 of shape",
    ),
    "too few labels": (
        [(X, Y[:3])],
        {},
        ValueError,
        r"labels: expected one .* 5 examples of inputs \[5, 4\], .* \[3\]",
    ),
    "targets": ([(X, X)], {"likelihood": "regression"}, ValueError, r"targets of shape \[5, 3\] .* got \[5, 4\]"),
    "NaN target": ([(X, X[:, :3] * NAN)], {"likelihood": "regression"}, ValueError, r"finite targets, got NaN or inf"),
    "a batch of three": ([(X, Y, Y)], {}, TypeError, r"batch: expected a mapping .* got tuple of length 3"),
    "a batch of text": (["hello"], {}, TypeError, r"batch: expected a mapping .* got str"),
    "an iterator": (
        iter([(X, Y)]),
        {"curvature": "ekfac"},
        ValueError,
        r"EKFAC goes over the data twice.* got an iter",
    ),
    "logits of no batch": ([(X, Y)], {"forward": lambda m, b: m(b[0])[:2]}, ValueError, r"\[5, C\] .*, got \[2, 3\]"),
    "logits of 1 dim": ([(X, Y)], {"forward": lambda m, b: m(b[0])[:, 0]}, ValueError, r"shape \[5, C\].*got \[5\]"),
    "logits of 4 dims": ([(X, Y)], {"forward": lambda m, b: m(b[0])[:, None, None]}, ValueError, r"got \[5, 1, 1, 3\]"),
    "no logits": ([(X, Y)], {"forward": lambda m, b: {"loss": 1}}, TypeError, r"expected logits \(a tensor.* got dict"),
    "detached": (
        [(X, Y)],
        {"forward": lambda m, b: m(b[0]).detach()},
        ValueError,
        r"logits do not depend on any of the",
    ),
    "mask": (
        [(X, Y)],
        {"forward": lambda m, b: (m(b[0])[:, None], Y)},
        ValueError,
        r"a mask of shape \[5, 1\], got \[5\]",
    ),
    "mask of floats": ([(X, Y)], {"forward": lambda m, b: (m(b[0])[:, None], X)}, TypeError, r"with a bool mask"),
    "loss nowhere": (
        [(X, Y[:, None])],
        {"forward": lambda m, b: (m(b[0])[:, None], torch.zeros(5, 1) > 0)},
        ValueError,
        r"mask: expected at least one position that carries a loss",
    ),
    "never called": (
        [(X, Y)],
        {"forward": lambda m, b: m.last(m.first(b[0]))},
        ValueError,
        r"twice: never called by forw",
    ),
    "one logit": (
        [(X, Y)],
        {"forward": lambda m, b: m(b[0])[:, :1]},
        ValueError,
        r"at least 2 logits, got 1; .*regression",
    ),
    "one logit, no labels": (
        [X],
        {"forward": lambda m, b: m(b)[:, :1]},
        ValueError,
        r"at least 2 logits, got 1; .*regress",
    ),
}


@pytest.mark.parametrize("name", FIT)
@pytest.mark.parametrize("curvature", ["kfac", "exact"])
def test_fit(name, curvature):
    loader, arguments, error, message = FIT[name]
    model = mlp().model
    laplace = blk.LaplaceLoRA(model, **{"curvature": curvature, **arguments})
    with untouched(model), pytest.raises(error, match=message):
        laplace.fit(loader, progress=False)
    with pytest.raises(RuntimeError, match=r"predict: call fit\(loader\) first"):
        laplace.predict((X, Y))


@pytest.mark.parametrize("way", ["merged", "disabled", "another adapter active"])
def test_an_adapter_that_is_not_in_use(way):
    case = llama()
    laplace = blk.LaplaceLoRA(case.model, **case.arguments)
    if way == "merged":
        case.model.merge_adapter()
    elif way == "disabled":
        case.model.base_model.disable_adapter_layers()
    else:
        case.model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
        randomise(case.model).double().set_adapter("other")
    with untouched(case.model), pytest.raises(ValueError, match=r"batch 0: .*(none was called|never called)"):
        laplace.fit([case.batch()], progress=False)


def test_examples_that_are_regrouped():
    """Experts that see the tokens of all examples in one list cannot be told apart."""
    model = nn.ModuleDict({"expert": nn.Linear(4, 2), "head": nn.Linear(2, 3)}).double()

    def forward(m, batch):
        tokens = m["expert"](batch[0].flatten(0, 1)[:7])
        return m["head"](tokens[:5])

    laplace, x = blk.LaplaceLoRA(model, forward=forward), torch.randn(5, 2, 4).double()
    message = (
        r"batch 0: expert: its input, of shape \[7, 4\], does not have the batch's 5 examples apart in any .* does not "
        r"run by itself"
    )
    with untouched(model), pytest.raises(ValueError, match=message):
        laplace.fit([(x, Y)], progress=False)
