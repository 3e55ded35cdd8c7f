"""Models with an encoder and a decoder: labels alone, class ids, masks of their own; and heads whose logits go on."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from dense import relative
from models import in_float64
from situations import (
    Scene,
    adapted,
    fit,
    floats,
    judge,
    judge_scene,
    kfac_truth,
    padded,
    padded_row,
    plain_module,
    run_last,
    truth,
)
from torch import Tensor, nn
from transformers.models.whisper import modeling_whisper as whisper

import bayesian_lora_kernels as blk

QV = ("q_proj", "v_proj")
WORDS = ("decoder_input_ids from", "pass decoder_input_ids", "class_token_ids", "decoder", "labels")
IDS = [5, 9, 11]
BART = dict(
    vocab_size=40,
    d_model=8,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=8,
    decoder_ffn_dim=8,
    max_position_embeddings=32,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=2,
    init_std=0.3,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
)
T5 = dict(
    vocab_size=40,
    d_model=8,
    d_kv=4,
    d_ff=8,
    num_layers=1,
    num_heads=2,
    dropout_rate=0.0,
    decoder_start_token_id=0,
    pad_token_id=0,
)
WHISPER = {
    **BART,
    "num_mel_bins": 4,
    "max_source_positions": 8,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "decoder_start_token_id": 3,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
M2M = {**BART, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
T5_TARGETS = ("q", "v")

# name: (model class, config class, settings, targets)
MODELS: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "T5": ("T5ForConditionalGeneration", "T5Config", T5, T5_TARGETS),
    "T5, head of its own": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
        T5_TARGETS,
    ),
    "mT5": ("MT5ForConditionalGeneration", "MT5Config", T5, T5_TARGETS),
    "UMT5": ("UMT5ForConditionalGeneration", "UMT5Config", T5, T5_TARGETS),
    "LongT5": ("LongT5ForConditionalGeneration", "LongT5Config", {**T5, "local_radius": 4}, T5_TARGETS),
    "BART": ("BartForConditionalGeneration", "BartConfig", BART, QV),
    "mBART": ("MBartForConditionalGeneration", "MBartConfig", BART, QV),
    "PLBART": ("PLBartForConditionalGeneration", "PLBartConfig", BART, QV),
    "Pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", BART, QV),
    "Marian": ("MarianMTModel", "MarianConfig", BART, QV),
    "Blenderbot": ("BlenderbotForConditionalGeneration", "BlenderbotConfig", BART, QV),
    "small Blenderbot": ("BlenderbotSmallForConditionalGeneration", "BlenderbotSmallConfig", BART, QV),
    "M2M-100": ("M2M100ForConditionalGeneration", "M2M100Config", M2M, QV),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, QV),
}


def build(name: str, **lora: Any) -> Any:
    model_class, config_class, settings, targets = MODELS[name]
    if not hasattr(transformers, model_class):
        pytest.skip(f"this transformers has no {model_class}")
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    model = getattr(transformers, model_class)(config)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return in_float64(adapted(model, targets, **lora))


def source(name: str, n: int = 3, extra: int = 0) -> dict[str, Tensor]:
    if name == "Whisper":
        return {"input_features": floats(n, 4, 16)}
    pad = MODELS[name][2]["pad_token_id"]
    return padded([7, 5, 6, 4][:n], 40, pad=pad, extra=extra)


def targets(n: int = 3, t: int = 4, ignored: bool = False, seed: int = 9) -> Tensor:
    labels = torch.randint(4, 40, (n, t), generator=torch.Generator().manual_seed(seed))
    if ignored:
        labels[0, -2:] = -100
        labels[1, -1:] = -100
    return labels


def own_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The model's own loss is a mean over the labels that count."""
    with torch.no_grad():
        return -model(**batch).loss * (batch["labels"] != -100).sum()


@pytest.mark.parametrize("ignored", [False, True], ids=["all labels", "ignored labels"])
@pytest.mark.parametrize("name", MODELS)
def test_labels_alone(name: str, ignored: bool):
    model = build(name)
    batch = {**source(name), "labels": targets(ignored=ignored)}
    expected = own_loss(model, batch)
    judge(
        lambda: torch.tensor(blk.LaplaceLoRA(model).fit([batch], progress=False).log_likelihood),
        WORDS,
        lambda got: relative(got, expected),
        1e-5,
    )


