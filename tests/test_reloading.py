"""A saved posterior meets a model: the right one, whatever it is called and wrapped in, predicts as before; others are
refused."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from dense import relative
from models import VOCABULARY, Case, causal_case, mlp
from torch import nn

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.model import fingerprint
from bayesian_lora_kernels.model.layers import find_layers
from bayesian_lora_kernels.model.names import canonical, placements, unique_names
from bayesian_lora_kernels.posterior import storage

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def base(seed: int = 0, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def classifier(seed: int = 0) -> Any:
    """Its head is new, and random, whenever it is loaded."""
    torch.manual_seed(2)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config)
    nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(seed))
    return model.eval()


KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "llama": (base, {"targets": ("q_proj", "v_proj"), "task_type": "CAUSAL_LM"}),
    "tied head": (lambda seed=0: base(seed, tied=True), {"targets": ("q_proj",), "task_type": "CAUSAL_LM"}),
    "modules to save": (classifier, {"targets": ("query",), "task_type": "SEQ_CLS"}),
    "saved norm": (base, {"targets": ("q_proj",), "modules_to_save": ["norm"], "task_type": "CAUSAL_LM"}),
}


def adapted(model: Any, targets: Any, scale: float = 0.5, **config: Any) -> Any:
    """With an adapter of which no part is zero, and the base as it was."""
    targets = targets if isinstance(targets, str) else list(targets)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, **config))
    noise = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=scale, generator=noise)
        if "modules_to_save.default" in name:
            nn.init.normal_(parameter, 1.0, generator=noise)
    return model


class Saved:
    """An adapter with its posterior in one folder, its base in another, and what is predicted."""

    def __init__(self, folder: Path, kind: str = "llama"):
        self.folder, self.base_folder, self.kind = folder / "adapter", folder / "base", kind
        build, adapter = KINDS[kind]
        build().save_pretrained(self.base_folder)
        model = adapted(build(), **adapter)
        model.save_pretrained(self.folder)
        self.case = causal_case(model, (5, 3, 6, 4), (2, 5, 7), VOCABULARY)
        modules = ".*lora_.*" if kind == "saved norm" else None
        arguments = {} if kind == "modules to save" else self.case.arguments
        self.laplace = blk.LaplaceLoRA(model, modules=modules, **arguments)
        self.laplace.fit(self.case.loader(2), progress=False).save_pretrained(self.folder)
        self.expected = self.laplace.predict(self.case.batch())

    def base(self, seed: int = 0) -> Any:
        return KINDS[self.kind][0](seed)

    def model(self, base: Any = None, **arguments: Any) -> Any:
        return peft.PeftModel.from_pretrained(base or self.base(), self.folder, **arguments)

    def load(self, model: nn.Module) -> blk.LaplaceLoRA:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            return blk.LaplaceLoRA.from_pretrained(model, self.folder)

    def predicts_as_before(self, model: nn.Module, tolerance: float = 1e-6) -> blk.LaplaceLoRA:
        laplace = self.load(model)
        prediction = laplace.predict(self.case.batch())
        assert relative(prediction.mean, self.expected.mean) <= tolerance
        assert relative(prediction.covariance, self.expected.covariance) <= tolerance
        return laplace


@pytest.fixture
def saved(tmp_path: Path, request: Any) -> Saved:
    return Saved(tmp_path, getattr(request, "param", "llama"))


every_kind = pytest.mark.parametrize("saved", KINDS, indirect=True)


# ---- what is right ---------------------------------------------------------------------------------------------------


def by_transformers(saved: Saved, name: str | None = None) -> Any:
    model = type(saved.base()).from_pretrained(saved.base_folder)
    model.load_adapter(str(saved.folder), **({} if name is None else {"adapter_name": name}))
    return model


def with_others(saved: Saved) -> Any:
    """Beside it adapters that wrap other layers too, loaded before and after."""
    model = saved.model(adapter_name="style")
    config = peft.LoraConfig(r=3, target_modules="all-linear", task_type=KINDS[saved.kind][1]["task_type"])
    model.add_adapter("other", config)
    model.set_adapter("style")
    return model


def under_a_name_that_another_has(saved: Saved) -> Any:
    """`default` is an adapter of the same shape with other weights; the right one is called `style`."""
    model = adapted(saved.base(), **KINDS[saved.kind][1], scale=0.1)
    model.load_adapter(saved.folder, adapter_name="style")
    model.set_adapter("style")
    return model


def twice(saved: Saved) -> Any:
    model = saved.model(adapter_name="one")
    model.load_adapter(saved.folder, adapter_name="two")
    model.set_adapter("two")
    return model


RIGHT: dict[str, Callable[[Saved], Any]] = {
    "frozen": lambda saved: saved.model(),
    "trainable": lambda saved: saved.model(is_trainable=True),
    "another name": lambda saved: saved.model(adapter_name="style"),
    "by transformers": by_transformers,
    "by transformers, another name": lambda saved: by_transformers(saved, "style"),
    "beside other adapters": with_others,
    "another has its name": under_a_name_that_another_has,
    "twice": twice,
    "the whole, saved by torch": lambda saved: copy.deepcopy(saved.laplace.model),
}


@pytest.mark.parametrize("how", RIGHT)
@every_kind
def test_the_right_model_predicts_as_before(saved: Saved, how: str) -> None:
    model = RIGHT[how](saved)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    laplace = saved.predicts_as_before(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert set(laplace.posterior) <= {name for name, _ in model.named_modules()}
    evidence = float(saved.laplace.log_marginal_likelihood())
    assert float(laplace.log_marginal_likelihood()) == pytest.approx(evidence, rel=1e-6)
    laplace.save_pretrained(saved.folder)  # and again, from there
    saved.predicts_as_before(saved.model())


def test_the_chosen_adapter_is_the_one_that_the_prediction_uses(saved: Saved) -> None:
    model = twice(saved)
    assert all(name.endswith(".two") for name in saved.load(model).posterior)
    model.set_adapter("one")
    assert all(name.endswith(".one") for name in saved.load(model).posterior)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype(saved: Saved, dtype: torch.dtype) -> None:
    """Also the other way round, and through a checkpoint: both ends hold what the narrow type can."""
    narrow = base(dtype=dtype)
    laplace = saved.load(saved.model(narrow, is_trainable=True))
    laplace.save_pretrained(saved.folder)
    for wide in (base(), base(dtype=dtype).float(), base(dtype=torch.float16), base(dtype=torch.bfloat16)):
        saved.load(saved.model(wide))
    with pytest.raises(ValueError, match="base model"):
        saved.load(saved.model(base(5, dtype=dtype)))


def test_a_base_without_an_adapter_of_its_own_kind(tmp_path: Path) -> None:
    """Plain modules, wrapped as DDP and torch.compile wrap them; the wrapper's own name is no part of theirs."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module, name: str):
            super().__init__()
            self.add_module(name, inner)
            self.inner = name

        def forward(self, x: torch.Tensor) -> Any:
            return self.get_submodule(self.inner)(x)

    def model() -> Any:
        return mlp(trainable=("first.weight", "last.weight", "last.bias")).model

    case = mlp()
    laplace = blk.LaplaceLoRA(model()).fit(case.loader(2), progress=False)
    laplace.save_pretrained(tmp_path)
    expected = laplace.predict(case.batch()).covariance
    for wrapped in (
        Wrapper(model(), "module"),
        Wrapper(model(), "_orig_mod"),
        Wrapper(Wrapper(model(), "_orig_mod"), "module"),
    ):
        again = blk.LaplaceLoRA.from_pretrained(wrapped, tmp_path)
        assert torch.equal(again.predict(case.batch()).covariance, expected)
        again.save_pretrained(tmp_path / "wrapped")
        plain = blk.LaplaceLoRA.from_pretrained(model(), tmp_path / "wrapped")
        assert torch.equal(plain.predict(case.batch()).covariance, expected)
        with torch.no_grad():
            wrapped.get_parameter(next(n for n, _ in wrapped.named_parameters() if "twice.bias" in n)).add_(1)
        with pytest.raises(ValueError, match=r"base model .*twice\.bias differs in 8 of 8 values"):
            blk.LaplaceLoRA.from_pretrained(wrapped, tmp_path)


