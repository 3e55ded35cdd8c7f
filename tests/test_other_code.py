"""Models whose layers do not compute W x + b of their own call, or not when a hook could see it."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from dense import relative
from situations import (
    CURVATURES,
    Scene,
    adapted,
    floats,
    judge,
    judge_scene,
    labelled,
    padded,
    plain_module,
    run_last,
    tensors,
    unpadded_row,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import bayesian_lora_kernels as blk

IDS = [11, 12, 13]
COMPILED = ("compile",)


def llama(classes: int | None = None, layers: int = 2, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        **({"num_labels": classes} if classes else {}),
        **settings,
    )
    if classes:
        model, task = transformers.LlamaForSequenceClassification(config), "SEQ_CLS"
    else:
        model, task = transformers.LlamaForCausalLM(config), "CAUSAL_LM"
    return adapted(model, ["q_proj", "v_proj"], task_type=task)


# torch.compile

BACKEND = "eager"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.q(x))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Blocks(nn.Module):
    """Small enough to be compiled in no time."""

    def __init__(self):
        super().__init__()
        self.model, self.score = Body(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.model(x).mean(dim=1))


def blocks() -> Any:
    return plain_module(Blocks)


def whole(model: Any) -> Any:
    return torch.compile(model, backend=BACKEND)


def in_place(model: Any) -> Any:
    model.compile(backend=BACKEND)
    return model


def inner(model: Any) -> Any:
    model.model = torch.compile(model.model, backend=BACKEND)
    return model


def regional_in_place(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend=BACKEND)
    return model


def regional(model: Any) -> Any:
    layers = model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = torch.compile(layer, backend=BACKEND)
    return model


def one_linear(model: Any) -> Any:
    block = model.model.layers[0]
    block.q = torch.compile(block.q, backend=BACKEND)
    return model


def its_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend=BACKEND)
    return model


def a_method(model: Any) -> Any:
    """One layer's forward, by function, as regional compilation in training scripts."""
    layer = model.model.layers[1]
    layer.forward = torch.compile(layer.forward, backend=BACKEND)
    return model


def head_only(model: Any) -> Any:
    model.score = torch.compile(model.score, backend=BACKEND)
    return model


def linears_in_place(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.compile(backend=BACKEND)
    return model


def unused(model: Any) -> Any:
    """Compiled for somebody else: the model itself is as it was."""
    torch.compile(model, backend=BACKEND)(floats(2, 3, 5))
    return model


COMPILE = {
    f.__name__: f
    for f in (
        whole,
        in_place,
        inner,
        regional,
        regional_in_place,
        one_linear,
        its_forward,
        a_method,
        head_only,
        linears_in_place,
        unused,
    )
}


QUICK = ("whole", "regional_in_place", "one_linear", "a_method", "unused")  # a compilation takes seconds


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def twin(model: Any) -> Any:
    """Another module of the same parameters, not copies; taken before anything is compiled."""
    plain = copy.deepcopy(model)
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(owner), leaf, p)
    return plain


def compiled_scene(how: Callable[[Any], Any], ran: bool) -> Scene:
    model = blocks()
    plain = twin(model)
    wrapped, batches = how(model), tensors((4, 3, 5), (3, 4, 5))
    if ran:
        wrapped(batches[0][0])
        with torch.no_grad():
            wrapped(batches[0][0])
    return Scene(wrapped, batches, plain=plain, words=COMPILED, factors=False)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("ran", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["new", "has run"])