@pytest.mark.parametrize("width", [7, 4], ids=["equal widths", "other widths"])
@pytest.mark.parametrize("name", ["T5", "BART", "Pegasus"])
def test_source_and_target_of_one_width(name: str, width: int):
    """Padded source and target as wide as each other, as happens in the middle of a loader."""
    model = build(name)
    batch = {**source(name), "labels": targets(t=width, ignored=True)}
    expected = own_loss(model, batch)
    judge(
        lambda: torch.tensor(blk.LaplaceLoRA(model).fit([batch], progress=False).log_likelihood),
        WORDS,
        lambda got: relative(got, expected),
        1e-5,
    )


@pytest.mark.parametrize("with_mask", [False, True], ids=["no decoder mask", "decoder mask"])
@pytest.mark.parametrize("name", ["T5", "BART", "mBART"])
def test_labels_and_the_decoders_input(name: str, with_mask: bool):
    """What the collator of transformers makes: labels, and decoder_input_ids shifted from them."""
    model = build(name)
    labels = targets(t=7, ignored=True)
    batch = {**source(name), "labels": labels}
    batch["decoder_input_ids"] = model.get_base_model().prepare_decoder_input_ids_from_labels(labels)
    if with_mask:
        batch["decoder_attention_mask"] = torch.ones_like(labels)
        batch["decoder_attention_mask"][0, -1:] = 0
    expected = own_loss(model, batch)
    judge(
        lambda: torch.tensor(blk.LaplaceLoRA(model).fit([batch], progress=False).log_likelihood),
        ("shape", "pad", "mask"),
        lambda got: relative(got, expected),
        1e-5,
    )


# One token of the decoder, and class ids


def one_step(name: str, ids: list[int] | None = None, **lora: Any) -> Scene:
    model = build(name, **lora)
    start = model.get_base_model().config.decoder_start_token_id
    batch = {**source(name), "decoder_input_ids": torch.full((3, 1), start), "labels": torch.arange(3)}
    arguments: dict[str, Any] = {} if ids is None else {"class_token_ids": ids}
    return Scene(model, [batch], run=run_last(ids), arguments=arguments, words=(), tolerance=1e-5)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", MODELS)
def test_class_ids(name: str, curvature: str):
    scene = one_step(name, IDS)
    if scene.model.get_base_model()._modules.get("final_logits_bias") is None and hasattr(
        scene.model.get_base_model(), "final_logits_bias"
    ):
        scene.words = ("final_logits_bias", "class_token_ids")
    judge_scene(scene, curvature)


@pytest.mark.parametrize("name", ["T5", "BART", "Marian", "Whisper"])
def test_the_whole_vocabulary(name: str):
    judge_scene(one_step(name), "ekfac")


@pytest.mark.parametrize("name", ["T5", "BART", "Marian"])
def test_the_vocabulary_in_samples(name: str):
    """Means and covariances of a few of the vocabulary's logits, by another way through the head."""
    scene = one_step(name)
    del scene.batches[0]["labels"]
    found = blk.LaplaceLoRA(scene.model, fisher="exact", rank=None).fit(scene.batches, progress=False)
    chosen = torch.tensor(IDS)
    plain = found.predict(scene.batches[0], outputs=chosen)

    def ours() -> Any:
        vocabulary = found.predict(scene.batches[0], outputs="vocabulary")
        return vocabulary.mean[:, IDS], vocabulary.covariance(chosen)

    judge(
        ours,
        ("vocabulary", "head", "bias"),
        lambda got: {"mean": relative(got[0], plain.mean), "covariance": relative(got[1], plain.covariance)},
        1e-5,
    )


def texts_for_the_decoder(name: str, mask: bool, wide: bool) -> Scene:
    """Decoder texts of 2, 4 and 3 tokens; the last valid one chooses between the classes."""
    model = build(name)
    lengths, pad = [2, 4, 3], MODELS[name][2]["pad_token_id"]
    decoder = padded(lengths, 40, pad=pad, extra=3 if wide else 0, seed=11)
    batch = {**source(name), "decoder_input_ids": decoder["input_ids"], "labels": torch.arange(3)}
    if mask:
        batch["decoder_attention_mask"] = decoder["attention_mask"]

    def single(b: Any, i: int) -> Any:
        row = padded_row(b, i)
        row["decoder_input_ids"] = row["decoder_input_ids"][:, : lengths[i]]
        row.pop("decoder_attention_mask", None)
        if "input_ids" in row:
            valid = row.pop("attention_mask")[0].bool()
            row["input_ids"] = row["input_ids"][:, valid]
        return row

    words = () if mask else ("decoder_attention_mask", "pad")
    return Scene(
        model,
        [batch],
        run=run_last(IDS),
        single=single,
        arguments={"class_token_ids": IDS},
        words=words,
        tolerance=1e-5,
    )


