"""Output heads of all kinds: what they compute, and their posterior, against the model's own logits and Jacobians."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers
from dense import by_module, relative, rows_of, trainable
from models import PAD, VOCABULARY, Case, causal_case, llama, lora
from torch import Tensor, nn

import bayesian_lora_kernels as blk

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
}


def in_double(model: nn.Module) -> nn.Module:
    """The norms of transformers compute in float32 whatever the dtype, which is fine to 1e-5."""
    return model.double()


def made(kind: str, targets=("q_proj", "v_proj"), **adapter) -> Case:
    torch.manual_seed(0)
    if kind == "plain":
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    elif kind == "tied":
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))
    elif kind == "bias":
        config = transformers.PhiConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"})
        base = transformers.PhiForCausalLM(config)
        nn.init.normal_(base.lm_head.bias)
    elif kind == "gemma2":
        config = transformers.Gemma2Config(**SIZES, final_logit_softcapping=3.0, query_pre_attn_scalar=8)
        base = transformers.Gemma2ForCausalLM(config)
    elif kind == "granite":
        base = transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, logits_scaling=4.0))
    elif kind == "cohere":
        config = transformers.CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.25)
        base = transformers.CohereForCausalLM(config)
    else:
        raise AssertionError(kind)
    model = lora(base, targets, task_type="CAUSAL_LM", **adapter)
    return causal_case(in_double(model), (5, 3, 6), None, VOCABULARY)


# factor after the head, cap
HEADS = {
    "plain": (1.0, None),
    "tied": (1.0, None),
    "bias": (1.0, None),
    "gemma2": (1.0, 3.0),
    "granite": (0.25, None),
    "cohere": (0.25, None),
}


def truth(case: Case, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits before a cap `[N, V]` and their Jacobians by module, by hooks and autograd."""
    model = case.evaluated()
    head = model.get_base_model().get_output_embeddings()
    parameters = trainable(model)
    logits, rows = [], []
    for example in case.examples:
        seen = []
        handle = head.register_forward_hook(lambda _m, _a, output, seen=seen: seen.append(output))
        case.logits(model, example)
        handle.remove()
        z = seen[0][0, -1] * scale
        logits.append(z.detach())
        rows.append(rows_of(z, list(parameters.values())))
    stacked = {name: torch.stack(parts) for name, *parts in zip(parameters, *rows, strict=True)}
    return torch.stack(logits), by_module(stacked, lead=2)


def covariance(laplace: blk.LaplaceLoRA, jacobian: dict[str, Tensor]) -> Tensor:
    total = torch.zeros(())
    for name, posterior in laplace.posterior.items():
        j = jacobian[name].flatten(2)
        sigma = torch.linalg.inv(posterior.to_dense())
        total = total + j @ sigma @ j.mT
    return total


def fitted(case: Case, **arguments) -> blk.LaplaceLoRA:
    return blk.LaplaceLoRA(case.model, fisher="mc", **arguments).fit(case.loader(2), progress=False)