@pytest.mark.parametrize("how", [h if h in QUICK else pytest.param(h, marks=pytest.mark.slow) for h in COMPILE])
def test_compiled(how: str, ran: bool):
    scene = compiled_scene(COMPILE[how], ran)
    if how == "unused":
        scene.words = ()
    judge_scene(scene, "ekfac")


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("how", ["regional_in_place", pytest.param("a_method", marks=pytest.mark.slow)])
def test_compiled_after_it_was_given(how: str):
    """LaplaceLoRA sees a plain model; it is compiled, and run, before fit or between fit and predict."""
    batch = tensors((4, 3, 5))[0]
    expected = blk.LaplaceLoRA(blocks(), rank=None).fit([batch], progress=False).predict(batch).covariance

    def ours(before: bool) -> Tensor:
        model = blocks()
        laplace = blk.LaplaceLoRA(model, rank=None)
        if before:
            COMPILE[how](model)(batch[0])
        laplace.fit([batch], progress=False)
        if not before:
            COMPILE[how](model)(batch[0])
        return laplace.predict(batch).covariance

    for before in (False, True):
        judge(lambda before=before: ours(before), COMPILED, lambda got: relative(got, expected))


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_and_has_run():
    judge_scene(compiled_scene(whole, ran=True), "ekfac")


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_causal_model():
    model = llama(layers=1)
    plain, batch = twin(model), labelled(padded([6, 4, 5, 6], 40))
    scene = Scene(whole(model), [batch], run=run_last(IDS), plain=plain, words=COMPILED, factors=False, tolerance=1e-5)
    scene.arguments = {"class_token_ids": IDS}
    judge_scene(scene, "ekfac")


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("how", ["whole", "regional_in_place"])
def test_compiled_by_inductor(how: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "BACKEND", "inductor")
    judge_scene(compiled_scene(COMPILE[how], ran=True), "ekfac")


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_plain_module():
    model = plain_module(lambda: Net(nn.Linear(5, 4)))
    judge_scene(
        Scene(
            torch.compile(model, backend=BACKEND), tensors((6, 5), (5, 5)), plain=model, words=COMPILED, factors=False
        ),
        "ekfac",
    )


# Linear layers that are not plain


class Net(nn.Module):
    def __init__(self, first: nn.Module, width: int = 4):
        super().__init__()
        self.first, self.second = first, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Centred(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 3 * (self.weight - self.weight.mean(dim=1, keepdim=True)), self.bias)


class Scaled(nn.Linear):
    """After the map: a gain that hooks on the module do see as its output."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Residual(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.sin(x)) + x[..., :4]


class Normed(nn.Linear):
    """Normalises its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.norm(dim=-1, keepdim=True))


class Squared(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.square(), self.bias)


class Twice(nn.Linear):
    """Its weight twice in one call."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(super().forward(x[..., :4])))


class BiasBefore(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x + self.bias.sum(), self.weight)


class Maxed(nn.Linear):
    """Output of another width."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :2]


class Positional(nn.Linear):
    """A second argument."""

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return super().forward(gain * x)


class Harmless(nn.Linear):
    """Its own forward, and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Casting(nn.Linear):
    """As quantisation libraries have them: the input is brought to the weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Renamed(nn.Linear):
    """A subclass without anything of its own."""


class Returning(nn.Linear):
    """A tuple, as Megatron's layers do."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class TupleNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)[0]))


class MaxedNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Tied(nn.Module):
    """A weight that a function uses a second time."""

    def __init__(self):
        super().__init__()
        self.encode, self.head = nn.Linear(5, 4), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.linear(torch.tanh(self.encode(x)), self.encode.weight.t()))


class ByFunction(nn.Module):
    """The layer is never called, its weight is used."""

    def __init__(self, call_too: bool = False, bias_only: bool = False):
        super().__init__()
        self.first, self.second, self.call_too, self.bias_only = nn.Linear(5, 5), nn.Linear(5, 3), call_too, bias_only

    def forward(self, x: Tensor) -> Tensor:
        if self.bias_only:
            return self.second(torch.tanh(self.first(x)) + self.first.bias)
        hidden = torch.tanh(x @ self.first.weight.T)
        return self.second(hidden + torch.sin(self.first(x)) if self.call_too else hidden)


class Penalised(Net):
    """The logits have a term in the weight's norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.first.weight.square().sum()


class Merged(nn.Module):
    """Two layers in one call, as fused q, k and v."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.second = nn.Linear(5, 2), nn.Linear(5, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = torch.cat([self.q.weight, self.k.weight]), torch.cat([self.q.bias, self.k.bias])
        return self.second(torch.tanh(nn.functional.linear(x, weight, bias)))


class Attention(nn.Module):
    """PyTorch's attention uses out_proj by function."""

    def __init__(self):
        super().__init__()
        self.attention, self.second = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)
        for name, p in self.named_parameters():
            p.requires_grad_("out_proj" in name or "second" in name)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))


