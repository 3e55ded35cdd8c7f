"""Left padding for many models of transformers, and columns of a batch that are no plain tensors of token ids.

The mean is that of the model's own call on each example without padding, or the package says what stands in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch
import transformers
from dense import relative
from situations import (
    CURVATURES,
    Scene,
    adapted,
    judge,
    judge_scene,
    labelled,
    padded,
    padded_row,
    plain_module,
    rows_of_batch,
    run_last,
    unpadded_row,
    without_labels,
)
from torch import Tensor, nn

import bayesian_lora_kernels as blk

WORDS = ("position", "padding", "padded", "left", "mask", "finite", "example")
DROP = object()  # a default that a configuration does not know
IDS = [11, 12, 13]
LENGTHS = [6, 4, 5, 6]
# Norms and rotary embeddings of transformers compute in float32 whatever the model's dtype.
TOLERANCE = 1e-4
LLAMA = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT = dict(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3, bos_token_id=1)
BERT = dict(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=40,
    initializer_range=0.3,
    num_labels=3,
)
QV = ("q_proj", "v_proj")
SELF = r".*self_attn\.(q_proj|v_proj)"
DECODER = dict(
    vocab_size=40,
    d_model=16,
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=16,
    max_position_embeddings=40,
    init_std=0.3,
    pad_token_id=1,
)

# name: (model class, config class, settings, LoRA's targets)
CAUSAL: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    **{
        name: (f"{name}ForCausalLM", f"{name}Config", {}, QV)
        for name in (
            "Llama",
            "Mistral",
            "Qwen2",
            "Qwen3",
            "Gemma",
            "Gemma2",
            "Cohere",
            "Cohere2",
            "Granite",
            "Olmo",
            "Olmo2",
            "Olmo3",
            "StableLm",
            "Starcoder2",
            "SmolLM3",
            "Helium",
            "Nemotron",
            "Glm",
            "Glm4",
            "Exaone4",
            "Ernie4_5",
            "SeedOss",
            "Arcee",
            "Apertus",
        )
    },
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"query_pre_attn_scalar": 8}, QV),
    "Phi": ("PhiForCausalLM", "PhiConfig", {}, QV),
    "Phi3": ("Phi3ForCausalLM", "Phi3Config", {}, ("qkv_proj",)),
    "Persimmon": ("PersimmonForCausalLM", "PersimmonConfig", {}, ("query_key_value",)),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}, ("query_key_value",)),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 2, "experts_implementation": "eager"}, QV),
    "Falcon": ("FalconForCausalLM", "FalconConfig", {"alibi": False, "head_dim": DROP}, ("query_key_value",)),
    "Falcon, ALiBi": ("FalconForCausalLM", "FalconConfig", {"alibi": True, "head_dim": DROP}, ("query_key_value",)),
    "Bloom": ("BloomForCausalLM", "BloomConfig", {"n_layer": 2, "n_head": 2}, ("query_key_value",)),
    "MPT": ("MptForCausalLM", "MptConfig", {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 32}, ("Wqkv",)),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT, ("c_attn",)),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}, QV),
    "CodeGen": (
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {**GPT, "rotary_dim": 4, "n_head": 4, "num_attention_heads": 4},
        ("qkv_proj",),
    ),
    "GPT-BigCode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT, ("c_attn",)),
    "GPT": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT, ("c_attn",)),
    "CTRL": ("CTRLLMHeadModel", "CTRLConfig", {**GPT, "dff": 16}, ("Wq", "Wv")),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
        QV,
    ),
    "OPT": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 16, "word_embed_proj_dim": 16, "init_std": 0.3}, QV),
    "BioGPT": ("BioGptForCausalLM", "BioGptConfig", {}, QV),
    "BART's decoder": ("BartForCausalLM", "BartConfig", DECODER, SELF),
    "mBART's decoder": ("MBartForCausalLM", "MBartConfig", DECODER, SELF),
    "Pegasus' decoder": ("PegasusForCausalLM", "PegasusConfig", DECODER, SELF),
    "Marian's decoder": ("MarianForCausalLM", "MarianConfig", {**DECODER, "decoder_start_token_id": 1}, SELF),
    "TrOCR's decoder": ("TrOCRForCausalLM", "TrOCRConfig", DECODER, SELF),
    "BERT's decoder": ("BertLMHeadModel", "BertConfig", {**BERT, "is_decoder": True}, ("query", "value")),
    "RoBERTa's decoder": ("RobertaForCausalLM", "RobertaConfig", {**BERT, "is_decoder": True}, ("query", "value")),
    "Mamba": ("MambaForCausalLM", "MambaConfig", {"state_size": 4, "expand": 2}, ("in_proj",)),
    "RWKV": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {"attention_hidden_size": 16, "context_length": 32},
        ("key", "receptance"),
    ),
    "XLNet": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "max_position_embeddings": DROP},
        ("layer_1",),
    ),
}

ENCODERS: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "BERT": ("BertForSequenceClassification", "BertConfig", {}, ("query", "value")),
    "RoBERTa": ("RobertaForSequenceClassification", "RobertaConfig", {"pad_token_id": 1}, ("query", "value")),
    "XLM-R": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", {"pad_token_id": 1}, ("query", "value")),
    "CamemBERT": ("CamembertForSequenceClassification", "CamembertConfig", {"pad_token_id": 1}, ("query", "value")),
    "MPNet": ("MPNetForSequenceClassification", "MPNetConfig", {"pad_token_id": 1}, ("q", "v")),
    "ALBERT": ("AlbertForSequenceClassification", "AlbertConfig", {"embedding_size": 8}, ("query", "value")),
    "ELECTRA": ("ElectraForSequenceClassification", "ElectraConfig", {"embedding_size": 8}, ("query", "value")),
    "DistilBERT": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
        ("q_lin", "v_lin"),
    ),
    "DeBERTa": ("DebertaForSequenceClassification", "DebertaConfig", {}, ("in_proj",)),
    "DeBERTa-v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config", {}, ("query_proj", "value_proj")),
    "DeBERTa-v2, no absolute positions": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {"position_biased_input": False, "relative_attention": True, "pos_att_type": ["p2c"]},
        ("value_proj",),
    ),
    "ESM": ("EsmForSequenceClassification", "EsmConfig", {"pad_token_id": 1, "mask_token_id": 2}, ("query", "value")),
    "ESM, rotary": (
        "EsmForSequenceClassification",
        "EsmConfig",
        {"pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "rotary"},
        ("query", "value"),
    ),
    "ModernBERT": ("ModernBertForSequenceClassification", "ModernBertConfig", {"pad_token_id": 0}, ("Wqkv",)),
    "RemBERT": ("RemBertForSequenceClassification", "RemBertConfig", {"input_embedding_size": 8}, ("query", "value")),
    "RoFormer": ("RoFormerForSequenceClassification", "RoFormerConfig", {}, ("query", "value")),
    "Data2Vec": (
        "Data2VecTextForSequenceClassification",
        "Data2VecTextConfig",
        {"pad_token_id": 1},
        ("query", "value"),
    ),
    "XLM": (
        "XLMForSequenceClassification",
        "XLMConfig",
        {"emb_dim": 16, "n_layers": 1, "n_heads": 2},
        ("q_lin", "v_lin"),
    ),
    "FlauBERT": (
        "FlaubertForSequenceClassification",
        "FlaubertConfig",
        {"emb_dim": 16, "n_layers": 1, "n_heads": 2},
        ("q_lin", "v_lin"),
    ),
    "MobileBERT": (
        "MobileBertForSequenceClassification",
        "MobileBertConfig",
        {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 1},
        ("query", "value"),
    ),
    "T5's encoder": (
        "T5ForTokenClassification",
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        ("q", "v"),
    ),
    "GPT-2, classification": ("GPT2ForSequenceClassification", "GPT2Config", {**GPT, "pad_token_id": 0}, ("c_attn",)),
    "GPT-Neo, classification": (
        "GPTNeoForSequenceClassification",
        "GPTNeoConfig",
        {"num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]], "pad_token_id": 0},
        QV,
    ),
    "OPT, classification": (
        "OPTForSequenceClassification",
        "OPTConfig",
        {"ffn_dim": 16, "word_embed_proj_dim": 16, "pad_token_id": 0},
        QV,
    ),
    "Llama, classification": ("LlamaForSequenceClassification", "LlamaConfig", {"pad_token_id": 0, "head_dim": 8}, QV),
}


def build(entry: tuple[str, str, dict[str, Any], Any], defaults: Mapping[str, Any], **lora: Any) -> tuple[Any, int]:
    """The tiny model with LoRA, and its pad token."""
    model_class, config_class, settings, targets = entry
    if not hasattr(transformers, model_class):
        pytest.skip(f"this transformers has no {model_class}")
    torch.manual_seed(0)
    chosen = {key: value for key, value in {**defaults, **settings}.items() if value is not DROP}
    config = getattr(transformers, config_class)(**chosen)
    if lora.get("task_type") == "SEQ_CLS":
        config.num_labels = 3
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():  # some initialise their positions to zero, which would hide what is wrong with them
        for name, p in model.named_parameters():
            if "pos" in name and p.ndim == 2 and not p.any():
                p.normal_(std=0.3)
    if any(isinstance(m, transformers.pytorch_utils.Conv1D) for m in model.modules()):
        lora["fan_in_fan_out"] = True
    return adapted(model, targets, **lora), config.pad_token_id or 0


def judge_left(model: Any, batch: dict[str, Tensor], run: Callable[[Any, Any], Tensor], **arguments: Any) -> str:
    right = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def expected() -> Tensor:
        with torch.no_grad():
            return torch.cat([run(model, unpadded_row(right, i)) for i in range(rows_of_batch(batch))])

    def ours() -> Tensor:
        laplace = blk.LaplaceLoRA(model, **arguments).fit([labelled(batch)], progress=False)
        return laplace.predict(batch).mean

    return judge(ours, WORDS, lambda mean: relative(mean, expected()), TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models(name: str, side: str):
    model, pad = build(CAUSAL[name], LLAMA, task_type="CAUSAL_LM")
    judge_left(model, padded(LENGTHS, 40, pad=pad, side=side), run_last(IDS), class_token_ids=IDS)


def run_tokens(model: Any, row: Any) -> Tensor:
    """Token classifiers: nothing to compare but their first position."""
    logits = model(**row).logits
    return logits if logits.ndim == 2 else logits[:, -1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str, side: str):
    lora = {} if "Token" in ENCODERS[name][0] else {"task_type": "SEQ_CLS"}
    model, pad = build(ENCODERS[name], BERT, **lora)
    arguments: dict[str, Any] = {}
    if not lora:  # the last position, which left padding leaves where it is
        arguments["forward"] = lambda m, b: run_tokens(m, without_labels(b))
        if side == "right":
            pytest.skip("the last position of a token classifier is padding then")
    judge_left(model, padded(LENGTHS, 40, pad=pad, side=side), run_tokens, **arguments)


def test_a_pad_inside_the_text():
    """Models that number positions by comparing ids with the pad token: a mask that says otherwise."""
    model, _ = build(ENCODERS["RoBERTa"], BERT, task_type="SEQ_CLS")
    batch = padded(LENGTHS, 40, pad=5, side="left")  # not the model's own pad token
    judge_left(model, batch, run_tokens)


# Wrappers that hide what the model takes


class Hidden(nn.Module):
    """Takes anything and hands it on."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Decorated(Hidden):
    """As TRL's value-head models: some names, then **kwargs."""

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class Narrow(Hidden):
    """Hands on ids and mask only, so that nobody can pass positions."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


class NoMask(Hidden):
    """Takes a mask and forgets it."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return self.inner(input_ids=input_ids, **kwargs)