def check(case: Case, scale: float, cap: float | None, tolerance: float = 1e-5) -> None:
    laplace = fitted(case)
    logits, jacobian = truth(case, scale)
    posterior = laplace.predict(case.batch(), "vocabulary")
    assert posterior.softcap == cap
    assert relative(posterior.mean, logits) < tolerance
    indices = torch.tensor([[3, 1, 12], [0, 0, 5], [7, 2, 4]])
    expected = covariance(laplace, jacobian)
    rows = torch.arange(3)[:, None, None]
    chosen = expected[rows, indices[:, :, None], indices[:, None, :]]
    assert relative(posterior.covariance(indices), chosen) < tolerance
    # One sample of the weights gives one of the logits, exactly.
    state = torch.get_rng_state()
    drawn = [laplace.posterior.sample(8, None) for _ in range(3)]
    weights = {name: torch.cat([d[name] for d in drawn])[:19] for name in drawn[0]}
    torch.set_rng_state(state)
    pushed = sum(torch.einsum("nvij,sij->snv", jacobian[m], weights[m]) for m in jacobian)
    torch.set_rng_state(state)
    samples = posterior.sample(19)
    assert relative(samples - posterior.mean, pushed) < tolerance
    torch.set_rng_state(state)
    variance, _ = posterior.variance(19)
    assert relative(variance, pushed.square().mean(dim=0)) < tolerance

    def capped(z: Tensor) -> Tensor:
        return z if cap is None else cap * torch.tanh(z / cap)

    for n in (19, 6):  # mirrored; an odd number leaves one without its mirror image
        half = -(-n // 2)
        z = torch.cat([logits + pushed[:half], logits - pushed[: n // 2]])
        p = capped(z).softmax(dim=-1)
        assert relative(posterior.probs(n), p.mean(dim=0)) < tolerance
        targets = torch.tensor([3, 0, 7])
        found = posterior.statistics(targets, n)
        entropy = torch.special.entr(p.mean(dim=0)).sum(dim=-1)
        assert relative(found.entropy, entropy) < tolerance
        information = entropy - torch.special.entr(p).sum(dim=-1).mean(dim=0)
        assert float((found.mutual_information - information).abs().max()) < tolerance
        assert relative(found.target_log_prob, p.mean(dim=0)[torch.arange(3), targets].log()) < tolerance
        assert posterior.statistics(n_samples=n).target_log_prob is None
    top = posterior.top(4)
    plain = laplace.predict(case.batch(), outputs=4)
    assert torch.equal(top.indices, plain.indices)
    assert relative(top.mean, plain.mean) < tolerance
    assert relative(top.covariance, plain.covariance) < tolerance


@pytest.mark.parametrize("kind", HEADS)
def test_heads(kind):
    check(made(kind), *HEADS[kind])


@pytest.mark.parametrize("kind", ["plain", "bias", "gemma2", "granite"])
def test_adapted_heads(kind):
    check(made(kind, targets=("q_proj", "lm_head"), use_rslora=True), *HEADS[kind])


class Float32Logits(transformers.LlamaForCausalLM):
    """As Mamba, whatever its dtype."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.float()
        return output


def test_logits_in_less_precision_than_the_head():
    torch.manual_seed(0)
    model = lora(Float32Logits(transformers.LlamaConfig(**SIZES)), ("q_proj", "v_proj"), task_type="CAUSAL_LM")
    check(causal_case(model.double(), (5, 3, 6), None, VOCABULARY), *HEADS["plain"])


def test_nothing_but_the_head_is_adapted():
    check(made("plain", targets=("lm_head",)), 1.0, None)


def test_an_adapted_head_outside_the_posterior():
    """Its adapter counts for the MAP logits, and has no deviations."""
    case = made("plain", targets=("q_proj", "lm_head"))
    laplace = blk.LaplaceLoRA(case.model, fisher="mc", modules=r".*q_proj.*").fit(case.loader(2), progress=False)
    logits, jacobian = truth(case, 1.0)
    posterior = laplace.predict(case.batch(), "vocabulary")
    assert relative(posterior.mean, logits) < 1e-5
    own = {name: j for name, j in jacobian.items() if "q_proj" in name}
    expected = covariance(laplace, own)
    variance, error = posterior.variance(256)
    assert ((variance - expected.diagonal(dim1=1, dim2=2)).abs() < 5 * error).all()


def test_one_half_of_the_heads_adapter():
    """B in the posterior, A not."""
    case = made("plain", targets=("q_proj", "lm_head"))
    laplace = blk.LaplaceLoRA(case.model, fisher="mc", modules=r".*lm_head.lora_B.*").fit(
        case.loader(2), progress=False
    )
    _, jacobian = truth(case, 1.0)
    own = {name: j for name, j in jacobian.items() if "lm_head.lora_B" in name}
    expected = covariance(laplace, own)
    posterior = laplace.predict(case.batch(), "vocabulary")
    indices = torch.arange(VOCABULARY)
    assert relative(posterior.covariance(indices), expected) < 1e-5
    variance, error = posterior.variance(256)
    assert ((variance - expected.diagonal(dim1=1, dim2=2)).abs() < 5 * error).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_before_the_cap_of_a_model_whose_head_gets_every_position(side):
    case = made("gemma2")
    case.model.float()  # transformers' masks turn into infinity where float64 becomes float32
    laplace, batch = fitted(case), case.batch([1, 0], side=side)  # the first of them is padded
    expected = laplace.predict(batch, "vocabulary").covariance(torch.arange(VOCABULARY))
    findings = laplace._forward.findings
    findings.way = dataclasses.replace(findings.way, cuts_positions=False)
    assert relative(laplace.predict(batch, "vocabulary").covariance(torch.arange(VOCABULARY)), expected) < 1e-4


def test_half_precision_heads():
    """The head in bfloat16 is read as it is; nothing else is rounded to it."""
    case = made("plain")
    case.model.float()
    head = case.model.get_base_model().lm_head
    head.weight.data = head.weight.data.bfloat16().float()
    laplace = fitted(case)
    expected = laplace.predict(case.batch(), "vocabulary")
    noise = torch.Generator().manual_seed(0)
    truths = expected.sample(5, noise), expected.probs(6, noise)
    half = laplace.predict(case.batch(), "vocabulary")
    linear = copy.deepcopy(half._head.linear).bfloat16()
    half._head = dataclasses.replace(half._head, linear=linear)
    half._mean = None
    noise.manual_seed(0)
    assert relative(half.mean, expected.mean) < 1e-5
    assert relative(half.sample(5, noise), truths[0]) < 1e-5
    assert relative(half.probs(6, noise), truths[1]) < 1e-5


def test_a_head_that_is_trained_as_a_whole():
    case = made("plain", modules_to_save=["lm_head"])
    laplace = fitted(case)
    with pytest.raises(ValueError, match=r"lm_head.*trained as a whole \(modules_to_save"):
        laplace.predict(case.batch(), "vocabulary")
    frozen = blk.LaplaceLoRA(case.model, fisher="mc", modules=r".*lora.*").fit(case.loader(2), progress=False)
    assert relative(frozen.predict(case.batch(), "vocabulary").mean, truth(case, 1.0)[0]) < 1e-5


def test_an_adapted_head_restricted_to_classes():
    case = llama(targets=("q_proj", "lm_head"))
    laplace = blk.LaplaceLoRA(case.model, **case.arguments).fit(case.loader(2), progress=False)
    with pytest.raises(ValueError, match="covers the rows of the classes only"):
        laplace.predict(case.batch(), "vocabulary")


def test_classes_do_not_restrict_the_vocabulary():
    case = llama()
    laplace = blk.LaplaceLoRA(case.model, **case.arguments).fit(case.loader(2), progress=False)
    posterior = laplace.predict(case.batch(), "vocabulary")
    chosen = laplace.predict(case.batch())
    ids = torch.tensor(case.arguments["class_token_ids"])
    assert posterior.mean.shape == (4, VOCABULARY)
    assert relative(posterior.mean[:, ids], chosen.mean) < 1e-10
    assert relative(posterior.covariance(ids), chosen.covariance) < 1e-10


class Shifted(transformers.LlamaForCausalLM):
    """Changes its logits in a way that nobody has heard of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.sign() * output.logits.square()
        return output


class Warped(nn.Linear):
    def forward(self, x):
        return super().forward(x).sin()


def test_logits_that_are_not_the_heads():
    torch.manual_seed(0)
    model = lora(Shifted(transformers.LlamaConfig(**SIZES, logits_scaling=4.0)), ("q_proj",), task_type="CAUSAL_LM")
    case = causal_case(model.double(), (5, 3), None, VOCABULARY)
    laplace = fitted(case)
    with pytest.raises(ValueError, match=r"changes its logits after the head.*logits_scaling=4"):
        laplace.predict(case.batch(), "vocabulary")


def test_a_head_that_is_not_linear():
    case = made("plain")
    base = case.model.get_base_model()
    warped = Warped(16, VOCABULARY, bias=False, dtype=torch.float64)
    base.lm_head = warped.requires_grad_(False)
    with pytest.raises(ValueError, match=r"lm_head \(Warped\) is not a linear map"):
        fitted(case).predict(case.batch(), "vocabulary")


def test_a_quantised_head():
    case = made("plain")
    laplace = fitted(case)
    base = case.model.get_base_model()
    base.lm_head.weight = nn.Parameter(torch.zeros(13, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"keeps its weight as torch.int8.*not quantised"):
        laplace.predict(case.batch(), "vocabulary")