def test_a_posterior_over_several_adapters_keeps_their_names(tmp_path: Path) -> None:
    def model(*names: str) -> Any:
        model = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name=names[0])
        model.add_adapter(names[1], peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        model.base_model.set_adapter(list(names))
        for i, name in enumerate(names):
            for parameter_name, parameter in model.named_parameters():
                if f".{name}." in parameter_name:
                    nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
        return model

    case = causal_case(model("one", "two"), (5, 3, 6, 4), (2, 5, 7), VOCABULARY)
    laplace = blk.LaplaceLoRA(case.model, **case.arguments).fit(case.loader(2), progress=False)
    assert {name.rpartition(".")[2] for name in laplace.posterior} == {"one", "two"}
    laplace.save_pretrained(tmp_path)
    again = blk.LaplaceLoRA.from_pretrained(model("one", "two"), tmp_path)
    assert torch.equal(again.predict(case.batch()).covariance, laplace.predict(case.batch()).covariance)
    with pytest.raises(ValueError, match=r"12 modules, of which this model lacks 12, such as .*\.one$"):
        blk.LaplaceLoRA.from_pretrained(model("c", "d"), tmp_path)
    with pytest.raises(ValueError, match="adapter's weights are not those"):  # each has the other's
        blk.LaplaceLoRA.from_pretrained(swap(model("one", "two")), tmp_path)


def swap(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".q_proj.lora_" in name and ".one." in name:
                other = model.get_parameter(name.replace(".one.", ".two."))
                kept = parameter.clone()
                parameter.copy_(other)
                other.copy_(kept)
    return model


# ---- what is not -----------------------------------------------------------------------------------------------------


def changed(saved: Saved, name: str, change: Callable[[torch.Tensor], Any]) -> Any:
    model = saved.model()
    with torch.no_grad():
        tensor = next(t for n, t in [*model.named_parameters(), *model.named_buffers()] if n.endswith(name))
        change(tensor)
    return model


def merged(saved: Saved) -> Any:
    model = saved.model()
    model.merge_adapter()
    return model


def merged_beneath(saved: Saved) -> Any:
    """A small other adapter went into the base for good."""
    other = adapted(saved.base(), ["k_proj"], scale=1e-3).merge_and_unload()
    return saved.model(other)


def resized(saved: Saved) -> Any:
    model = saved.base()
    model.resize_token_embeddings(VOCABULARY + 3)
    return saved.model(model)


def scaled(saved: Saved) -> Any:
    model = saved.model()
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = 3.0
    return model


def two_active(saved: Saved) -> Any:
    model = with_others(saved)
    model.base_model.set_adapter(["style", "other"])
    return model


def two_of_two_active(saved: Saved) -> Any:
    model = twice(saved)
    model.base_model.set_adapter(["one", "two"])
    return model


def none_of_two_active(saved: Saved) -> Any:
    model = twice(saved)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["o_proj", "q_proj"]))
    model.set_adapter("other")
    return model