@pytest.mark.parametrize("wide", [False, True], ids=["padded", "as wide as the source"])
@pytest.mark.parametrize("mask", [True, False], ids=["decoder mask", "no decoder mask"])
@pytest.mark.parametrize("name", ["T5", "BART", "Whisper"])
def test_texts_for_the_decoder(name: str, mask: bool, wide: bool):
    scene = texts_for_the_decoder(name, mask, wide)
    if MODELS[name][2].get("final_logits_bias") or name == "BART":
        scene.words = (*scene.words, "final_logits_bias", "class_token_ids")
    if mask and wide:
        scene.words = (*scene.words, "shape", "pad")  # two masks of one shape: what may be refused
    judge_scene(scene, "kfac")


@pytest.mark.parametrize("extra", [0, 4])
@pytest.mark.parametrize("name", ["T5", "mBART", "Whisper"])
def test_padding_of_labels_does_not_count(name: str, extra: int):
    """K-FAC's A with ignored labels: the mean over tokens that the decoder really reads."""
    model = build(name)
    lengths = [4, 2, 3]
    labels = torch.full((3, 4 + extra), -100)
    for i, n in enumerate(lengths):
        labels[i, :n] = targets()[i, :n]
    batch = {**source(name), "labels": labels}

    def single(b: Any, i: int) -> Any:
        row = padded_row(b, i)
        own = labels[i : i + 1, : lengths[i]]
        if name == "Whisper":
            ids = whisper.shift_tokens_right(own, MODELS[name][2]["pad_token_id"], model.config.decoder_start_token_id)
        else:
            ids = model.get_base_model().prepare_decoder_input_ids_from_labels(own)
        row["decoder_input_ids"] = ids
        if "input_ids" in row:
            valid = row.pop("attention_mask")[0].bool()
            row["input_ids"] = row["input_ids"][:, valid]
        return row

    scene = Scene(model, [batch], run=run_last(IDS), single=single)

    def expected(found: blk.LaplaceLoRA) -> dict[str, float]:
        examples = [x for rows in truth(scene, list(found.factors)) for x in rows]
        a = {key: value for key, (value, _) in kfac_truth(examples).items()}
        return {key: relative(found.factors[key].a, value) for key, value in a.items() if value is not None}

    judge(lambda: fit(scene, fisher="mc"), WORDS, expected, 1e-5)


# Heads whose logits are changed afterwards


class Changed(nn.Module):
    """A language model that does something to the logits of its head."""

    def __init__(self, change: str, bias: bool = False):
        super().__init__()
        self.embed, self.mix = nn.Embedding(40, 8).requires_grad_(False), nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 40, bias=bias).requires_grad_(False)
        self.change = change
        self.register_buffer("offset", floats(40))
        self.register_buffer("allowed", torch.arange(40) % 2 == 1)
        self.config = SimpleNamespace(is_encoder_decoder=False)

    def can_generate(self) -> bool:
        return True

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        states = torch.cumsum(torch.tanh(self.mix(self.embed(input_ids))), dim=1)
        logits = self.lm_head(states)
        if self.change == "cap":
            logits = 2 * torch.tanh(logits / 2)
        elif self.change == "scale":
            logits = 0.3 * logits
        elif self.change == "log_softmax":
            logits = logits.log_softmax(dim=-1)
        elif self.change == "softmax":
            logits = logits.softmax(dim=-1)
        elif self.change == "centred":
            logits = logits - logits.mean(dim=-1, keepdim=True)
        elif self.change == "largest":
            logits = logits - logits.amax(dim=-1, keepdim=True)
        elif self.change == "bias":
            logits = logits + self.offset
        elif self.change == "mask":
            logits = logits.masked_fill(~self.allowed, -1e4)
        elif self.change == "normalised":
            logits = logits / logits.norm(dim=-1, keepdim=True)
        elif self.change == "sliced":
            logits = logits[..., :39]
        elif self.change == "by position":
            logits = logits * torch.arange(1, logits.shape[1] + 1)[:, None]
        elif self.change == "mixed":
            logits = 0.5 * logits + 0.5 * logits.cumsum(dim=1)
        elif self.change == "cast":
            logits = logits.double()
        return SimpleNamespace(logits=logits)


