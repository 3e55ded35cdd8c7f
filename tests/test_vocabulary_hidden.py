"""Posterior samples of the hidden state against the dense Jacobian and covariance, on whole models."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from dense import by_module, ggn, relative, rows_of, trainable
from models import VOCABULARY, causal_case, gpt2, llama, lora, seq2seq
from snapshot import untouched, unusual
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.predictive.jvp import METHODS, JacobianVectorProduct

MODELS = {"llama": lambda: llama(classes=None), "gpt2": lambda: gpt2(), "seq2seq": seq2seq}
SETTINGS = {
    "kfac": {"curvature": "kfac", "rank": 3, "rank_threshold": 5},
    "ekfac": {"curvature": "ekfac"},
    "exact": {"curvature": "exact"},
}


def fitted(case, **arguments) -> blk.LaplaceLoRA:
    return blk.LaplaceLoRA(case.model, **{**case.arguments, **arguments}).fit(case.loader(2), progress=False)


def hidden_jacobians(case) -> tuple[Tensor, dict[str, Tensor]]:
    """The head's input `[N, d]` at the last token, and `{module: [N, d, d_out, d_in]}`, one example at a time."""
    model = case.evaluated()
    head = model.get_base_model().get_output_embeddings()
    parameters = trainable(model)
    states, rows = [], []
    for example in case.examples:
        seen = []
        handle = head.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        case.logits(model, example)
        handle.remove()
        states.append(seen[0][0, -1])
        rows.append(rows_of(states[-1], list(parameters.values())))
    stacked = {name: torch.stack(parts) for name, *parts in zip(parameters, *rows, strict=True)}
    return torch.stack(states).detach(), by_module(stacked, lead=2)


def weight_samples(laplace: blk.LaplaceLoRA, n: int) -> dict[str, Tensor]:
    """The deviations that the next `n` samples will use."""
    state = torch.get_rng_state()
    parts = []
    for _ in range(math.ceil(n / 8)):
        parts.append(laplace.posterior.sample(8, None))
    torch.set_rng_state(state)
    return {name: torch.cat([part[name] for part in parts])[:n] for name in parts[0]}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_a_sample_is_the_jacobian_times_a_sample_of_the_weights(name, setting):
    case = MODELS[name]()
    laplace = fitted(case, **SETTINGS[setting])
    if setting == "kfac":
        laplace.prior_precision = {m: 1.0 + i for i, m in enumerate(laplace.posterior)}
    expected = weight_samples(laplace, 11)
    states, jacobian = hidden_jacobians(case)
    unusual(case.model)
    posterior = laplace.predict(case.batch(), outputs="vocabulary")
    assert relative(posterior.hidden, states) < 1e-10
    with untouched(case.model):
        posterior.sample(3, torch.Generator().manual_seed(1))
    drawn = posterior._sampler.draw(posterior._batch, 11, False, None)
    pushed = sum(torch.einsum("ncij,sij->snc", jacobian[m], expected[m]) for m in jacobian)
    assert relative(drawn.hidden, pushed) < 1e-9
    assert posterior.method == "forward"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("budget", [1, 3 * 10**5])
def test_pieces_and_padding_change_nothing(side, budget):
    case = llama(classes=None)
    whole, small = fitted(case), fitted(case, memory_budget=budget)
    noise = [torch.Generator().manual_seed(5) for _ in range(2)]
    a = whole.predict(case.batch(), "vocabulary").sample(9, noise[0])
    b = small.predict(case.batch(side=side, extra=3), "vocabulary").sample(9, noise[1])
    assert relative(b, a) < 1e-9


@pytest.mark.parametrize("method", METHODS[1:])
def test_every_derivative_gives_the_same_samples(method):
    case = llama(classes=None)
    laplace = fitted(case)
    noise = torch.Generator().manual_seed(5)
    expected = laplace.predict(case.batch(), "vocabulary").sample(3, noise)
    laplace._jvp = JacobianVectorProduct(method)
    posterior = laplace.predict(case.batch(), "vocabulary")
    found = posterior.sample(3, noise.manual_seed(5))
    deviation, truth = found - posterior.mean, expected - posterior.mean
    assert relative(deviation, truth) < (1e-3 if method == "differences" else 1e-9)
    assert method.split("-")[0] in posterior.method