def another_layer(saved: Saved) -> Any:
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(saved.base(), config)


def quantised_otherwise(saved: Saved) -> Any:
    model = saved.model()
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    packed = torch.zeros(16 * 24 // 2, 1, dtype=torch.uint8)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    return model


WRONG: dict[str, tuple[Callable[[Saved], Any], str]] = {
    "another seed": (lambda saved: saved.model(saved.base(5)), r"base model .*lm_head\.weight differs in 8 of 8"),
    "one value of every embedding row": (
        lambda saved: changed(saved, "embed_tokens.weight", lambda w: w[7].add_(0.01)),
        r"base model .*embed_tokens\.weight differs in 1 of 13 values",
    ),
    "a norm": (
        lambda saved: changed(saved, "model.norm.weight", lambda w: w.mul_(1.001)),
        "base model .*norm\\.weight",
    ),
    "a merged adapter": (merged, r"base model .*base_layer\.weight differs.*no adapter merged"),
    "a small adapter merged beneath": (merged_beneath, r"base model .*k_proj\.weight differs in 8 of 8"),
    "more tokens": (resized, r"base model .*lm_head\.weight is of shape \[16, 16\], expected \[13, 16\]"),
    "another quantisation": (quantised_otherwise, r"base model .*down_proj\.weight is of shape \[192, 1\]"),
    "another scaling": (scaled, r"base model .*scaling\.default differs in 8 of 8 values, such as 3 in place of 2"),
    "two adapters active": (two_active, r"adapter 'other' is active here and was not.*set_adapter"),
    "twice, both active": (two_of_two_active, r"adapters one, two all have the weights.* 2 of them are active"),
    "twice, none active": (none_of_two_active, r"adapters one, two .* 0 of them are active; .*set_adapter"),
    "further training": (
        lambda saved: changed(saved, "lora_A.default.weight", lambda w: w.view(-1)[0].add_(1e-6)),
        "adapter's weights are not those",
    ),
    "fewer layers": (another_layer, r"8 modules, of which this model lacks 4, such as .*v_proj\.lora_A\.default"),
    "no adapter": (lambda saved: saved.base(), r"8 modules, of which this model lacks 8"),
    "merged for good": (lambda saved: saved.model().merge_and_unload(), r"8 modules, of which this model lacks 8"),
}


@pytest.mark.parametrize("what", WRONG)
def test_another_model_is_refused(saved: Saved, what: str) -> None:
    build, message = WRONG[what]
    model = build(saved)
    with pytest.raises(ValueError, match=message) as error:
        saved.load(model)
    assert str(error.value).startswith(f"{saved.folder}: ")


@pytest.mark.parametrize("saved", ["tied head"], indirect=True)
def test_a_tied_weight_is_there_once_and_found_under_either_name(saved: Saved) -> None:
    tensors = json.loads((saved.folder / "laplace.json").read_text())["base_model"]["tensors"]
    assert len([name for name in tensors if "embed_tokens" in name or "lm_head" in name]) == 1
    untied = base()
    state = base(tied=True).state_dict()
    untied.load_state_dict(state)
    saved.predicts_as_before(saved.model(untied))
    with pytest.raises(ValueError, match="base model"):
        saved.load(changed(saved, "embed_tokens.weight", lambda w: w[12].add_(0.01)))


@pytest.mark.parametrize("saved", ["modules to save"], indirect=True)
def test_the_head_that_its_copy_replaces_does_not_count(saved: Saved) -> None:
    saved.predicts_as_before(saved.model(saved.base(seed=9), adapter_name="style"))
    with pytest.raises(ValueError, match="adapter's weights are not those"):
        saved.load(changed(saved, "classifier.modules_to_save.default.bias", lambda b: b.add_(1)))


@pytest.mark.parametrize("saved", ["saved norm"], indirect=True)
def test_a_part_of_the_adapter_that_the_posterior_leaves_out_counts(saved: Saved) -> None:
    saved.predicts_as_before(changed(saved, "norm.original_module.weight", lambda w: w.add_(1)))
    with pytest.raises(ValueError, match=r"base model .*norm\.modules_to_save\.default\.weight differs"):
        saved.load(changed(saved, "norm.modules_to_save.default.weight", lambda w: w.add_(1)))


def test_buffers_count_if_they_are_saved_with_the_model(tmp_path: Path) -> None:
    def model(persistent: bool = True) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)).double()
        model.register_buffer("table", torch.arange(3.0), persistent=persistent)
        return model

    batch = (torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1]))
    blk.LaplaceLoRA(model()).fit([batch], progress=False).save_pretrained(tmp_path)
    blk.LaplaceLoRA.from_pretrained(model(persistent=False), tmp_path)  # as another version of its code may have it
    other = model()
    other.get_buffer("1.running_mean").add_(0.1)
    with pytest.raises(ValueError, match=r"base model .*1\.running_mean differs"):
        blk.LaplaceLoRA.from_pretrained(other, tmp_path)
    del (other := model()).table
    with pytest.raises(ValueError, match=r"base model .*it has no table, which the other had with shape \[3\]"):
        blk.LaplaceLoRA.from_pretrained(other, tmp_path)
    blk.LaplaceLoRA(model(persistent=False)).fit([batch], progress=False).save_pretrained(tmp_path)
    other = model(persistent=False)
    other.table.add_(1)
    blk.LaplaceLoRA.from_pretrained(other, tmp_path)


