"""LoRA on quantised bases: what the dequantised twin says, or the name of the layer that has no right derivative."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dense import relative
from sharded import BATCHES, IDS, LLAMA
from situations import adapted
from torch import Tensor, nn

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.predictive.jvp import JacobianVectorProduct

TOLERANCE = 1e-3
TEXTS = {key: value for key, value in BATCHES[0].items() if key != "labels"}


def base() -> Any:
    torch.manual_seed(0)
    sizes = {**LLAMA, "hidden_size": 64, "intermediate_size": 128}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def lora(model: Any) -> Any:
    return adapted(model, ["q_proj", "v_proj"], double=False, task_type="CAUSAL_LM")


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name}


def torchao(config: str, **settings: Any) -> tuple[Any, Any]:
    """LoRA on a base that torchao quantises, and on the twin that has its weights as numbers."""
    quantization = pytest.importorskip("torchao.quantization")
    model, twin = base(), base()
    settings = {key: getattr(torch, v) if key == "weight_dtype" else v for key, v in settings.items()}
    if config == "IntxWeightOnlyConfig":
        settings["granularity"] = quantization.PerGroup(32)
    chosen = linear_layers(model)
    quantization.quantize_(model, getattr(quantization, config)(**settings), filter_fn=lambda m, name: name in chosen)
    for name, layer in linear_layers(twin).items():
        layer.weight.data = model.get_submodule(name).weight.dequantize()
    return lora(model), lora(twin)


def bitsandbytes(bits: int, nested: bool = False) -> tuple[Any, Any]:
    """The same by bitsandbytes; 4 bits are NF4, with constants that are quantised again where `nested`."""
    bnb = pytest.importorskip("bitsandbytes")
    model, twin = base(), base()
    setattr(model, f"is_loaded_in_{bits}bit", True)
    for name, layer in linear_layers(model).items():
        sizes, weight = (layer.in_features, layer.out_features), layer.weight.data.clone()
        if bits == 4:
            small = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            settings = {"quant_type": "nf4", "compress_statistics": nested}
            small.weight = bnb.nn.Params4bit(weight, requires_grad=False, **settings)
        else:
            small = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=0.0)
            small.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        small = small.to("cpu")
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, small)
        if bits == 4:
            twin.get_submodule(name).weight.data = bnb.functional.dequantize_4bit(
                small.weight.data, small.weight.quant_state
            )
        else:
            twin.get_submodule(name).weight.data = small.weight.data.float() * small.weight.SCB[:, None] / 127
    return lora(model), lora(twin)


def fitted(model: Any, **settings: Any) -> blk.LaplaceLoRA:
    return blk.LaplaceLoRA(model, class_token_ids=IDS, rank=None, **settings).fit(BATCHES, progress=False)


QUANTISED: dict[str, Callable[[], tuple[Any, Any]]] = {
    "torchao, int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao, int4": lambda: torchao("IntxWeightOnlyConfig", weight_dtype="int4"),
    "torchao, float8": lambda: torchao("Float8WeightOnlyConfig"),
    "bitsandbytes, 4 bits": lambda: bitsandbytes(4),
    "bitsandbytes, 4 bits nested": lambda: bitsandbytes(4, nested=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUANTISED)
def test_as_the_dequantised_twin(name: str, tmp_path: Path):
    model, twin = QUANTISED[name]()
    before = {key: copy.deepcopy(value) for key, value in model.state_dict().items()}
    ours, expected = fitted(model), fitted(twin)
    found, truth = ours.predict(BATCHES[0]), expected.predict(BATCHES[0])
    assert relative(found.mean, truth.mean) < TOLERANCE
    assert relative(found.covariance, truth.covariance) < TOLERANCE
    assert relative(ours.log_marginal_likelihood(), expected.log_marginal_likelihood()) < TOLERANCE
    for curvature in ("ekfac", "exact"):
        own, other = (fitted(one, curvature=curvature).predict(BATCHES[0]).covariance for one in (model, twin))
        assert relative(own, other) < TOLERANCE, curvature
    scores = [one.score(TEXTS, 8, torch.Generator().manual_seed(0)) for one in (ours, expected)]
    assert relative(scores[0].log_prob, scores[1].log_prob) < TOLERANCE
    assert float(scores[0].mutual_information.max()) > 0
    ours.save_pretrained(tmp_path)
    again = blk.LaplaceLoRA.from_pretrained(model, tmp_path).predict(BATCHES[0])
    assert relative(again.covariance, found.covariance) < 1e-6
    after = model.state_dict()
    assert all(torch.equal(_plain(after[key]), _plain(value)) for key, value in before.items())
    assert not any(module.training for module in model.modules())


def _plain(value: Tensor) -> Tensor:
    return value.dequantize() if hasattr(value, "dequantize") and hasattr(value, "__tensor_flatten__") else value


@pytest.mark.filterwarnings("ignore")
def test_8_bits_of_bitsandbytes():
    """It rounds its inputs to 8 bits as well, which no twin does: the same to that."""
    model, twin = bitsandbytes(8)
    found, truth = fitted(model).predict(BATCHES[0]), fitted(twin).predict(BATCHES[0])
    assert relative(found.mean, truth.mean) < 0.1
    assert relative(found.covariance, truth.covariance) < 0.25


@pytest.mark.filterwarnings("ignore")
def test_4_bits_that_have_run_in_eval_mode_are_refused():
    """bitsandbytes packs them for a product without gradients, on CPUs that have it."""
    bnb = pytest.importorskip("bitsandbytes")
    if not bnb.functional.has_avx512bf16():
        pytest.skip("a CPU without AVX512-BF16 packs nothing")
    model, _ = bitsandbytes(4)
    with torch.no_grad():
        model.eval()(**TEXTS)
    with pytest.raises(ValueError, match=r"o_proj \(Linear4bit\).*load the model again"):
        fitted(model)


@pytest.mark.filterwarnings("ignore")
def test_quantised_inputs_of_torchao_are_refused():
    model, _ = torchao("Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(ValueError, match="quantised"):
        fitted(model)


# Without any package: layers whose backward pass is missing or wrong.


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, factor: float) -> Tensor:
        ctx.weight, ctx.factor = weight, factor
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.factor * g[0] @ ctx.weight, None, None


class Quantised(nn.Module):
    """A frozen linear map with whole numbers for weights, and a backward pass that is `factor` times the right one."""

    def __init__(self, size: int, factor: float | None):
        super().__init__()
        self.in_features = self.out_features = size
        self.factor = factor
        self.weight = nn.Parameter(torch.randint(-5, 5, (size, size)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.factor is None:
            return x.detach() @ self.weight.to(x.dtype).T
        return Product.apply(x, self.weight.to(x.dtype), self.factor)


class Residual(nn.Module):
    """A path beside the quantised layer, so that gradients arrive in any case."""

    def __init__(self, factor: float | None):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 6), Quantised(6, factor), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(hidden + 0.1 * self.middle(torch.tanh(hidden)))


def residual(factor: float | None) -> Residual:
    torch.manual_seed(0)
    return Residual(factor).double()


BATCH = (torch.ones(4, 5).double().cumsum(0).sin(), torch.arange(4) % 3)


@pytest.mark.parametrize(("factor", "words"), [(None, "has none"), (0.5, "off by 5.0e-01"), (-1.0, "off by 2.0e")])
def test_a_wrong_backward_pass_is_refused(factor: float | None, words: str):
    with pytest.raises(ValueError, match=f"middle .Quantised.: a backward pass .*{words}"):
        blk.LaplaceLoRA(residual(factor)).fit([BATCH], progress=False)


def test_a_right_backward_pass_is_served():
    model = residual(1.0)
    plain = residual(1.0)
    plain.middle = nn.Linear(6, 6, bias=False).double().requires_grad_(False)
    plain.middle.weight.data = model.middle.weight.data.double()
    found, truth = (
        blk.LaplaceLoRA(one, rank=None).fit([BATCH], progress=False).predict(BATCH).covariance for one in (model, plain)
    )
    assert relative(found, truth) < 1e-10


def test_a_map_of_floats_that_is_not_linear_is_no_quantised_layer():
    """A frozen nn.Linear with an activation inside: its derivative is autograd's, whatever it is."""

    class Activated(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    model = residual(1.0)
    model.middle = Activated(6, 6).double().requires_grad_(False)
    laplace = blk.LaplaceLoRA(model, rank=None).fit([BATCH], progress=False)
    assert torch.isfinite(laplace.predict(BATCH).covariance).all()


def test_a_derivative_that_is_zero_is_not_believed():
    """Forward mode through an operation that has none gives zero, and says nothing."""

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> Tensor:
            return 2 * g[0]

    def function(values: Any) -> Tensor:
        x = values["x"]
        return Cut.apply(x) if torch.is_grad_enabled() else 2 * x.detach()

    product = JacobianVectorProduct()
    deviations = {"x": torch.ones(2, 3)}
    with torch.no_grad():
        found = product(function, {"x": torch.zeros(3)}, deviations)
    assert relative(found, 2 * deviations["x"]) < 1e-4
    assert "disagrees with a backward pass (0 against" in product.reasons["forward"]
