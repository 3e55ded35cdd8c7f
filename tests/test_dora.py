"""DoRA: the posterior over A and B with the magnitudes and norms held, against autograd of the PEFT model itself."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from dense import Tokens, dense_factor, evidence, fisher_columns, kfac_factors, output_fisher, relative, rows_of
from models import VOCABULARY, bert, gpt2, llama
from peft.tuners.lora import dora as peft_dora
from situations import (
    CURVATURES,
    Scene,
    adapted,
    dense_covariance,
    exact_covariance,
    fit,
    ggn_traces,
    judge_scene,
    kfac_truth,
    labelled,
    padded,
    posterior_traces,
    run_last,
    tensors,
    truth,
    unpadded_row,
    without_labels,
)
from snapshot import untouched
from test_padding_that_counts import WithClassToken
from torch import Tensor, nn

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.model.dora import constant_norms
from bayesian_lora_kernels.predictive.jvp import METHODS, JacobianVectorProduct

ON_TOP = "base_result" in inspect.signature(peft_dora.DoraLinearLayer.forward).parameters


# Models


def grown(model: nn.Module) -> Any:
    """With magnitudes that are not the norms any more, as after fine-tuning."""
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_magnitude_vector" in name:
                p.mul_(1 + 0.3 * torch.randn(p.shape, generator=noise, dtype=torch.float64).to(p.dtype))
    return model.eval()


def causal(lengths: tuple[int, ...] = (5, 3, 6, 4), side: str = "right", **config: Any) -> Scene:
    case = llama(use_dora=True, lora_dropout=0.1, **config)
    batch = labelled(padded(lengths, VOCABULARY, side=side))
    ids = case.arguments["class_token_ids"]

    def run(model: nn.Module, example: Any) -> Tensor:
        return model(**example, logits_to_keep=1).logits[:, -1, list(ids)]

    return Scene(grown(case.model), [batch], run, arguments=case.arguments)


def conv1d() -> Scene:
    base = gpt2().model.unload()
    config = peft.LoraConfig(
        r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True, task_type="CAUSAL_LM"
    )
    model = randomised(peft.get_peft_model(base, config))
    return Scene(
        grown(model),
        [labelled(padded((5, 3, 6), VOCABULARY))],
        run_last((1, 4, 5)),
        arguments={"class_token_ids": [1, 4, 5]},
    )


def randomised(model: Any) -> Any:
    noise = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.5 * torch.randn(p.shape, generator=noise, dtype=torch.float64))
    return model.double()


def classifier() -> Scene:
    """Base layers with biases, and a head that is trained as a whole."""
    case = bert(use_dora=True)
    return Scene(grown(case.model), [labelled(padded((5, 3, 6), VOCABULARY)), labelled(padded((4,), VOCABULARY))])


class Rows(nn.Module):
    """A layer that sees `[N, d]`: with N = d that is the shape of the identity matrix that DoRA sends through A."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def rows(n: int) -> Scene:
    torch.manual_seed(0)
    model = peft.get_peft_model(Rows(), peft.LoraConfig(r=2, target_modules=["first"], use_dora=True))
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Scene(grown(randomised(model)), [(x, torch.arange(n) % 3)])


def another_adapter() -> Scene:
    scene = causal()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], use_dora=True, task_type="CAUSAL_LM")
    scene.model.add_adapter("other", config)
    randomised(scene.model).set_adapter("default")
    return scene


def checkpointed() -> Scene:
    scene = causal()
    scene.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    scene.model.train()
    return scene


def two_at_once() -> Scene:
    scene = another_adapter()
    scene.model.base_model.set_adapter(["default", "other"])
    return scene


def with_plain_lora(first: bool) -> Scene:
    """On top of the other: the second of two adapters sees what the first made of its layer."""
    scene = another_adapter()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    scene.model.add_adapter("plain", config)
    randomised(scene.model).base_model.set_adapter(["plain", "other"] if first else ["default", "plain"])
    return scene