def test_an_adapter_that_is_not_active_is_named(saved: Saved) -> None:
    model = with_others(saved)
    model.set_adapter("other")
    with pytest.warns(UserWarning, match=r"to the adapter 'style', which is not active; call model.set_adapter"):
        laplace = blk.LaplaceLoRA.from_pretrained(model, saved.folder)
    model.set_adapter("style")
    assert relative(laplace.predict(saved.case.batch()).covariance, saved.expected.covariance) <= 1e-6


def test_a_merged_model_is_saved_as_it_was_fitted(saved: Saved) -> None:
    saved.laplace.model.merge_adapter()
    saved.laplace.save_pretrained(saved.folder)
    saved.predicts_as_before(saved.model())


def test_after_another_adapter_was_activated_it_is_saved_as_it_was_fitted(saved: Saved) -> None:
    model = saved.laplace.model
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["o_proj", "q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    saved.laplace.save_pretrained(saved.folder)
    saved.predicts_as_before(saved.model())


# ---- the fingerprint -------------------------------------------------------------------------------------------------


def narrowed(values: torch.Tensor, *dtypes: torch.dtype) -> torch.Tensor:
    for dtype in dtypes:
        values = values.to(dtype)
    return values.float()


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(fingerprint._agree(a, b, fingerprint._tolerance(a, b)).all())


def test_values_agree_as_their_types_allow() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    half, brain = torch.float16, torch.bfloat16
    same = {
        "itself": (x, x),
        "bf16": (x, narrowed(x, brain)),
        "fp16": (x, narrowed(x, half)),
        "bf16 by way of fp16": (x, narrowed(x, half, brain)),
        "fp16 and bf16": (narrowed(x, half), narrowed(x, brain)),
        "underflow": (1e-9 * x, narrowed(1e-9 * x, half)),
        "subnormal": (1e-6 * x, narrowed(1e-6 * x, half)),
        "overflow": (1e6 * x, narrowed(1e6 * x, half)),
        "nan": (x / 0 * 0, narrowed(x / 0 * 0, half)),
    }
    for what, (a, b) in same.items():
        assert agree(a, b), what
        assert agree(b, a), what
    other = {
        "trained a little, in float32": (x, x * (1 + 1e-5)),
        "trained a little, in bf16": (narrowed(x, brain), narrowed(1.003 * x, brain)),
        "trained more, in another type": (x, narrowed(1.05 * x, brain)),
        "another sign": (1e6 * x, narrowed(-1e6 * x, half)),
        "finite": (x, x / 0),
    }
    for what, (a, b) in other.items():
        assert not agree(a, b), what
        assert not agree(b, a), what


@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (1, 1), (7, 2, 3), (100, 3)])
def test_values_come_from_all_over_a_tensor(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    count = max(tensor.numel() // 2, 1)
    values = fingerprint._gather(tensor, count)
    assert values.dtype == torch.float32
    assert torch.equal(values.double() * count // tensor.numel(), torch.arange(count).double())  # one of each part
    assert torch.equal(fingerprint._gather(tensor.T.contiguous().T if tensor.ndim == 2 else tensor, count), values)


def test_every_number_type_is_sampled() -> None:
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64):
        tensor = torch.ones(6, 4).to(dtype)
        assert len(fingerprint._gather(tensor, 8)) == 8
    assert len(fingerprint._gather(torch.zeros(0, 4), 0)) == 0


class Holder(nn.Module):
    """One layer of the posterior, one frozen tensor."""

    def __init__(self, frozen: Any):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)
        self.frozen = nn.Parameter(frozen, requires_grad=False)


def compare(one: nn.Module, other: nn.Module) -> None:
    values, description = fingerprint.take(one, one.layer.parameters())
    description = json.loads(json.dumps(description))
    fingerprint.check(other, other.layer.parameters(), {}, values, description)


def test_a_quantised_tensor_is_compared_in_its_parts() -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    codes, scales = torch.arange(12.0).reshape(3, 4), torch.ones(3, 4)
    compare(Holder(two_tensor(codes, scales)), Holder(two_tensor(codes.clone(), scales.clone())))
    with pytest.raises(ValueError, match=r"base model .*frozen differs in 8 of 8 values, such as 2 in place of 1"):
        compare(Holder(two_tensor(codes, scales)), Holder(two_tensor(codes, 2 * scales)))
    with pytest.raises(ValueError, match=r"base model .*it has no frozen\.a"):
        compare(Holder(two_tensor(codes, scales)), Holder(codes))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_torchao(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def model(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        frozen = base(seed)
        quantize_(frozen, Int8WeightOnlyConfig(), filter_fn=lambda m, name: name.endswith("down_proj"))
        return adapted(frozen, ["q_proj"], task_type="CAUSAL_LM")

    one, _ = fingerprint.take(model(), [])
    other, description = fingerprint.take(model(5), [])
    assert any("down_proj" in name and "qdata" in name for name in description["tensors"])
    assert not torch.equal(one, other)


def test_tensors_without_values_are_skipped_and_counted() -> None:
    here, meta = Holder(torch.ones(3)), Holder(torch.ones(3, device="meta"))
    for one, other in ((here, meta), (meta, here), (meta, meta)):
        with pytest.warns(UserWarning, match=r"compared 0 of 1 frozen tensors; the others are on the meta"):
            compare(one, other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(here, copy.deepcopy(here))


def test_the_fingerprint_reads_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """One gather per tensor, and an embedding's rows are the only thing that its size decides."""
    counts: list[int] = []
    gather = fingerprint._gather
    monkeypatch.setattr(fingerprint, "_gather", lambda tensor, count: (counts.append(count), gather(tensor, count))[1])
    model = base()
    values, description = fingerprint.take(model, [])
    assert len(counts) == len(description["tensors"]) == len(list(model.parameters()))
    assert sorted(counts)[-2:] == [8, VOCABULARY]
    assert len(values) == sum(counts)


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.model.layers.0.q_proj.lora_A.default", "model.layers.0.q_proj.lora_A.style"),
        ("module._orig_mod.base_model.model.fc.lora_B.default.weight", "fc.lora_B.style.weight"),
        ("fc.base_layer.weight", "fc.weight"),
        ("layers.0._orig_mod.fc.base_layer", "layers.0.fc"),
        ("norm.original_module.weight", "norm.weight"),
        ("score.modules_to_save.default.dense.weight", "score.modules_to_save.style.dense.weight"),
        ("lora_A.default", "lora_A.style"),
        ("submodule.weight", "submodule.weight"),
        ("base_model.encoder.weight", "base_model.encoder.weight"),
        ("my_lora_A.default.weight", "my_lora_A.default.weight"),
        ("module", ""),
    ],
)
def test_canonical_names(name: str, expected: str) -> None:
    assert canonical(name, {"default": "style"}) == expected


def test_names_that_would_be_the_same_stay_as_they_are() -> None:
    names = ["module.fc", "fc", "module.other"]
    assert unique_names(names) == {"module.fc": "module.fc", "fc": "fc", "module.other": "other"}
    model = nn.ModuleDict({"module": nn.ModuleDict({"fc": nn.Linear(1, 1)}), "fc": nn.Linear(1, 1)})
    assert placements(model, ["fc", "module.fc"])[0].layers == {"fc": "fc", "module.fc": "module.fc"}


def test_given_layers_are_taken_whatever_they_require() -> None:
    model = mlp(trainable=("twice.weight",)).model
    layers = find_layers(model, {"last": ("bias",), "first": ("weight", "bias")})
    assert [(layer.name, layer.weight, layer.bias) for layer in layers] == [
        ("first", "first.weight", "first.bias"),
        ("last", None, "last.bias"),
    ]
    for wrong in ({"last": ("scale",)}, {"lost": ("weight",)}, {"relu": ("weight",)}, {}):
        with pytest.raises(ValueError, match=r"modules: expected names of nn\.Linear"):
            find_layers(model, wrong)
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="shared by several modules"):
        find_layers(tied, {"0": ("weight",)})


# ---- the files -------------------------------------------------------------------------------------------------------


def sign(folder: Path, content: dict[str, Any]) -> None:
    """Write a description with the checksum that it should have."""
    content.pop("sha256", None)
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "laplace.json").write_text(json.dumps(content))


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "laplace.json").read_text())