LEARNED = ("GPT-2", "GPT-Neo", "GPT-BigCode", "CTRL", "GPT-J")


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("wrap", [Hidden, Decorated, Narrow], ids=lambda c: c.__name__)
def test_a_wrapper_hides_the_signature(wrap: Callable[[nn.Module], nn.Module], name: str):
    model, _ = build(CAUSAL[name], LLAMA, task_type="CAUSAL_LM")
    batch = padded(LENGTHS, 40, side="left")
    last = lambda m, b: m(**without_labels(b)).logits[:, -1, IDS]  # noqa: E731
    judge_left(wrap(model).eval(), batch, last, forward=last)


@pytest.mark.parametrize("wrap", [Hidden, Decorated, Narrow], ids=lambda c: c.__name__)
def test_a_wrapper_hides_the_signature_of_a_classifier(wrap: Callable[[nn.Module], nn.Module]):
    model, _ = build(ENCODERS["GPT-2, classification"], BERT, task_type="SEQ_CLS")
    judge_left(wrap(model).eval(), padded(LENGTHS, 40, side="left"), run_tokens)


def test_a_wrapper_that_forgets_the_mask():
    model, _ = build(ENCODERS["BERT"], BERT, task_type="SEQ_CLS")
    scene = Scene(
        NoMask(model).eval(),
        [labelled(padded(LENGTHS, 40, pad=3))],
        single=padded_row,
        factors=False,
        words=(*WORDS, "mask"),
    )
    judge_scene(scene, "ekfac")


