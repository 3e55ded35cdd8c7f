"""Models inside something else: data parallel, offloaded, compiled, LoRA on parameters that are no layers."""

from __future__ import annotations

import copy
import importlib.util
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from dense import relative
from models import in_float64
from situations import CURVATURES, IDS, LLAMA, Scene, adapted, judge, judge_scene, labelled, padded, run_last, run_plain
from torch import Tensor, nn

import bayesian_lora_kernels as blk

WORDS = ("module", "DataParallel", "unwrap")
OFFLOAD = ("offload", "meta", "accelerate")


def llama(causal: bool = True) -> Any:
    torch.manual_seed(0)
    if causal:
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
        return in_float64(adapted(model, ["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**LLAMA, num_labels=3))
    return in_float64(adapted(model, ["q_proj", "v_proj"], task_type="SEQ_CLS"))


def twin(model: Any) -> Any:
    """Another module of the same parameters, not copies."""
    plain = copy.deepcopy(model)
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(owner), leaf, p)
    return plain


@pytest.fixture(scope="module")
def _group() -> Iterator[None]:
    """A process group of one."""
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs torch.distributed to itself")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def ddp_static(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, static_graph=True)


def ddp_unused(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


class Lightning(nn.Module):
    """A training module with the model in an attribute."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.net = model

    def forward(self, **batch: Tensor) -> Any:
        return self.net(**batch)


class Renaming(Lightning):
    """It takes other names, and gives logits."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.net(input_ids=input_ids, attention_mask=attention_mask).logits


class Averaged(nn.Module):
    """The same adapter twice, on the text and on the text backwards."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.net = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        first = self.net(input_ids=input_ids, attention_mask=attention_mask).logits
        return (first + self.net(input_ids=(input_ids * 7) % 40, attention_mask=attention_mask).logits) / 2


class Ensemble(nn.Module):
    """Two copies with adapters of their own."""

    def __init__(self, model: nn.Module):
        super().__init__()
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in other.named_parameters():
                if "lora_B" in name:
                    p.mul_(-0.5)
        self.members = nn.ModuleList([model, other])

    def forward(self, **batch: Tensor) -> Tensor:
        return sum(member(**batch).logits for member in self.members) / 2


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], tuple[str, ...]]] = {
    "nothing": (lambda m: m, ()),
    "DDP": (ddp, WORDS),
    "DDP, static graph": (ddp_static, WORDS),
    "DDP, unused parameters": (ddp_unused, WORDS),
    "DataParallel": (nn.DataParallel, WORDS),
    "Lightning": (Lightning, (*WORDS, "head", "forward=")),
    "DDP of Lightning": (lambda m: ddp(Lightning(m)), (*WORDS, "head", "forward=")),
    "DataParallel of Lightning": (lambda m: nn.DataParallel(Lightning(m)), (*WORDS, "head", "forward=")),
}
COMPILED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled DDP": lambda m: compiled(ddp(m)),
    "DDP of a compiled model": lambda m: ddp(compiled(m)),
    "compiled DataParallel": lambda m: compiled(nn.DataParallel(m)),
}
CLASSIFIERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "renaming": Renaming,
    "averaged": Averaged,
    "ensemble": Ensemble,
    "DDP of an ensemble": lambda m: ddp(Ensemble(m)),
}


def wrapped(wrap: Callable[[nn.Module], nn.Module], causal: bool, words: tuple[str, ...], plain: bool = True) -> Scene:
    model = llama(causal)
    other = twin(model) if plain else None
    batches = [labelled(padded([6, 4, 5, 6], 40)), labelled(padded([3, 5], 40, seed=4))]
    scene = Scene(wrap(model), batches, plain=other, words=words, factors=False)
    if causal:
        scene.run, scene.arguments = run_last(IDS), {"class_token_ids": IDS}
    return scene


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("causal", [False, True], ids=["classes", "causal"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped(name: str, causal: bool, curvature: str):
    wrap, words = WRAPPERS[name]
    judge_scene(wrapped(wrap, causal, words), curvature)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_wrapped_classifiers(name: str, curvature: str):
    scene = wrapped(CLASSIFIERS[name], False, WORDS, plain=False)
    scene.plain = getattr(scene.model, "module", scene.model)
    judge_scene(scene, curvature)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_group", "_fresh_compiler")
@pytest.mark.parametrize("causal", [False, True], ids=["classes", "causal"])
@pytest.mark.parametrize("name", COMPILED)
def test_nested(name: str, causal: bool):
    judge_scene(wrapped(COMPILED[name], causal, (*WORDS, "compile")), "ekfac")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_group")
def test_nested_small():
    """compile(DDP(PeftModel)), on a model that is compiled in no time."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), ["0", "2"])
    x = torch.randn(5, 5, dtype=torch.float64)
    nested = compiled(ddp(model))
    scene = Scene(
        nested, [(x, torch.arange(5) % 3)], plain=twin(model), words=(*WORDS, "compile"), factors=False, run=run_plain
    )
    judge_scene(scene, "ekfac")
    torch._dynamo.reset()


@pytest.mark.usefixtures("_group")
def test_no_reduction_is_left_waiting():
    """DDP goes on training after fit and predict: its buckets are in order."""
    model = llama(causal=False)
    wrapped_model = ddp(model)
    batch = labelled(padded([6, 4, 5, 6], 40))
    wrapped_model.train()

    def ours() -> float:
        laplace = blk.LaplaceLoRA(wrapped_model).fit([batch], progress=False)
        laplace.predict(batch)
        wrapped_model(**batch).loss.backward()
        return float(any(p.grad is None for p in model.parameters() if p.requires_grad))

    judge(ours, WORDS)


# accelerate

HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None
needs_accelerate = pytest.mark.skipif(not HAS_ACCELERATE, reason="accelerate is not installed")


def offload_cpu(model: Any) -> Any:
    import accelerate

    return accelerate.cpu_offload(model, execution_device="cpu")


def offload_base(model: Any) -> Any:
    import accelerate

    accelerate.cpu_offload(model.get_base_model().model.layers[0], execution_device="cpu")
    return model


def dispatched(model: Any) -> Any:
    """Hooks of accelerate, and nothing offloaded: all on the CPU."""
    import accelerate

    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True, main_device="cpu")
    return model


def with_hook(model: Any) -> Any:
    """CpuOffload of accelerate as pipelines use it: a module.forward that is replaced."""
    import accelerate

    for layer in model.get_base_model().model.layers:
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    return model


ACCELERATE = {f.__name__: f for f in (offload_cpu, offload_base, dispatched, with_hook)}


@needs_accelerate
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("causal", [False, True], ids=["classes", "causal"])
@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate(name: str, causal: bool, curvature: str):
    """The truth is a copy's: what is offloaded has no parameters that autograd could use."""
    plain = llama(causal)
    arguments: dict[str, Any] = {"class_token_ids": IDS} if causal else {}
    batch = labelled(padded([6, 4, 5, 6], 40))
    settings: dict[str, Any] = {**arguments, "curvature": curvature, "rank": None}
    expected = blk.LaplaceLoRA(plain, **settings).fit([batch], progress=False).predict(batch).covariance

    def ours() -> Tensor:
        model = ACCELERATE[name](llama(causal))
        return blk.LaplaceLoRA(model, **settings).fit([batch], progress=False).predict(batch).covariance

    judge(ours, OFFLOAD, lambda got: relative(got, expected))


# Offloaded is what has no adapter: attention stays in memory.
KEPT = ("self_attn", "input_layernorm", "post_attention_layernorm")
HERE = {
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    **{f"model.layers.{i}.{k}": "cpu" for i in (0, 1) for k in KEPT},
}
ELSEWHERE = {
    "MLPs": ["model.layers.0.mlp", "model.layers.1.mlp"],
    "embedding": ["model.embed_tokens", "model.layers.1.mlp"],
    "head": ["model.embed_tokens", "model.layers.0.mlp", "lm_head"],
}


def base() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).double()


def offloaded(where: str, parts: list[str], folder: Path) -> Any:
    """Parts of the base model in the memory of the CPU beside its modules, or on disk; the adapter comes afterwards."""
    import accelerate

    model = base()
    others = {"model.layers.0.mlp", "model.layers.1.mlp", "model.embed_tokens", "lm_head"} - {*parts}
    places = {**HERE, **dict.fromkeys(others, "cpu"), **dict.fromkeys(parts, where)}
    if where == "disk":
        accelerate.dispatch_model(model, places, offload_dir=str(folder), force_hooks=True, main_device="cpu")
    else:
        for part in parts:
            accelerate.cpu_offload(model.get_submodule(part), execution_device="cpu")
    return adapted(model, ["q_proj", "v_proj"], double=False, task_type="CAUSAL_LM")


@needs_accelerate
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("what", ELSEWHERE)
def test_offloaded_without_the_adapter(what: str, where: str, tmp_path: Path):
    batch = labelled(padded([6, 4, 5, 6], 40))
    plain = adapted(base(), ["q_proj", "v_proj"], task_type="CAUSAL_LM")
    expected = blk.LaplaceLoRA(plain, class_token_ids=IDS, rank=None).fit([batch], progress=False)
    expected.save_pretrained(tmp_path / "posterior")
    model = offloaded(where, ELSEWHERE[what], tmp_path / "weights")
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = plain.get_parameter(name).data
    assert any(p.is_meta for p in model.parameters())
    laplace = blk.LaplaceLoRA(model, class_token_ids=IDS, rank=None).fit([batch], progress=False)
    assert relative(laplace.predict(batch).covariance, expected.predict(batch).covariance) < 1e-12
    assert abs(float(laplace.log_marginal_likelihood() - expected.log_marginal_likelihood())) < 1e-9
    with pytest.warns(UserWarning, match="on the meta device"):
        loaded = blk.LaplaceLoRA.from_pretrained(model, tmp_path / "posterior")
    assert relative(loaded.predict(batch).covariance, expected.predict(batch).covariance) < 1e-12
    noise = [torch.Generator().manual_seed(0) for _ in range(2)]
    if what == "head":
        with pytest.raises(ValueError, match=r"lm_head\.weight is on the meta device"):
            laplace.score(batch, 8, noise[0])
    else:
        ours, theirs = (one.score(batch, 8, g).log_prob for one, g in zip((laplace, expected), noise, strict=True))
        assert relative(ours, theirs) < 1e-12


# LoRA on parameters


def mixtral(**lora: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **{**LLAMA, "num_hidden_layers": 1}, num_local_experts=2, num_experts_per_tok=1, experts_implementation="eager"
    )
    return adapted(
        transformers.MixtralForCausalLM(config), lora.pop("targets", ["q_proj"]), task_type="CAUSAL_LM", **lora
    )


EXPERTS = ("target_parameters", "ParamWrapper", "expert")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("parameter", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
def test_lora_on_experts(parameter: str, curvature: str):
    model = mixtral(target_parameters=[parameter])
    batch = labelled(padded([6, 4, 5], 40))
    scene = Scene(
        model,
        [batch],
        run=run_last(IDS),
        arguments={"class_token_ids": IDS},
        words=EXPERTS,
        factors=False,
        tolerance=1e-5,
    )
    judge_scene(scene, curvature)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("curvature", CURVATURES)
def test_the_other_layers_beside_lora_on_experts(curvature: str):
    """modules= without the experts: served, for their adapters are constants then."""
    model = mixtral(target_parameters=["mlp.experts.gate_up_proj"])
    names = [n for n, m in model.named_modules() if "q_proj.lora_" in n and isinstance(m, nn.Linear)]
    scene = Scene(
        model,
        [labelled(padded([6, 4, 5], 40))],
        run=run_last(IDS),
        arguments={"class_token_ids": IDS, "modules": names},
        words=EXPERTS,
        tolerance=1e-5,
    )
    judge_scene(scene, curvature)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("curvature", CURVATURES)
def test_attention_of_a_mixture(curvature: str):
    """Experts that are not adapted are in nobody's way."""
    scene = Scene(
        mixtral(targets=["q_proj", "v_proj"]),
        [labelled(padded([6, 4, 5], 40))],
        run=run_last(IDS),
        arguments={"class_token_ids": IDS},
        tolerance=1e-5,
    )
    judge_scene(scene, curvature)


def test_all_linear_on_a_mixture():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **{**LLAMA, "num_hidden_layers": 1}, num_local_experts=2, num_experts_per_tok=1, experts_implementation="eager"
    )
    model = peft.get_peft_model(
        transformers.MixtralForCausalLM(config),
        peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    batch = labelled(padded([6, 4, 5], 40))
    scene = Scene(
        model.double().eval(),
        [batch],
        run=run_last(IDS),
        arguments={"class_token_ids": IDS},
        words=EXPERTS,
        factors=False,
        tolerance=1e-5,
    )
    judge_scene(scene, "ekfac")