def as_version_1(folder: Path, model: nn.Module) -> None:
    content = read(folder)
    content["version"] = 1
    del content["base_model"]
    for layer in content["layers"].values():
        del layer["covers"]
    parameters = dict(model.named_parameters())
    own = {name: p for name, p in parameters.items() if name.rpartition(".")[0] in content["layers"]}
    content["adapter_sha256"] = storage.parameter_digest(own)
    sign(folder, content)


@pytest.mark.parametrize("how", ["frozen", "another name", "by transformers"])
@pytest.mark.parametrize("saved", ["llama", "modules to save"], indirect=True)
def test_version_1_is_read_with_a_warning(saved: Saved, how: str) -> None:
    as_version_1(saved.folder, saved.laplace.model)
    model = RIGHT[how](saved)
    with pytest.warns(UserWarning, match="format version 1, which says nothing of the base model") as warned:
        laplace = blk.LaplaceLoRA.from_pretrained(model, saved.folder)
    assert len([w for w in warned if w.category is UserWarning]) == 1
    assert relative(laplace.predict(saved.case.batch()).covariance, saved.expected.covariance) <= 1e-6
    changed = next(p for n, p in model.named_parameters() if "lora_A" in n)
    with torch.no_grad():
        changed.view(-1)[0] += 1e-6
    with pytest.raises(ValueError, match="adapter's weights are not those"):
        blk.LaplaceLoRA.from_pretrained(model, saved.folder)