@pytest.mark.parametrize("mixed", [False, True], ids=["PeftModel", "PeftMixedModel"])
@pytest.mark.parametrize("name", ["GPT-Neo", "GPT-J", "Llama"])
def test_mixed_adapters(name: str, mixed: bool):
    model, _ = build(CAUSAL[name], LLAMA, task_type="CAUSAL_LM", **({"mixed": True} if mixed else {}))
    judge_left(model, padded(LENGTHS, 40, side="left"), run_last(IDS), class_token_ids=IDS)


def test_positions_of_the_user_are_kept():
    model, _ = build(CAUSAL["GPT-2"], LLAMA, task_type="CAUSAL_LM")
    batch = padded(LENGTHS, 40, side="left")
    batch["position_ids"] = batch["attention_mask"].cumsum(dim=1).clamp_min(1)  # from 1, as the user wants it
    laplace = blk.LaplaceLoRA(model, class_token_ids=IDS).fit([labelled(batch)], progress=False)
    expected = model(**batch).logits[:, -1, IDS]
    assert relative(laplace.predict(batch).mean, expected) < 1e-6


# Other columns


def llama_with_two_adapters() -> Any:
    model, _ = build(CAUSAL["Llama"], LLAMA, task_type="CAUSAL_LM")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model.add_adapter("other", config)
    model.double().eval().set_adapter("default")
    return model


