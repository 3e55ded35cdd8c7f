"""Samples of the hidden state with attention in tiles, against PyTorch's math kernel: whole models, single calls."""

from __future__ import annotations

import pytest
import torch
import transformers
from dense import relative
from models import VOCABULARY, causal_case, gpt2, in_float64, llama, lora
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.model.hidden import differentiable_attention
from bayesian_lora_kernels.predictive import attention, jvp
from bayesian_lora_kernels.predictive.jvp import JacobianVectorProduct

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0}


def of_kind(kind, **more):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **{**SIZES, **more}))
    adapted = in_float64(lora(model, "all-linear", task_type="CAUSAL_LM"))
    return causal_case(adapted, (9, 3, 7), None, VOCABULARY)


MODELS = {
    "llama": lambda: of_kind("llama"),
    "gpt2": gpt2,
    "mistral, window of 4": lambda: of_kind("mistral", sliding_window=4),
    "gemma3, window of 4": lambda: of_kind("gemma3_text", sliding_window=4, head_dim=8),
}


@pytest.fixture
def calls(monkeypatch):
    """`[mask, causal, tangents]` of what the operation was asked for."""
    seen = []

    def noted(q: Tensor, k: Tensor, v: Tensor, *tangents: Tensor, mask: Tensor | None, causal: bool, scale: float):
        seen.append((mask, causal, tangents))
        return blk.ops.attention_jvp(q, k, v, *tangents, mask=mask, causal=causal, scale=scale)

    monkeypatch.setattr(attention, "attention_jvp", noted)
    return seen


def fitted(case) -> blk.LaplaceLoRA:
    return blk.LaplaceLoRA(case.model, **{**case.arguments, "fisher": "mc"}).fit(case.loader(2), progress=False)


def samples(case, batch) -> Tensor:
    # The same sampled labels in every fit.
    torch.manual_seed(0)
    laplace = fitted(case)
    posterior = laplace.predict_vocabulary(batch)
    drawn = posterior.sample(5, torch.Generator().manual_seed(3))
    assert posterior.method == "forward"
    return drawn - posterior.mean


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_samples_are_those_of_the_math_kernel(name, padding, calls, monkeypatch):
    case = MODELS[name]()
    batch = case.batch([0]) if padding == "none" else case.batch(side="left", extra=2)
    found = samples(case, batch)
    assert calls
    assert any(mask is not None for mask, _, _ in calls) == (padding != "none" or "window" in name)
    monkeypatch.setattr(jvp, "attention_with_tangents", attention.plain_attention)
    calls.clear()
    assert relative(found, samples(case, batch)) < (1e-6 if "gemma3" in name else 1e-10)  # its norms are in float32
    assert not calls


def test_every_layer_is_served_once_for_all_samples(calls):
    case = llama(classes=None)
    samples(case, case.batch([0]))
    assert len(calls) == 2  # two layers, of which the first has keys without a tangent
    assert [one is None for _, _, tangents in calls for one in tangents] == [False, True, False, False, False, False]
    assert all(causal and mask is None for mask, causal, _ in calls)


class Largest(TorchDispatchMode):
    """The largest result of an operation, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in (result if isinstance(result, (tuple, list)) else [result]) if torch.is_tensor(one)]
        self.numbers = max([self.numbers, *(one.numel() for one in tensors)])
        return result


@pytest.mark.parametrize("tiled", [True, False])
def test_nothing_grows_with_the_square_of_the_tokens(tiled, monkeypatch):
    """The operation itself is of tiles; around it, twice the tokens make nothing more than twice as large."""
    if not tiled:
        monkeypatch.setattr(jvp, "attention_with_tangents", attention.plain_attention)
    case = of_kind("llama", max_position_embeddings=1024)
    laplace = fitted(case)
    largest = []
    for tokens in (256, 512):
        with Largest() as seen:
            laplace.predict_vocabulary({"input_ids": torch.ones(1, tokens, dtype=torch.long)}).sample(2)
        largest.append(seen.numbers)
    assert (largest[1] <= 2 * largest[0]) == tiled


def attended(kind):
    """A function of weights in which attention is asked for in a way that has to be left to PyTorch, or need not be."""
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def function(p: dict[str, Tensor]) -> Tensor:
        q, k, v = x @ p["a"], x @ p["b"], x
        if kind == "bias":  # learned, so that the mask has a tangent
            return scaled_dot_product_attention(q, k, v, attn_mask=q[..., :6])
        if kind == "three dimensions":
            return scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True)
        if kind == "one key for all":
            return scaled_dot_product_attention(q, k[:1, :1], v[:1, :1])
        if kind == "values alone":
            return scaled_dot_product_attention(x, x, q, None, 0.0, True, scale=0.7)
        return scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)

    return function


@pytest.mark.parametrize("method", ["forward", "forward-single"])
@pytest.mark.parametrize("kind", ["bias", "three dimensions", "one key for all", "values alone", "grouped"])
def test_what_is_served_and_what_is_not(kind, method, calls):
    state = torch.Generator().manual_seed(1)
    parameters = {n: torch.randn(8, 8, generator=state, dtype=torch.float64) for n in "ab"}
    deviations = {n: torch.randn(3, 8, 8, generator=state, dtype=torch.float64) for n in "ab"}
    found = JacobianVectorProduct(method)(attended(kind), parameters, deviations)
    assert bool(calls) == (kind in ("values alone", "grouped"))
    expected = JacobianVectorProduct("double-backward")(attended(kind), parameters, deviations)
    assert relative(found, expected) < 1e-12


def test_dropout_is_left_to_pytorch(calls):
    x = torch.randn(1, 1, 4, 8)

    def function(p: dict[str, Tensor]) -> Tensor:
        return scaled_dot_product_attention(x * p["a"], x, x, dropout_p=0.5)

    JacobianVectorProduct("forward-single")(function, {"a": torch.ones(8)}, {"a": torch.ones(1, 8)})
    assert not calls


def test_autocast_casts_as_pytorch_s_function_does(calls):
    """Rotations leave queries and keys in float32, where values are in half precision."""
    x = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(1))
    parameters, deviations = {"a": torch.ones(8)}, {"a": torch.ones(3, 8)}

    def function(p: dict[str, Tensor]) -> Tensor:
        return scaled_dot_product_attention(x * p["a"], x, x.bfloat16())

    def cast(p: dict[str, Tensor]) -> Tensor:
        return scaled_dot_product_attention((x * p["a"]).bfloat16(), x.bfloat16(), x.bfloat16())

    with torch.autocast("cpu", torch.bfloat16):
        found = JacobianVectorProduct("forward-single")(function, parameters, deviations)
    assert len(calls) == 3  # one for each sample
    assert torch.equal(found, JacobianVectorProduct("forward-single")(cast, parameters, deviations))


@pytest.mark.parametrize(("supported", "kind"), [(True, "sdpa"), (False, "eager")])
def test_attention_of_another_make(supported, kind):
    """Sinks, which PyTorch's function would leave out, are said by the model."""
    model = llama(classes=None).model.eval()
    for module in model.modules():
        if hasattr(module, "_supports_sdpa"):
            module._supports_sdpa = supported
    model.config._attn_implementation = "flash_attention_2"
    with differentiable_attention(model):
        assert model.config._attn_implementation == kind
    assert model.config._attn_implementation == "flash_attention_2"