def small(folder: Path, curvature: str = "kfac") -> Case:
    case = mlp(trainable=("first.weight", "last.weight", "last.bias"))
    blk.LaplaceLoRA(case.model, curvature=curvature).fit(case.loader(2), progress=False).save_pretrained(folder)
    return case


POSSIBLE = {  # another value of the same type
    "class_token_ids": ("null",),
    "calibration": ("null",),
    "noise": ("null",),  # as it is: only a regression has any
    "log_likelihood": ("null", "negative", "number"),
    "row_dtype": ("null",),
    "rank": ("null",),
    "tail": ("boolean",),
    "seed": ("negative",),
    "first": ("number",),  # prior precisions
    "last": ("number",),
    "dtype": ("text",),
    "square_norm": ("missing", "number"),
}


def error_of(model: nn.Module, folder: Path) -> str | None:
    try:
        blk.LaplaceLoRA.from_pretrained(model, folder)
    except ValueError as error:
        return str(error)
    return None


def keys(content: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in content.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += keys(value, (*prefix, key))
    return found


@pytest.mark.parametrize("curvature", ["kfac", "exact"])
@pytest.mark.parametrize("value", ["missing", "null", "list", "text", "boolean", "negative", "number", "object"])
def test_every_key_is_checked(curvature: str, value: str, tmp_path: Path) -> None:
    """Values of another kind are refused with the key's name; those that happen to be possible do no harm."""
    case = small(tmp_path, curvature)
    original = read(tmp_path)
    wrong = {
        "list": [[]],
        "text": "?",
        "boolean": True,
        "negative": -1,
        "number": 1.5,
        "null": None,
        "object": {"?": 1},
    }
    paths = [path for path in keys(original) if path[0] not in ("format", "version", "sha256")]
    assert len(paths) > 40
    silent, unclear = [], []
    for path in paths:
        content = copy.deepcopy(original)
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        if value == "missing":
            del inner[path[-1]]
        else:
            inner[path[-1]] = wrong[value]
        sign(tmp_path, content)
        error = error_of(case.model, tmp_path)
        if error is None and value not in POSSIBLE.get(path[-1], ()):
            silent.append(".".join(path))
        if error is not None and path[-1] not in error:
            unclear.append(".".join(path))
    assert not silent
    excused = {"custom_forward"}  # true: then a forward is asked for
    if value == "missing":  # a smaller object, which no longer fits the rest
        excused |= {f"layers.{name}" for name in original["layers"]}
        excused |= {f"base_model.tensors.{name}" for name in original["base_model"]["tensors"]}
    if value == "text":  # of a posterior that would have other tensors
        excused |= {"settings.curvature"}
    assert set(unclear) <= excused
    sign(tmp_path, original)
    blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)