SCENES: dict[str, Callable[[], Scene]] = {
    "llama": causal,
    "llama, padded on the left": lambda: causal(side="left"),
    "as many tokens as features": lambda: causal((16,)),
    "as many examples as features": lambda: causal((3,) * 16),
    "every linear layer": lambda: causal(targets="all-linear"),
    "adapted head": lambda: causal(targets=("q_proj", "lm_head")),
    "Conv1D": conv1d,
    "biases and a trained head": classifier,
    "[N, d]": lambda: rows(4),
    "[d, d]": lambda: rows(6),
    "under checkpointing": checkpointed,
    "two adapters, one active": another_adapter,
    "two adapters, both active": two_at_once,
    "plain LoRA, and DoRA on top": lambda: with_plain_lora(first=True),
    "DoRA, and plain LoRA on top": lambda: with_plain_lora(first=False),
}


# The truth


class Rescaled(nn.Module):
    """What a DoRA layer is with its row scales `D = m / ||W + s B A||` held: `D (W x + s B A x) + b`.

    PEFT puts a second adapter on top of what the first makes of W x, PEFT 0.13 beside it.
    """

    def __init__(self, layer: Any, held: bool):
        super().__init__()
        self.lora_A, self.lora_B, base = layer.lora_A, layer.lora_B, layer.get_base_layer()
        self.weight = (base.weight.mT if layer.fan_in_fan_out else base.weight).detach()
        self.bias = base.bias
        self.names = [name for name in layer.active_adapters if name in layer.lora_A]
        self.scalings = dict(layer.scaling)
        vectors = layer.lora_magnitude_vector
        self.magnitudes = {name: vectors[name].weight.detach() for name in self.names if name in vectors}
        self.norms = {name: self.norm(name).detach() for name in self.magnitudes} if held else {}

    def norm(self, name: str) -> Tensor:
        product = self.lora_B[name].weight @ self.lora_A[name].weight
        return torch.linalg.norm(self.weight + self.scalings[name] * product, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        y = base = x @ self.weight.mT
        for name in self.names:
            added = self.scalings[name] * self.lora_B[name](self.lora_A[name](x))
            if name in self.magnitudes:
                scale = self.magnitudes[name] / self.norms.get(name, self.norm(name))
                added = scale * added + (scale - 1) * (y if ON_TOP else base)
            y = y + added
        return y if self.bias is None else y + self.bias


def rescaled(model: nn.Module, held: bool = True) -> nn.Module:
    """The same model, the very same A and B in it, without PEFT's DoRA code: each is called once.

    With `held=False` the norms follow A and B, for autograd too.
    """
    kept = {id(m): m for m in model.modules() if isinstance(m, nn.Linear)} | {id(p): p for p in model.parameters()}
    other = copy.deepcopy(model, kept)
    for name, module in list(other.named_modules()):
        if hasattr(module, "lora_magnitude_vector"):
            owner, _, leaf = name.rpartition(".")
            setattr(other.get_submodule(owner), leaf, Rescaled(module, held))
    return other


def posterior_layers(model: nn.Module) -> list[str]:
    names = [name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad]
    return [name for name in dict.fromkeys(names) if "lora_magnitude_vector" not in name]


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", SCENES)
def test_fits_and_predictions(name: str, curvature: str) -> None:
    """Means and Jacobians of the PEFT model itself, and the factors of the model with its scales written out."""
    scene = SCENES[name]()
    with untouched(scene.model):
        laplace = fit(scene, curvature=curvature)
        predictions = [laplace.predict(without_labels(batch)) for batch in scene.batches]
    names = posterior_layers(scene.model.eval())
    assert [layer.name for layer in laplace.layers] == names
    scene.factors = False
    examples = truth(scene, names)
    train = [x for batch in examples for x in batch]
    head_rows = scene.arguments.get("class_token_ids")
    for found, batch in zip(predictions, examples, strict=True):
        assert relative(found.mean, torch.stack([x.logits for x in batch])) < 1e-10
        if curvature == "exact":
            expected = exact_covariance(train, batch)
        else:
            expected = dense_covariance(laplace.posterior, [x.jacobian for x in batch], head_rows)
        assert relative(found.covariance, expected) < 1e-8
    if curvature == "ekfac":
        traces, whole = ggn_traces(train), posterior_traces(laplace)
        assert all(abs(whole[one] - traces[one]) < 1e-8 * sum(traces.values()) for one in names)
    if curvature == "kfac":
        scene.factors, scene.plain = True, rescaled(scene.model)
        plain = truth(scene, names)
        assert relative(torch.stack([x.logits for x in plain[0]]), torch.stack([x.logits for x in examples[0]])) < 1e-10
        for one, (a, s) in kfac_truth([x for batch in plain for x in batch]).items():
            assert relative(laplace.factors[one].a, a) < 1e-8
            if laplace.factors[one].s.shape == s.shape:
                assert relative(laplace.factors[one].s, s) < 1e-8


@pytest.mark.parametrize("tokens", ["expand", "reduce", "last"])
def test_factors_by_the_kind_of_tokens_and_low_rank(tokens: str) -> None:
    """An identity matrix among the inputs would be seen in any of them."""
    scene = causal()
    names, plain, batch = posterior_layers(scene.model), rescaled(scene.model), scene.batches[0]
    examples = [unpadded_row(batch, i) for i in range(len(batch["labels"]))]
    seen = [Tokens(plain, names, lambda x=x: scene.run(plain, x)[0]) for x in examples]
    expected = kfac_factors(seen, names, tokens, lambda one: fisher_columns(one.logits))
    laplace = fit(scene, tokens=tokens)
    low = fit(scene, tokens=tokens, rank=3, rank_threshold=8)
    for name, (a, s) in expected.items():
        assert relative(laplace.factors[name].a, a) < 1e-10
        if laplace.factors[name].s.shape == s.shape:
            assert relative(laplace.factors[name].s, s) < 1e-10
        found = low.factors[name]
        if found.a.shape[1] < len(a):
            whole = dense_factor(found.a, found.tail_a)
            assert float(whole.trace()) == pytest.approx(float(a.trace()), rel=1e-8)  # the tail has what is left out
            kept = torch.linalg.eigvalsh(a)[-found.a.shape[1] :]
            assert relative(found.a.square().sum(dim=0).sort().values, kept) < 0.05


def test_evidence() -> None:
    """Of A and B alone: the magnitudes are no part of the weights that the prior is over."""
    scene = causal()
    laplace = fit(scene, curvature="exact", prior_precision=0.7)
    names = posterior_layers(scene.model)
    scene.factors = False
    (train,) = truth(scene, names)
    curvature = sum(
        j.T @ output_fisher(x.logits) @ j
        for x in train
        for j in [torch.cat([x.jacobian[name].flatten(1) for name in names], dim=1)]
    )
    weights = torch.cat([scene.model.get_submodule(name).weight.detach().flatten() for name in names])
    labels = scene.batches[0]["labels"].tolist()
    likelihood = sum(float(x.logits.log_softmax(0)[y]) for x, y in zip(train, labels, strict=True))
    expected = evidence(likelihood, weights, curvature, torch.full_like(weights, 0.7))
    assert float(laplace.log_marginal_likelihood()) == pytest.approx(float(expected), rel=1e-8)


# The whole vocabulary


def hidden_jacobian(model: nn.Module, names: list[str], example: Any) -> dict[str, Tensor]:
    """`{module: [d, d_out, d_in]}` of what the head is handed at the last token."""
    seen: list[Tensor] = []
    head = model.get_base_model().get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0, -1]))
    model(**example)
    handle.remove()
    return dict(zip(names, rows_of(seen[0], [model.get_submodule(name).weight for name in names]), strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("config", [{}, {"targets": ("q_proj", "down_proj")}])
def test_a_sample_is_the_jacobian_times_a_sample_of_the_weights(config: dict[str, Any], method: str) -> None:
    """By every derivative, finite differences too: norms are constants to all of them."""
    scene = causal(**config)
    laplace = fit(scene, curvature="ekfac")
    laplace._jvp = JacobianVectorProduct(method)
    batch, names = without_labels(scene.batches[0]), posterior_layers(scene.model)
    jacobians = [hidden_jacobian(scene.model, names, unpadded_row(batch, i)) for i in range(4)]
    weights = laplace.posterior.sample(8, torch.Generator().manual_seed(1))
    with untouched(scene.model):
        vocabulary = laplace.predict_vocabulary(batch)
        drawn = vocabulary._sampler.draw(vocabulary._batch, 8, False, torch.Generator().manual_seed(1))
    pushed = sum(
        torch.einsum("ncij,sij->snc", torch.stack([one[name] for one in jacobians]), weights[name]) for name in names
    )
    assert relative(drawn.hidden, pushed) < (1e-5 if method == "differences" else 1e-9)


def test_covariances_of_the_vocabulary() -> None:
    scene = causal()
    laplace = fit(scene)
    vocabulary = laplace.predict_vocabulary(without_labels(scene.batches[0]))
    scene.run, scene.factors = run_last(None), False
    (examples,) = truth(scene, posterior_layers(scene.model))
    expected = dense_covariance(laplace.posterior, [x.jacobian for x in examples])
    assert relative(vocabulary.mean, torch.stack([x.logits for x in examples])) < 1e-10
    assert relative(vocabulary.covariance(torch.arange(VOCABULARY)), expected) < 1e-8


def test_a_head_under_dora_is_no_head_for_the_whole_vocabulary() -> None:
    scene = causal(targets=("q_proj", "lm_head"))
    del scene.arguments["class_token_ids"]
    laplace = fit(scene, fisher="mc", modules=".*q_proj.*")
    with pytest.raises(ValueError, match=r"lm_head is adapted by DoRA, .* plain LoRA on it, or choose tokens"):
        laplace.predict_vocabulary(without_labels(scene.batches[0]))
    with pytest.raises(ValueError, match="lm_head is adapted by DoRA"):
        laplace.score(without_labels(scene.batches[0]))


# What the norm does


class Around(nn.Module):
    """A layer whose weight is also read off by its own call, for a factor that is a constant to autograd."""

    def __init__(self, first: bool, how: str):
        super().__init__()
        self.inner, self.first, self.how = nn.Linear(4, 4), first, how

    def size(self) -> Tensor:
        with torch.set_grad_enabled(self.how != "no_grad"):
            return self.inner(torch.eye(4, dtype=self.inner.weight.dtype)).norm(dim=0).detach()

    def forward(self, x: Tensor) -> Tensor:
        size = self.size() if self.first else None
        y = torch.tanh(self.inner(x))
        return y / (self.size() if size is None else size)


@pytest.mark.parametrize("how", ["no_grad", "detached"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_calls_that_the_logits_do_not_depend_on(curvature: str, first: bool, how: str) -> None:
    """Before the call that counts, as in today's PEFT, or after it, as in PEFT 0.13; also with as many examples."""
    torch.manual_seed(0)
    scene = Scene(Around(first, how).double(), tensors((4, 4), (3, 4), classes=4), factors=False)
    assert judge_scene(scene, curvature) == "right"
    if curvature == "kfac":
        a = torch.cat([torch.cat([x, torch.ones(len(x), 1)], dim=1) for x, _ in scene.batches])
        assert relative(fit(scene).factors["inner"].a, a.T @ a / len(a)) < 1e-10


def trained(hidden: int) -> Scene:
    """Fine-tuned with DoRA, from where PEFT begins."""
    scene = causal((5, 3, 6, 4, 7, 8, 5, 6), hidden=hidden, spread=0.1, scale=0.0)
    model, batch = scene.model, scene.batches[0]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    last = batch["attention_mask"].sum(dim=1) - 1
    for _ in range(60):
        logits = model(**without_labels(batch)).logits[range(8), last][:, scene.arguments["class_token_ids"]]
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return scene


@pytest.mark.parametrize(("hidden", "low", "high"), [(16, 0.6, 0.9), (64, 0.8, 0.95)])
def test_how_much_less_the_variance_would_be_if_norms_were_differentiated(hidden: int, low: float, high: float) -> None:
    """docs/method.md says so: another Gaussian, of the same size, closer in wider layers."""
    scene = trained(hidden)
    names, variances, logits = posterior_layers(scene.model), [], []
    scene.factors = False
    for held in (True, False):
        scene.plain = rescaled(scene.model, held)
        (examples,) = truth(scene, names)
        variances.append(exact_covariance(examples, examples).diagonal(dim1=1, dim2=2))
        logits.append(torch.stack([x.logits for x in examples]))
    assert relative(logits[1], logits[0]) < 1e-10
    found = fit(scene, curvature="exact").predict(without_labels(scene.batches[0])).variance
    assert relative(found, variances[0]) < 1e-8
    ratio = float((variances[1] / variances[0]).mean())
    print(f"width {hidden}: {ratio:.2f}")
    assert low < ratio < high


# Surroundings


def test_verify_holds_the_norms_and_still_sees_a_wrong_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = causal()
    with untouched(scene.model):
        found = blk.LaplaceLoRA(scene.model, **scene.arguments).verify(scene.batches[0])
    assert found.ok
    assert all(one.error is not None for one in found.agreements)
    (slope,) = [one for one in found.agreements if one.what.startswith("derivative")]
    assert slope.error is not None
    assert slope.error < 1e-6  # 2e-2 if the norms followed the weights
    assert slope.note == "DoRA's norms held, as in training"
    assert slope.note in str(found)

    forward = peft_dora.DoraLinearLayer.forward

    def wrong(self: Any, x: Tensor, **given: Any) -> Tensor:
        y = forward(self, x, **given)
        return y.detach() + 1.5 * (y - y.detach())

    monkeypatch.setattr(peft_dora.DoraLinearLayer, "forward", wrong)
    found = blk.LaplaceLoRA(scene.model, **scene.arguments).verify(scene.batches[0])
    assert [one.what for one in found.agreements if not one.ok] == [slope.what]


def test_norms_are_held_as_long_as_it_is_said() -> None:
    scene = causal()
    model, batch = scene.model, without_labels(scene.batches[0])
    weight = next(p for name, p in model.named_parameters() if "lora_B" in name)

    @torch.no_grad()
    def logits() -> Tensor:
        return model(**batch).logits

    before = logits()
    with torch.no_grad(), constant_norms(model, logits):
        torch.testing.assert_close(logits(), before)
        weight.mul_(2)
        held = logits()
    moved = logits()
    assert relative(held, rescaled_at(model, weight, batch)) < 1e-12
    assert relative(held, moved) > 1e-3
    with torch.no_grad(), pytest.raises(KeyError), constant_norms(model, logits):
        raise KeyError
    assert torch.equal(logits(), moved)


@torch.no_grad()
def rescaled_at(model: nn.Module, weight: Tensor, batch: Any) -> Tensor:
    """With the norms that there were before `weight` was doubled."""
    weight.div_(2)
    plain = rescaled(model)
    weight.mul_(2)
    return plain(**batch).logits


@pytest.mark.parametrize("how", ["inference", "grad"])
def test_what_peft_caches(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be of inference mode or have a graph; it is not used, not overwritten, and gets nothing of ours."""
    if not hasattr(peft_dora, "ENABLE_DORA_CACHING"):
        pytest.skip("this PEFT has no cache of norms")
    scene, plain = causal(), causal()
    expected = fit(plain, curvature="ekfac")
    monkeypatch.setattr(peft_dora, "ENABLE_DORA_CACHING", True)
    batch = without_labels(scene.batches[0])
    with torch.inference_mode(how == "inference"):
        scene.model(**batch)
    caches = {name: dict(m._dora_cache) for name, m in scene.model.named_modules() if hasattr(m, "_dora_cache")}
    assert any(caches.values())
    with untouched(scene.model):
        laplace = fit(scene, curvature="ekfac")
        covariance = laplace.predict(batch).covariance
        scores = laplace.score(batch, generator=torch.Generator().manual_seed(0))
        verified = laplace.verify(scene.batches[0])
    assert verified.ok
    assert all(one.error is not None for one in verified.agreements)
    assert relative(covariance, expected.predict(batch).covariance) < 1e-10
    wanted = expected.score(batch, generator=torch.Generator().manual_seed(0))
    assert relative(scores.log_prob, wanted.log_prob) < 1e-10
    for name, cache in caches.items():
        now = scene.model.get_submodule(name)._dora_cache
        assert type(now) is dict
        assert now.keys() == cache.keys()
        assert all(now[key] is value for key, value in cache.items())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    """Against float64 with the very same weights."""
    scene, wide = causal(dtype=dtype), causal()
    wide.model.load_state_dict({name: value.double() for name, value in scene.model.state_dict().items()})
    batch = without_labels(scene.batches[0])
    found, expected = (fit(one, curvature="ekfac", prior_precision=100.0).predict(batch) for one in (scene, wide))
    assert relative(found.variance, expected.variance) < tolerance
    assert blk.LaplaceLoRA(scene.model, **scene.arguments).verify(scene.batches[0]).ok


# What is said, and what is refused


def test_that_magnitudes_stay_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="bayesian_lora_kernels"):
        fit(causal()).predict(without_labels(causal().batches[0]))
    said = [record for record in caplog.records if "DoRA" in record.message]
    assert [r.message for r in said] == ["DoRA: the posterior is over A and B; 4 magnitude vectors stay as fine-tuned"]


def test_what_else_is_trained_is_still_named() -> None:
    model = causal().model
    model.get_submodule("base_model.model.model.norm").requires_grad_(True)
    with pytest.raises(ValueError, match=r"outside nn.Linear: base_model.model.model.norm.weight\. Freeze") as caught:
        blk.LaplaceLoRA(model)
    assert "magnitude" not in str(caught.value)
    model = causal().model
    for name, p in model.named_parameters():
        p.requires_grad_("layers.0" in name and "lora_" in name and "q_proj.lora_A" not in name)
    with pytest.raises(ValueError, match=r"outside nn.Linear: \S*0.self_attn.q_proj.lora_magnitude_vector\S*\. F"):
        blk.LaplaceLoRA(model)


def test_biases_that_are_trained_under_dora() -> None:
    model = bert(use_dora=True, bias="lora_only").model
    with pytest.raises(ValueError, match=r"query.base_layer: it is trained under DoRA, which subtracts its bias again"):
        blk.LaplaceLoRA(model)
    blk.LaplaceLoRA(model, modules=r".*(lora_[AB]|classifier).*")


class Aside(nn.Module):
    """A layer that is called, and whose output is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.aside = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return self.first(x)


def test_a_layer_without_effect() -> None:
    config = peft.LoraConfig(r=2, target_modules=["first", "aside"], use_dora=True)
    scene = Scene(randomised(peft.get_peft_model(Aside(), config)), tensors((4, 4), (3, 4)))
    with pytest.raises(ValueError, match=r"aside.lora_A.default, .* never called by forward, or without effect on the"):
        fit(scene)
    scene.arguments = {"modules": r".*\.first\..*"}
    fit(scene)


# Files


@pytest.mark.parametrize("name", ["Conv1D", "biases and a trained head", "two adapters, both active"])
def test_round_trip_and_verify(name: str, tmp_path: Any) -> None:
    scene = SCENES[name]()
    batch = without_labels(scene.batches[0])
    laplace = fit(scene, curvature="ekfac")
    laplace.save_pretrained(tmp_path)
    again = blk.LaplaceLoRA.from_pretrained(SCENES[name]().model, tmp_path)
    assert torch.equal(again.predict(batch).covariance, laplace.predict(batch).covariance)
    found = laplace.verify(scene.batches[0])
    assert found.ok, str(found)


def test_a_posterior_is_that_of_its_magnitudes(tmp_path: Any) -> None:
    scene = causal()
    batch = without_labels(scene.batches[0])
    laplace = fit(scene)
    expected = laplace.predict(batch)
    laplace.save_pretrained(tmp_path)
    again = blk.LaplaceLoRA.from_pretrained(scene.model, tmp_path)
    assert torch.equal(again.predict(batch).covariance, expected.covariance)
    with torch.no_grad():
        for name, p in scene.model.named_parameters():
            if "lora_magnitude_vector" in name:
                p.mul_(1.1)
    with pytest.raises(ValueError, match=r"base model is not the one .*lora_magnitude_vector.* differs"):
        blk.LaplaceLoRA.from_pretrained(scene.model, tmp_path)
    with pytest.raises(ValueError, match=r"it has no .*lora_magnitude_vector"):
        blk.LaplaceLoRA.from_pretrained(without_dora(scene.model), tmp_path)


def without_dora(model: nn.Module) -> nn.Module:
    """The same A and B, as plain LoRA."""
    plain = llama().model
    mine = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(mine[name])
    return plain


def test_padding_behind_a_token_in_front() -> None:
    """Which of a layer's tokens are padding is found by its calls on them, not by that on the identity matrix."""
    model = adapted(WithClassToken(), ["mix"], use_dora=True)
    batch = labelled(padded([6, 4, 5, 6], 40))
    rows = [unpadded_row(batch, i) | {"labels": batch["labels"][i : i + 1]} for i in range(4)]
    settings = {"fisher": "exact", "rank": None}
    together = blk.LaplaceLoRA(model, **settings).fit([batch], progress=False).factors
    alone = blk.LaplaceLoRA(model, **settings).fit(rows, progress=False).factors
    for name, factor in alone.items():
        torch.testing.assert_close(together[name].a, factor.a, rtol=1e-9, atol=1e-12, msg=name)