class Cubed(torch.autograd.Function):
    """Without forward mode: `x + x^3`."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x + x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (1 + 3 * x**2) * g


class CubedActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cubed.apply(x)


def test_a_model_without_forward_mode():
    """As of quantised layers: the samples are still exact, and it is said how they came about."""
    case = llama(classes=None, targets=("q_proj", "down_proj"))
    for layer in case.model.get_base_model().model.layers:
        layer.mlp.act_fn = CubedActivation()
    laplace = fitted(case)
    expected = weight_samples(laplace, 4)
    states, jacobian = hidden_jacobians(case)
    posterior = laplace.predict(case.batch(), "vocabulary")
    drawn = posterior._sampler.draw(posterior._batch, 4, False, None)
    pushed = sum(torch.einsum("ncij,sij->snc", jacobian[m], expected[m]) for m in jacobian)
    assert relative(posterior.hidden, states) < 1e-10
    assert relative(drawn.hidden, pushed) < 1e-9
    assert posterior.method == "double-backward"
    assert "setup_context" in laplace._jvp.reasons["forward"]


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "initializer_range": 0.3, "pad_token_id": 0}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite", "cohere"), GROUPED),
    **dict.fromkeys(("phi", "phi3", "gpt_neox", "falcon", "gpt2"), SIZES),
    "gptj": {**SIZES, "rotary_dim": 4},
    "opt": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "mixtral": {**GROUPED, "num_local_experts": 2},
    "bloom": SIZES,
}
# Grouped matrix products, and an activation with a backward pass that is written by hand.
WITHOUT_FORWARD_MODE = ("mixtral", "bloom")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architectures(kind):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **ARCHITECTURES[kind])
    base = transformers.AutoModelForCausalLM.from_config(config)
    # The router's own layer is not called as a layer.
    targets = ("q_proj", "v_proj") if kind == "mixtral" else "all-linear"
    model = lora(base, targets, task_type="CAUSAL_LM")
    # Grouped matrix products take no float64; the others compute in float32 where their norms and rotations do.
    model = model if kind == "mixtral" else model.double()
    case = causal_case(model, (5, 3), None, VOCABULARY)
    laplace = fitted(case, fisher="mc")
    expected = weight_samples(laplace, 4)
    _, jacobian = hidden_jacobians(case)
    posterior = laplace.predict(case.batch(), "vocabulary")
    assert posterior.method == "none yet"
    drawn = posterior._sampler.draw(posterior._batch, 4, False, None)
    pushed = sum(torch.einsum("ncij,sij->snc", jacobian[m], expected[m]) for m in jacobian)
    assert relative(drawn.hidden, pushed) < (1e-4 if kind == "mixtral" else 1e-5)
    assert posterior.method == ("double-backward" if kind in WITHOUT_FORWARD_MODE else "forward")


def fused(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention of another make: it has no derivative of forward mode, and says where it ran."""
    calls.append(query.shape)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    causal = attention_mask is None
    mixed = scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, is_causal=causal)
    return Cubed.apply(mixed * 1.0).sub(mixed**3).transpose(1, 2).contiguous(), None


calls: list[torch.Size] = []


@pytest.mark.parametrize("kind", ["eager", "sdpa", "fused"])
def test_attention_is_replaced_for_the_derivative_and_comes_back(kind):
    AttentionInterface.register("fused", fused)
    AttentionMaskInterface.register("fused", sdpa_mask)
    case = llama(classes=None)
    expected = fitted(case).predict(case.batch(), "vocabulary").sample(4, torch.Generator().manual_seed(2))
    case.model.get_base_model().set_attn_implementation(kind)
    laplace = fitted(case)
    posterior = laplace.predict(case.batch(), "vocabulary")
    calls.clear()
    found = posterior.sample(4, torch.Generator().manual_seed(2))
    assert not calls
    assert relative(found, expected) < (1e-5 if kind == "eager" else 1e-9)  # its softmax is in float32
    assert posterior.method == "forward"
    config = case.model.get_base_model().config
    assert config._attn_implementation == kind
    assert all(m.config._attn_implementation == kind for m in case.model.modules() if hasattr(m, "config"))
    backends = torch.backends.cuda
    assert backends.flash_sdp_enabled()
    assert backends.mem_efficient_sdp_enabled()


def test_checkpointing_stays_on():
    case = llama(classes=None)
    expected = fitted(case).predict(case.batch(), "vocabulary").sample(4, torch.Generator().manual_seed(2))
    case.model.gradient_checkpointing_enable({"use_reentrant": False})
    case.model.train()
    laplace = fitted(case)
    with untouched(case.model):
        posterior = laplace.predict(case.batch(), "vocabulary")
        found = posterior.sample(4, torch.Generator().manual_seed(2))
    assert relative(found, expected) < 1e-9


def test_hidden_samples_have_the_exact_covariance():
    """Second moments of many samples, each within five of its own standard errors."""
    case = llama(classes=None, hidden=8)
    laplace = fitted(case, curvature="exact", prior_precision=2.0)
    _, jacobian = hidden_jacobians(case)
    posterior = laplace.predict(case.batch(), "vocabulary")
    drawn = posterior._sampler.draw(posterior._batch, 4000, False, torch.Generator().manual_seed(0)).hidden
    flat = torch.cat([jacobian[m].flatten(2) for m in jacobian], dim=2)
    model = case.evaluated()
    outputs = [rows_of(case.logits(model, x), list(trainable(model).values())) for x in case.examples]
    all_rows = by_module({n: torch.stack([o[i] for o in outputs]) for i, n in enumerate(trainable(model))}, lead=2)
    output_rows = torch.cat([all_rows[m].flatten(2) for m in jacobian], dim=2)
    p = torch.stack([case.logits(model, x) for x in case.examples]).detach().softmax(dim=-1)
    precision = ggn(output_rows, torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    sigma = torch.linalg.inv(precision + 2.0 * torch.eye(len(precision), dtype=torch.float64))
    stacked = flat.flatten(0, 1)
    expected = stacked @ sigma @ stacked.mT  # examples jointly
    rows = drawn.flatten(1)
    found = rows.mT @ rows / len(rows)
    error = ((expected**2 + expected.diagonal()[:, None] * expected.diagonal()) / len(rows)).sqrt()
    assert ((found - expected).abs() / error).max() < 5
    assert (rows.mean(dim=0).abs() / (expected.diagonal() / len(rows)).sqrt()).max() < 5


def test_a_batch_of_one_text_without_a_mask():
    case = llama(classes=None, lengths=(5,))
    laplace = fitted(case)
    noise = torch.Generator().manual_seed(0)
    a = laplace.predict({"input_ids": case.examples[0][None]}, "vocabulary").sample(2, noise)
    b = laplace.predict(case.batch(extra=2), "vocabulary").sample(2, noise.manual_seed(0))
    assert relative(a, b) < 1e-12