def test_a_setting_that_does_not_exist(tmp_path: Path) -> None:
    case = small(tmp_path)
    content = read(tmp_path)
    content["settings"]["colour"] = "blue"
    sign(tmp_path, content)
    with pytest.raises(ValueError, match=r"laplace.json: settings\.colour: expected no such key"):
        blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)


@pytest.mark.parametrize("curvature", ["kfac", "exact"])
def test_every_tensor_is_checked(curvature: str, tmp_path: Path) -> None:
    case = small(tmp_path, curvature)
    content = read(tmp_path)
    file = tmp_path / content["tensors"]["file"]
    tensors = {name: t.clone() for name, t in safetensors.torch.load_file(file).items()}  # the file is overwritten
    damage: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
        "missing": lambda t: None,
        "another shape": lambda t: torch.cat([t, t]) if t.ndim else t[None],
        "another rank": lambda t: t[None],
        "integers": lambda t: t.long(),
    }
    for name in tensors:
        for what, change in damage.items():
            new = {**tensors, name: change(tensors[name])}
            safetensors.torch.save_file({key: t for key, t in new.items() if t is not None}, file)
            content["tensors"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
            sign(tmp_path, content)
            with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as error:
                blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)
            assert "expected a tensor" in str(error.value), (name, what)
    safetensors.torch.save_file(tensors, file)
    content["tensors"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    sign(tmp_path, content)
    blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)