def last_valid_logits(model: Any, batch: Any, **more: Any) -> Tensor:
    last = batch["attention_mask"].sum(dim=1) - 1
    with torch.no_grad():
        return model(**batch, **more).logits[torch.arange(len(last)), last][:, IDS]


@pytest.mark.parametrize("curvature", CURVATURES)
def test_two_adapters_at_once(curvature: str):
    model = llama_with_two_adapters()
    model.base_model.set_adapter(["default", "other"])
    scene = Scene(
        model, [labelled(padded(LENGTHS, 40))], run_last(IDS), arguments={"class_token_ids": IDS}, factors=False
    )
    assert judge_scene(scene, curvature) == "right"


@pytest.mark.parametrize("when", ["predict", "fit"])
def test_adapter_names(when: str):
    model, batch = llama_with_two_adapters(), padded(LENGTHS, 40)
    named = {**batch, "adapter_names": ["default", "other", "__base__", "default"]}

    def ours() -> Tensor:
        train = named if when == "fit" else batch
        laplace = blk.LaplaceLoRA(model, class_token_ids=IDS).fit([labelled(train)], progress=False)
        return laplace.predict(named).mean

    expected = last_valid_logits(model, batch, adapter_names=named["adapter_names"])
    judge(ours, ("adapter_names",), lambda mean: relative(mean, expected), TOLERANCE)


def test_past_key_values():
    model, batch = llama_with_two_adapters(), padded(LENGTHS, 40)
    text, before = batch["input_ids"][:, :4], padded([3] * 4, 40, seed=5)["input_ids"]
    laplace = blk.LaplaceLoRA(model, class_token_ids=IDS).fit([labelled(batch)], progress=False)
    with torch.no_grad():
        expected = model(input_ids=torch.cat([before, text], dim=1)).logits[:, -1, IDS]
        cache = model(input_ids=before, use_cache=True).past_key_values
    judge(
        lambda: laplace.predict({"input_ids": text, "past_key_values": cache}).mean,
        ("past_key_values",),
        lambda mean: relative(mean, expected),
        TOLERANCE,
    )


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_token_types(side: str, curvature: str):
    model, _ = build(ENCODERS["BERT"], BERT, task_type="SEQ_CLS")
    batch = labelled(padded(LENGTHS, 40, side=side))
    batch["token_type_ids"] = (batch["input_ids"] > 20).long()
    judge_scene(Scene(model, [batch], words=WORDS if side == "left" else (), tolerance=1e-5), curvature)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_instead_of_ids(side: str, curvature: str):
    model, _ = build(CAUSAL["GPT-2"], LLAMA, task_type="CAUSAL_LM")
    ids = padded(LENGTHS, 40, side=side)
    embedded = model.get_input_embeddings()(ids["input_ids"]).detach()
    batch = labelled({"inputs_embeds": embedded, "attention_mask": ids["attention_mask"]})

    def single(b: Any, i: int) -> Any:
        return {"inputs_embeds": b["inputs_embeds"][i : i + 1, b["attention_mask"][i].bool()]}

    scene = Scene(
        model,
        [batch],
        run=run_last(IDS),
        single=single,
        arguments={"class_token_ids": IDS},
        words=WORDS,
        tolerance=1e-5,
    )
    judge_scene(scene, curvature)