class Encoder(nn.Module):
    """PyTorch's encoder layer; in eval mode without gradients it takes a fast path that calls no layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.second = nn.Linear(6, 3)
        for name, p in self.named_parameters():
            p.requires_grad_("linear" in name or "second" in name)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.layer(x).mean(dim=1))


class Repeated(nn.Module):
    """One layer under three names."""

    def __init__(self):
        super().__init__()
        layer = nn.Linear(5, 5)
        self.layers, self.head = nn.ModuleList([layer] * 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class SharedWeight(nn.Module):
    """One parameter in two layers."""

    def __init__(self, bias: bool = False):
        super().__init__()
        self.first, self.again, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        if bias:
            self.again.bias = self.first.bias
        else:
            self.again.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.first(x)))))


class NoGrad(Net):
    """A part under no_grad: the layer is called, and the logits know nothing of it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = torch.tanh(self.first(x))
        return self.second(hidden + 0.1 * torch.tanh(self.first(x)))


class Detached(Net):
    """A stop-gradient in the middle: autograd's number is that without it."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(torch.tanh(hidden + (hidden.round() - hidden).detach()) + hidden.detach())


class Custom(torch.autograd.Function):
    """A gradient of the user's own: autograd's number is what counts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 0.5 * g


class Straight(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(Custom.apply(self.first(x)) + x[:, :4]))


def hooked(register: str, change: Callable[..., Any], module: str = "first", **options: Any) -> nn.Module:
    model = Net(nn.Linear(5, 4))
    getattr(model.get_submodule(module), register)(change, **options)
    return model


def removed(register: str, change: Callable[..., Any]) -> nn.Module:
    model = Net(nn.Linear(5, 4))
    getattr(model.first, register)(change).remove()
    return model


def patched(how: str) -> nn.Module:
    model = Net(nn.Linear(5, 4))
    first = model.first
    if how == "harmless":
        first.forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight, self.bias), first)
    elif how == "scaled":
        first.forward = types.MethodType(lambda self, x: 3 * nn.functional.linear(x, self.weight, self.bias), first)
    elif how == "wrapped":
        before = first.forward
        first.forward = lambda x: before(torch.sin(x))
    elif how == "squared":
        first.forward = lambda x: nn.functional.linear(x, first.weight**2, first.bias)
    return model