# ---- processes that write to one folder ------------------------------------------------------------------------------


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.skipif(os.name != "posix", reason="whether a process lives is asked for in the POSIX way")
def test_what_killed_processes_left_behind_goes_with_the_next_save(tmp_path: Path) -> None:
    case = small(tmp_path)
    host = storage._writer().rpartition("-")[0]
    dead, alive = dead_process(), os.getppid()
    stale = [f".laplace-{host}-{dead}-ab12_x", f".laplace.json-{host}-{dead}-ab12_x"]
    kept = [f".laplace-{host}-{alive}-ab12_x", f".laplace.json-{host}-{alive}-ab12_x", f".laplace-far-{dead}-ab12_x"]
    long_ago = [f".laplace-away.example-{alive}-ab12_x", ".laplace-ab12_x", ".laplace.json-ab12_x"]  # and version 1's
    others = [".laplace-notes.txt", ".hidden", "laplace-notes.safetensors", f".adapter-{host}-{dead}-ab12_x"]
    for name in [*stale, *kept, *long_ago, *others]:
        (tmp_path / name).write_text("")
    for name in [*long_ago, *others]:
        os.utime(tmp_path / name, (time.time() - 2 * 24 * 3600,) * 2)
    orphan = tmp_path / "laplace-0123456789abcdef.safetensors"  # killed between the two files
    orphan.write_text("")
    blk.LaplaceLoRA(case.model).fit(case.loader(2), progress=False).save_pretrained(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*kept, *others, "laplace.json", read(tmp_path)["tensors"]["file"]}


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
def test_a_process_killed_while_it_saves(tmp_path: Path) -> None:
    """Its lock goes with it, its temporaries with the next save; the old posterior stays whole."""
    case = small(tmp_path)
    script = (
        "import os, signal, sys; from pathlib import Path; import torch\n"
        "from bayesian_lora_kernels.posterior import storage\n"
        "storage._into_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "storage.save(Path(sys.argv[1]), {'x': torch.ones(3)}, {})\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == -9
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".laplace-")]) == 1
    laplace = blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)
    laplace.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"laplace.json", read(tmp_path)["tensors"]["file"]}


@pytest.mark.skipif(storage.fcntl is None, reason="no file locks here")
def test_writers_take_turns(tmp_path: Path) -> None:
    case = small(tmp_path)
    laplace = blk.LaplaceLoRA(case.model, prior_precision=7.0).fit(case.loader(2), progress=False)
    before = read(tmp_path)
    with storage._locked(tmp_path):
        writers = [threading.Thread(target=laplace.save_pretrained, args=(tmp_path,)) for _ in range(2)]
        for writer in writers:
            writer.start()
        time.sleep(0.3)
        assert all(writer.is_alive() for writer in writers)
        assert read(tmp_path) == before
    for writer in writers:
        writer.join(timeout=60)
        assert not writer.is_alive()
    assert read(tmp_path)["prior_precision"]["last"] == 7.0
    assert len(list(tmp_path.iterdir())) == 2  # the lock file is gone
    blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)


@pytest.mark.skipif(storage.fcntl is None, reason="no file locks here")
def test_a_lock_whose_file_was_removed_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waited for the file of one who has gone takes a new one, as anybody who comes now does."""
    flock, removed = storage.fcntl.flock, []

    def remove_first(file: Any, operation: int) -> None:
        if operation == storage.fcntl.LOCK_EX and not removed:
            removed.append(file)
            (tmp_path / storage.LOCK_NAME).unlink()
        flock(file, operation)

    monkeypatch.setattr(storage.fcntl, "flock", remove_first)
    with storage._locked(tmp_path):
        assert removed
        assert (tmp_path / storage.LOCK_NAME).exists()
    assert not (tmp_path / storage.LOCK_NAME).exists()


def test_without_locks_it_saves_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoLocks:
        LOCK_EX, LOCK_UN = 2, 8

        @staticmethod
        def flock(*_: Any) -> None:
            raise OSError(37, "No locks available")

    for fcntl in (NoLocks, None):
        monkeypatch.setattr(storage, "fcntl", fcntl)
        case = small(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
        blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)


def test_the_file_that_another_process_has_just_named_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without locks: while we write, another puts its own posterior in place; whose comes last is whole."""
    small(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "other")
    case = mlp(trainable=("first.weight", "last.weight", "last.bias"))
    laplace = blk.LaplaceLoRA(case.model, prior_precision=7.0, fisher="empirical").fit(case.loader(2), progress=False)
    write_text = storage.write_text

    def overtaken(path: Path, text: str) -> None:
        write_text(path, text)
        shutil.copytree(tmp_path / "other", tmp_path, dirs_exist_ok=True)

    monkeypatch.setattr(storage, "write_text", overtaken)
    laplace.save_pretrained(tmp_path)
    assert float(blk.LaplaceLoRA.from_pretrained(case.model, tmp_path).prior_precision) == 1.0


def test_a_reader_meets_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a reader's two files a writer replaces both: the reader starts again."""
    case = small(tmp_path)
    other = blk.LaplaceLoRA(case.model, prior_precision=7.0, fisher="empirical").fit(case.loader(2), progress=False)
    digest, calls = storage.file_digest, []

    def overtaken(path: Path) -> str:
        calls.append(path)
        if len(calls) == 1:
            other.save_pretrained(tmp_path)
        return digest(path)

    monkeypatch.setattr(storage, "file_digest", overtaken)
    assert float(blk.LaplaceLoRA.from_pretrained(case.model, tmp_path).prior_precision) == 7.0