class Flagged(nn.Module):
    """What the model does depends on arguments that are no tensors of examples."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(
        self,
        x: Tensor,
        twice: bool = False,
        scale: float = 1.0,
        names: list[str] | None = None,
        offset: Tensor | None = None,
        how: str = "tanh",
        config: Any = None,
    ) -> Tensor:
        hidden = torch.tanh(self.first(x)) if how == "tanh" else torch.sin(self.first(x))
        if twice:
            hidden = 2 * hidden
        if names is not None:
            hidden = hidden * torch.tensor([float(len(name)) for name in names])[:, None]
        if offset is not None:
            hidden = hidden + offset
        if config is not None:
            hidden = hidden * config["gain"]
        return self.second(scale * hidden)


COLUMNS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a flag": ({"twice": True}, ("twice",)),
    "a number": ({"scale": 0.3}, ("scale",)),
    "a string": ({"how": "sin"}, ("how",)),
    "a dictionary": ({"config": {"gain": 3.0}}, ("config",)),
    "strings": ({"names": ["a", "bc", "def", "g"]}, ("names",)),
    "a shared tensor": ({"offset": torch.arange(4.0).double()}, ("offset", "example")),
    "a 0-d tensor": ({"offset": torch.tensor(2.0).double()}, ("offset", "example")),
    "a tensor of one row": ({"offset": torch.arange(4.0).double()[None]}, ("offset", "example")),
    "a shared tensor of N rows": ({"offset": torch.ones(4).double()}, ("offset", "example")),
}


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", COLUMNS)
def test_arguments_that_are_no_examples(name: str, curvature: str):
    columns, words = COLUMNS[name]
    x = torch.randn(4, 5, dtype=torch.float64)
    batch = {"x": x, **columns, "labels": torch.arange(4) % 3}

    def single(b: Any, i: int) -> Any:
        row = {k: v for k, v in b.items() if k not in ("x", "labels")}
        if "names" in row:
            row["names"] = row["names"][i : i + 1]
        return {**row, "x": b["x"][i : i + 1]}

    judge_scene(Scene(plain_module(Flagged), [batch], single=single, words=words), curvature)


STRAY: dict[str, Any] = {
    "a column of strings": {"text": ["one", "two", "three", "four"]},
    "a column of numbers": {"weight": torch.rand(4)},
    "an index": {"idx": torch.arange(4)},
    "None": {"token_type_ids": None},
}


@pytest.mark.parametrize("name", STRAY)
@pytest.mark.parametrize("where", ["Llama", "BERT"])
def test_stray_columns(where: str, name: str):
    """Columns that the model does not take: left out, as trainers do, or an error that names them."""
    causal = where == "Llama"
    model, _ = build(CAUSAL[where], LLAMA, task_type="CAUSAL_LM") if causal else build(ENCODERS[where], BERT)
    arguments = {"class_token_ids": IDS} if causal else {}
    batch = padded(LENGTHS, 40)
    expected = last_valid_logits(model, batch) if causal else model(**batch).logits

    def ours() -> Tensor:
        laplace = blk.LaplaceLoRA(model, **arguments).fit([labelled({**batch, **STRAY[name]})], progress=False)
        return laplace.predict({**batch, **STRAY[name]}).mean

    words = (*STRAY[name], "argument")
    judge(ours, words, lambda mean: relative(mean, expected), TOLERANCE)


def test_the_left_padded_call_itself_is_off_where_positions_are_learned():
    """The harness: what a plain call gives under left padding is another number."""
    model, _ = build(CAUSAL["GPT-2"], LLAMA, task_type="CAUSAL_LM")
    batch = padded(LENGTHS, 40, side="left")
    plain = model(**batch).logits[:, -1, IDS]
    alone = torch.cat([run_last(IDS)(model, unpadded_row(batch, i)) for i in range(4)])
    assert relative(plain, alone) > 1e-2