CHANGES = (
    "nothing",
    "cap",
    "scale",
    "cast",
    "log_softmax",
    "softmax",
    "centred",
    "largest",
    "bias",
    "mask",
    "normalised",
    "sliced",
    "by position",
    "mixed",
)
POINTWISE = ("nothing", "cap", "scale", "cast")


@pytest.mark.parametrize("classes", [True, False], ids=["class ids", "vocabulary"])
@pytest.mark.parametrize("change", CHANGES)
def test_logits_that_are_changed_afterwards(change: str, classes: bool):
    """Pointwise changes are served; what mixes the vocabulary, or positions, is right or refused."""
    ids = IDS if classes else None
    batch = {**padded([6, 4, 5], 40, extra=1), "labels": torch.arange(3)}
    scene = Scene(
        plain_module(lambda: Changed(change)),
        [batch],
        run=run_last(ids),
        arguments={"class_token_ids": ids} if classes else {},
        words=() if change in POINTWISE else ("class_token_ids", "head", "vocabulary", "forward="),
        tolerance=1e-5,
    )
    judge_scene(scene, "ekfac")


@pytest.mark.parametrize("change", CHANGES)
def test_the_vocabulary_of_logits_that_are_changed(change: str):
    model = plain_module(lambda: Changed(change))
    batch = padded([6, 4, 5], 40, extra=1)
    found = blk.LaplaceLoRA(model, fisher="exact", rank=None).fit(
        [{**batch, "labels": torch.arange(3)}], progress=False
    )
    scene = Scene(model, [batch], run=run_last(IDS))
    alone = torch.cat([scene.run(model, scene.single(batch, i)) for i in range(3)])

    def ours() -> Any:
        vocabulary = found.predict(batch, outputs="vocabulary")
        return vocabulary.mean[:, IDS], vocabulary.covariance(torch.tensor(IDS))

    def off(got: Any) -> dict[str, float]:
        plain = found.predict(batch, outputs=torch.tensor(IDS))
        return {"mean": relative(got[0], alone), "covariance": relative(got[1], plain.covariance)}

    words = () if change in ("nothing", "cast") else ("vocabulary", "head", "logits", "forward")
    judge(ours, words, off, 1e-5)


CAPPED: dict[str, Callable[[], Any]] = {
    "Gemma 2, soft cap": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**LLAMA, final_logit_softcapping=1.0, query_pre_attn_scalar=8)
    ),
    "Cohere, logit scale": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**LLAMA, logit_scale=0.25)),
    "Granite, divided": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**LLAMA, logits_scaling=4.0)
    ),
}
LLAMA = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    initializer_range=0.3,
    pad_token_id=0,
)


@pytest.mark.parametrize("classes", [True, False], ids=["class ids", "vocabulary"])
@pytest.mark.parametrize("name", CAPPED)
def test_models_that_change_their_logits(name: str, classes: bool):
    torch.manual_seed(0)
    ids = IDS if classes else None
    scene = Scene(
        adapted(CAPPED[name](), QV, task_type="CAUSAL_LM"),
        [{**padded([6, 4, 5], 40), "labels": torch.arange(3)}],
        run=run_last(ids),
        arguments={"class_token_ids": ids} if classes else {},
        tolerance=1e-4,
    )
    judge_scene(scene, "ekfac")


@pytest.mark.parametrize("name", ["T5", "BART"])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact"])
def test_padded_sources_and_padded_labels_in_the_same_row(name: str, curvature: str):
    """What DataCollatorForSeq2Seq makes; the log-likelihood is the model's own loss."""
    model = build(name)
    batch = source(name)
    labels = targets()
    labels[int(batch["attention_mask"].sum(dim=1).argmin()), 2:] = -100
    batch["labels"] = labels
    with torch.no_grad():
        expected = -float(model.eval()(**batch).loss) * int((labels != -100).sum())
    laplace = blk.LaplaceLoRA(model, curvature=curvature).fit([batch], progress=False)
    assert abs(laplace.log_likelihood - expected) < 1e-6 * abs(expected)