def normed(kind: str) -> nn.Module:
    model = Net(nn.Linear(5, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "weight norm":
            parametrizations.weight_norm(model.first)
        elif kind == "old weight norm":
            nn.utils.weight_norm(model.first)
        elif kind == "spectral norm":
            parametrizations.spectral_norm(model.first)
        elif kind == "old spectral norm":
            nn.utils.spectral_norm(model.first)
        elif kind == "orthogonal":
            parametrizations.orthogonal(model.first)
        elif kind == "pruned":
            prune.random_unstructured(model.first, "weight", amount=0.4)
        elif kind == "on the bias":
            parametrize.register_parametrization(model.first, "bias", nn.Softplus())
    return model


class Frozen(nn.Module):
    """As torch.nn.utils.parametrize has it, around a weight that is not trained: nothing is in the way."""

    def forward(self, w: Tensor) -> Tensor:
        return w - w.mean()


def frozen_parametrization() -> nn.Module:
    model = Net(nn.Linear(5, 4))
    parametrize.register_parametrization(model.first, "weight", Frozen())
    model.first.requires_grad_(False)
    return model


SUBCLASS = ("subclass", "plain", "forward")
FUNCTION = ("outside", "used", "function", "never called")
HOOK = ("hook",)
SHARED = ("shared", "several modules", "several names", "names")
PATCH = ("forward", "patched", "plain")
PARAMETRIZED = ("parametriz", "outside nn.Linear", "weight norm", "spectral", "plain")
NOT_TRAINED = ("requires_grad", "forward", "no_grad")

X = ((6, 5), (4, 5))
XT = ((4, 3, 6), (2, 5, 6))


def of(build: Callable[[], nn.Module], *words: str, shapes: Any = X, **scene: Any) -> Any:
    return lambda: Scene(plain_module(build), tensors(*shapes), words=words, **scene)


def sub(kind: type[nn.Linear], *words: str, net: Any = Net, width: int = 4, **scene: Any) -> Any:
    return of(lambda: net(kind(5, 4), width), *words, **{"factors": False, **scene})


SCENES: dict[str, Callable[[], Scene]] = {
    "plain": of(lambda: Net(nn.Linear(5, 4))),
    # Subclasses
    "centred": sub(Centred, *SUBCLASS),
    "scaled": sub(Scaled, *SUBCLASS),
    "residual": sub(Residual, *SUBCLASS),
    "normalised input": sub(Normed, *SUBCLASS),
    "squared weight": sub(Squared, *SUBCLASS),
    "weight twice in a call": sub(Twice, *SUBCLASS, shapes=((6, 5), (4, 5)), net=lambda f, w: Net(Twice(4, 4), w)),
    "bias before": sub(BiasBefore, *SUBCLASS),
    "another width": sub(Maxed, *SUBCLASS, width=2),
    "a tuple": sub(Returning, *SUBCLASS, "tuple", net=TupleNet),
    "a second argument": sub(Positional, *SUBCLASS),
    "harmless subclass": sub(Harmless, *SUBCLASS),
    "casting subclass": sub(Casting, *SUBCLASS),
    "empty subclass": sub(Renamed, factors=True),
    "non-dynamically quantizable": sub(nn.modules.linear.NonDynamicallyQuantizableLinear, factors=True),
    # Weights in functions
    "weight used twice": of(Tied, *FUNCTION, factors=False),
    "weight in a function only": of(ByFunction, *FUNCTION, factors=False),
    "weight in a function too": of(lambda: ByFunction(call_too=True), *FUNCTION, factors=False),
    "bias in a function too": of(lambda: ByFunction(bias_only=True), *FUNCTION, factors=False),
    "norm of a weight": of(lambda: Penalised(nn.Linear(5, 4)), *FUNCTION, factors=False),
    "two layers in one": of(Merged, *FUNCTION, factors=False),
    "PyTorch's attention": of(Attention, *FUNCTION, shapes=XT, factors=False),
    "PyTorch's encoder layer": of(Encoder, *FUNCTION, shapes=XT),
    "no_grad beside a call": of(lambda: NoGrad(nn.Linear(5, 4)), *NOT_TRAINED, factors=False),
    "stop-gradient": of(lambda: Detached(nn.Linear(5, 4))),
    "a gradient of one's own": of(lambda: Straight(nn.Linear(5, 4))),
    # Hooks
    "hook on output": of(lambda: hooked("register_forward_hook", lambda m, a, y: 3 * y), *HOOK),
    "hook on output, first": of(lambda: hooked("register_forward_hook", lambda m, a, y: 3 * y, prepend=True), *HOOK),
    "hook with keywords": of(
        lambda: hooked("register_forward_hook", lambda m, a, k, y: torch.sin(y), with_kwargs=True), *HOOK
    ),
    "hook that adds the input": of(lambda: hooked("register_forward_hook", lambda m, a, y: y + a[0][:, :4]), *HOOK),
    "hook on input": of(lambda: hooked("register_forward_pre_hook", lambda m, a: (torch.sin(a[0]),)), *HOOK),
    "hook on input, in place": of(lambda: hooked("register_forward_pre_hook", clamp_input), *HOOK, factors=False),
    "hook in place": of(lambda: hooked("register_forward_hook", double), *HOOK, factors=False),
    "hook that looks": of(lambda: hooked("register_forward_hook", lambda m, a, y: None)),
    "hook on the model": of(lambda: hooked("register_forward_hook", lambda m, a, y: 2 * y, module=""), *HOOK),
    "hook on the weights": of(lambda: hooked("register_forward_pre_hook", scale_weight), *HOOK, factors=False),
    "hook on gradients": of(
        lambda: hooked("register_full_backward_hook", lambda m, i, o: (2 * i[0],), "second"), *HOOK, factors=False
    ),
    "hook that is gone": of(lambda: removed("register_forward_hook", lambda m, a, y: 3 * y)),
    # The same thing twice
    "a module under three names": of(Repeated, *SHARED),
    "a weight in two modules": of(SharedWeight, *SHARED, factors=False),
    "a bias in two modules": of(lambda: SharedWeight(bias=True), *SHARED, factors=False),
    # Patched
    "patched, harmless": of(lambda: patched("harmless"), *PATCH),
    "patched, scaled": of(lambda: patched("scaled"), *PATCH, factors=False),
    "patched, around": of(lambda: patched("wrapped"), *PATCH, factors=False),
    "patched, another weight": of(lambda: patched("squared"), *PATCH, factors=False),
    "frozen parametrization": of(frozen_parametrization),
}


def clamp_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    args[0].clamp_(-0.5, 0.5)


def double(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(2)


def scale_weight(module: Any, args: Any) -> None:
    """Another weight for every call, as quantisation-aware training has it: no change of the parameter itself."""
    with torch.no_grad():
        module.weight.copy_(module.weight.clamp(-0.2, 0.2))


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", SCENES)
def test_right_or_refused(name: str, curvature: str):
    judge_scene(SCENES[name](), curvature)


@pytest.mark.parametrize("head", [False, True], ids=["all", "head"])
@pytest.mark.parametrize(
    "kind",
    ["weight norm", "old weight norm", "spectral norm", "old spectral norm", "orthogonal", "pruned", "on the bias"],
)
def test_parametrized_weights(kind: str, head: bool):
    """All trainable parameters: refused, for one is no weight of a layer. The head alone: served, or refused."""
    model = plain_module(lambda: normed(kind))
    scene = Scene(model, tensors(*X), words=PARAMETRIZED, served=head)
    if head:
        scene.arguments = {"modules": ["second"]}
    judge_scene(scene, "ekfac")


@pytest.mark.parametrize("curvature", CURVATURES)
def test_the_head_alone_of_a_module_under_three_names(curvature: str):
    judge_scene(Scene(plain_module(Repeated), tensors(*X), arguments={"modules": ["head"]}, words=SHARED), curvature)


@pytest.mark.parametrize("modules", [["layers.0"], ["layers.1"], r"layers\.\d"], ids=str)
def test_a_module_by_one_of_its_names(modules: Any):
    scene = Scene(plain_module(Repeated), tensors(*X), arguments={"modules": modules}, words=(*SHARED, "matches"))
    judge_scene(scene, "ekfac")


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_patched_forward_of_a_lora_layer(curvature: str):
    """As Unsloth and others do: the adapted layer computes LoRA by function, the small layers are not called."""
    model = llama(3)
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            a, b, scaling = module.lora_A["default"], module.lora_B["default"], module.scaling["default"]
            module.forward = lambda x, m=module, a=a, b=b, s=scaling: (
                m.base_layer(x) + s * (x @ a.weight.T) @ b.weight.T
            )
    scene = Scene(model, [labelled(padded([6, 4, 5], 40))], words=FUNCTION, factors=False, tolerance=1e-5)
    judge_scene(scene, curvature)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_hooks_on_adapted_layers(curvature: str):
    """Activation steering: a hook on a decoder layer changes what it gives."""
    model = llama(3)
    direction = floats(16)

    def steer(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] + direction, *output[1:]) if isinstance(output, tuple) else output + direction

    model.get_base_model().model.layers[0].register_forward_hook(steer)
    judge_scene(Scene(model, [labelled(padded([6, 4, 5], 40))], words=HOOK, tolerance=1e-5), curvature)


@pytest.mark.parametrize("where", ["lora_A", "lora_B", "base_layer", "q_proj"])
def test_hooks_inside_an_adapted_layer(where: str):
    model = llama(3)
    name = next(n for n, _ in model.named_modules() if n.endswith("q_proj"))
    module = model.get_submodule(name if where == "q_proj" else f"{name}.{where}")
    module = module["default"] if isinstance(module, nn.ModuleDict) else module
    module.register_forward_hook(lambda m, a, y: 2 * y)
    judge_scene(Scene(model, [labelled(padded([6, 4, 5], 40))], words=HOOK, tolerance=1e-5), "ekfac")


# Heads by function


class Tiny(nn.Module):
    """A language model that multiplies with its head's weight instead of calling the head."""

    def __init__(self, how: str):
        super().__init__()
        self.embed, self.mix = nn.Embedding(40, 8).requires_grad_(False), nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 40, bias=False).requires_grad_(False)
        self.how = how
        if how == "tied":
            self.lm_head.weight = self.embed.weight

    def can_generate(self) -> bool:
        return True

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = torch.cumsum(torch.tanh(self.mix(self.embed(input_ids))), dim=1)
        if self.how == "called":
            return self.lm_head(states)
        if self.how == "called on the last":
            return self.lm_head(states[:, -1:])
        if self.how == "called twice":
            return self.lm_head(states) + self.lm_head(states.flip(-1))
        if self.how == "flat":
            return self.lm_head(states.flatten(0, 1)).unflatten(0, states.shape[:2])
        weight = self.embed.weight if self.how == "tied" else self.lm_head.weight
        return nn.functional.linear(states, weight)


@pytest.mark.parametrize("classes", [True, False], ids=["class ids", "vocabulary"])
@pytest.mark.parametrize("how", ["called", "function", "tied", "called on the last", "called twice", "flat"])
def test_heads(how: str, classes: bool):
    model = plain_module(lambda: Tiny(how))
    ids = torch.randint(3, 40, (4, 6))
    batch = {"input_ids": ids, "labels": torch.arange(4) % 3}
    arguments: dict[str, Any] = {"class_token_ids": IDS} if classes else {}
    scene = Scene(
        model, [batch], run=run_last(IDS if classes else None), arguments=arguments, words=("head", "forward=")
    )
    if how == "called":
        scene.words = ()
    judge_scene(scene, "ekfac")


@pytest.mark.parametrize("trained", [True, False], ids=["new tokens", "other tokens"])
def test_trainable_tokens_with_a_tied_head(trained: bool):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = adapted(
        transformers.LlamaForCausalLM(config),
        ["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        trainable_token_indices=[38, 39],
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "trainable_tokens" in name:
                p.add_(torch.randn_like(p))
    ids = [38, 39, 5] if trained else IDS
    batch = labelled(padded([6, 4, 5, 6], 38))
    scene = Scene(
        model,
        [batch],
        run=run_last(ids),
        single=unpadded_row,
        arguments={"class_token_ids": ids, "modules": r".*lora_[AB].*"},
        words=("trainable_token", "trainable tokens", "shared", "head"),
        tolerance=1e-5,
    )
    judge_scene(scene, "ekfac")


BESIDE: dict[str, dict[str, Any]] = {
    "LoRA on the embedding": {"targets": ["q_proj", "embed_tokens"]},
    "DoRA on the embedding": {"targets": ["q_proj", "embed_tokens"], "use_dora": True},
    "a trained embedding": {"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "a trained embedding and head": {"targets": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "trained tokens": {"targets": ["q_proj"], "trainable_token_indices": [38, 39]},
    "a trained norm": {"targets": ["q_proj"], "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("kind", BESIDE)
def test_what_is_trained_beside_linear_layers(kind: str, tied: bool, curvature: str):
    """The error says what to pass; what was passed then is right."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    model = adapted(transformers.LlamaForCausalLM(config), **{"task_type": "CAUSAL_LM", **BESIDE[kind]})
    arguments = {"class_token_ids": IDS}
    with pytest.raises(ValueError, match=r"outside nn.Linear: .*default.* pass modules='\.\*', which takes every"):
        blk.LaplaceLoRA(model, **arguments)
    scene = Scene(
        model,
        [labelled(padded([6, 4, 5, 6], 38))],
        run=run_last(IDS),
        arguments={**arguments, "modules": ".*"},
        factors=False,
        tolerance=1e-5,
    )
    assert judge_scene(scene, curvature) == "right"
