"""Positions that a mask excludes: they count for nothing, or the package says that they count for the model.

Where the logits do depend on padding, the truth is the user's own call on the padded row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from dense import relative
from models import llama
from situations import (
    CURVATURES,
    Scene,
    adapted,
    fit,
    floats,
    judge,
    judge_scene,
    labelled,
    padded,
    padded_row,
    plain_module,
    run_last,
    run_plain,
    unpadded_row,
)
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import bayesian_lora_kernels as blk

WORDS = ("mask", "padding", "padded", "pads")
LENGTHS = [6, 4, 5, 6]


class Text(nn.Module):
    """A frozen embedding, a layer on tokens and a head."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.embed = nn.Embedding(40, width).requires_grad_(False)
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def states(self, input_ids: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.embed(input_ids)))

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        weights = mask.to(states.dtype)
        return (states * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)


class Pooled(Text):
    """Pads take no part: right today."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.pool(self.states(input_ids), attention_mask.bool()))


class Mean(Text):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.states(input_ids).mean(dim=1))


class SumOverLength(Text):
    """The sum over all positions by the number of valid ones."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.states(input_ids).sum(dim=1) / attention_mask.sum(dim=1, keepdim=True))


class Maximum(Text):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.states(input_ids).amax(dim=1))


class Last(Text):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.states(input_ids).cumsum(dim=1)[:, -1])


class FromTheRight(Text):
    """A recurrence that starts at the padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.states(input_ids).flip(1).cumsum(dim=1)[:, -1])


class Convolution(Text):
    """Valid positions next to the padding see it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1).requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.pool(self.conv(self.states(input_ids).mT).mT, attention_mask))


class Attention(Text):
    """Valid positions attend to all."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.states(input_ids)
        mixed = torch.softmax(states @ states.mT, dim=-1) @ states
        return self.head(self.pool(mixed, attention_mask))


class NormOverTime(Text):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.states(input_ids)
        return self.head(self.pool((states - states.mean(dim=1, keepdim=True)).square(), attention_mask))


class Inverted(Text):
    """A mask that is True where nothing counts, under the usual name."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.pool(self.states(input_ids), ~attention_mask.bool()))


class OtherName(Text):
    """The mask has a name of its own; True where nothing counts."""

    def forward(self, input_ids: Tensor, key_padding_mask: Tensor) -> Tensor:
        return self.head(self.pool(self.states(input_ids), ~key_padding_mask.bool()))


class WithClassToken(Text):
    """One more position in front: the layer sees T + 1, which no mask describes."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        ids = nn.functional.pad(input_ids, (1, 0), value=1)
        mask = nn.functional.pad(attention_mask, (1, 0), value=1)
        return self.head(self.pool(self.states(ids), mask))


class Halved(Text):
    """Two tokens at a time: the layer sees T / 2 (as Funnel and speech encoders do)."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(16, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        n, t = input_ids.shape
        pairs = self.embed(input_ids).reshape(n, t // 2, 16)
        return self.head(self.pool(torch.tanh(self.mix(pairs)), attention_mask[:, ::2]))


class Doubled(Text):
    """The text after itself: the layer sees 2 T."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        twice, mask = (
            torch.cat([input_ids, input_ids.flip(1)], 1),
            torch.cat([attention_mask, attention_mask.flip(1)], 1),
        )
        return self.head(self.pool(self.states(twice), mask))


class Windowed(Text):
    """Padded inside to a multiple of 4, as Longformer is."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        more = -input_ids.shape[1] % 4
        states = self.states(nn.functional.pad(input_ids, (0, more)))
        return self.head(self.pool(states, nn.functional.pad(attention_mask, (0, more))))


class TextAndImage(Text):
    def __init__(self):
        super().__init__()
        self.image = nn.Linear(5, 8)
        self.mix.requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixels: Tensor) -> Tensor:
        text = self.pool(self.embed(input_ids), attention_mask)
        return self.head(text * torch.tanh(self.image(pixels)).mean(dim=1))


class Dense(Text):
    """Only valid tokens are run, one after the other: [sum of lengths, d]."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.bool()
        states = torch.tanh(self.mix(self.embed(input_ids[mask])))
        spread = states.new_zeros(*mask.shape, states.shape[-1]).masked_scatter(mask[..., None], states)
        return self.head(self.pool(spread, mask))


class FlatPads(Text):
    """Tokens as [N T, d]."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.states(input_ids.flatten()).unflatten(0, input_ids.shape)
        return self.head(self.pool(states, attention_mask))


class Pieces(Text):
    """Time in pieces of two: several calls, each with a part of the positions."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = torch.cat([self.states(part) for part in input_ids.split(2, dim=1)], dim=1)
        return self.head(self.pool(states, attention_mask))


class ByCharacters(Text):
    """Every token in two parts: [N, T, 2, d]."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        parts = torch.stack([input_ids, (input_ids + 1) % 40], dim=2)
        return self.head(self.pool(self.states(parts).mean(dim=2), attention_mask))


def of(build: Callable[[], nn.Module], batch: Any = None, counts: bool = False, **scene: Any) -> Any:
    """`counts`: the logits depend on the padding, so that the truth is that of the padded row."""

    def make() -> Scene:
        data = batch() if batch else [labelled(padded(LENGTHS, 40, extra=2)), labelled(padded([3, 4], 40, seed=4))]
        settings: dict[str, Any] = {"words": WORDS, "single": unpadded_row, **scene}
        if counts:
            settings |= {"single": padded_row, "factors": False}
        return Scene(plain_module(build), data, **settings)

    return make


def with_image() -> list[dict[str, Tensor]]:
    return [{**labelled(padded(LENGTHS, 40)), "pixels": floats(4, 6, 5)}]


def another_mask(change: Callable[[Tensor], Any], key: str = "attention_mask") -> Callable[[], list[dict[str, Any]]]:
    def make() -> list[dict[str, Any]]:
        batch = labelled(padded(LENGTHS, 40, extra=2))
        mask = batch.pop("attention_mask")
        return [{**batch, key: change(mask)}]

    return make


def by_real_mask(batch: Any, i: int) -> Any:
    """Unpadded where the mask has a form of its own (pads are id 0)."""
    row = padded_row(batch, i)
    keep = row["input_ids"][0] != 0
    cut = {"input_ids": row["input_ids"][:, keep]}
    (key,) = [k for k in row if "mask" in k]
    mask = row[key]
    return {
        **cut,
        key: mask[:, keep] if isinstance(mask, Tensor) and mask.ndim == 2 else torch.ones_like(cut["input_ids"]),
    }


def even() -> list[dict[str, Tensor]]:
    return [labelled(padded([6, 4, 2, 6], 40, extra=2))]


def holes() -> list[dict[str, Tensor]]:
    """Masks with holes in them."""
    batch = labelled(padded(LENGTHS, 40))
    batch["attention_mask"][0, 2] = batch["attention_mask"][1, 0] = 0
    return [batch]


def llama_config(**more: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        **more,
    )


def llama_lm(forward: Any, side: str = "right") -> Scene:
    torch.manual_seed(0)
    model = adapted(transformers.LlamaForCausalLM(llama_config()), ["q_proj", "v_proj"], task_type="CAUSAL_LM")
    batch = labelled(padded(LENGTHS, 40, pad=2, side=side))  # the pad token that the model knows is all zeros
    return Scene(
        model, [batch], run=forward, arguments={"forward": forward}, single=padded_row, factors=False, words=WORDS
    )


def ignores_mask(model: nn.Module, batch: Any) -> Tensor:
    return model(input_ids=batch["input_ids"]).logits[:, -1, 11:14]


def last_column(model: nn.Module, batch: Any) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, -1, 11:14]


def mean_of_logits(model: nn.Module, batch: Any) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.mean(dim=1)[:, 11:14]


def other_pad_token() -> Scene:
    """LlamaForSequenceClassification looks for its own pad token (0); the tokenizer padded with another."""
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(llama_config(num_labels=3))
    model = adapted(model, ["q_proj", "v_proj"], task_type="SEQ_CLS")
    return Scene(model, [labelled(padded(LENGTHS, 40, pad=2))], single=padded_row, factors=False, words=WORDS)


def other_pad_token_causal() -> Scene:
    """A causal LM goes by the mask: any token may be the padding."""
    torch.manual_seed(0)
    model = adapted(transformers.LlamaForCausalLM(llama_config()), ["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ids = [11, 12, 13]
    batch = labelled(padded(LENGTHS, 40, pad=2, extra=1))
    return Scene(model, [batch], run=run_last(ids), arguments={"class_token_ids": ids}, tolerance=1e-5)


def longformer(lengths: list[int]) -> Scene:
    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=64,
        attention_window=4,
        num_labels=3,
        pad_token_id=1,
        initializer_range=0.3,
    )
    model = adapted(transformers.LongformerForSequenceClassification(config), ["query", "value"], task_type="SEQ_CLS")
    batch = labelled(padded(lengths, 40, pad=1))
    return Scene(model, [batch], words=(*WORDS, "example", "[N"), factors=False, tolerance=1e-5)


class ClipText(nn.Module):
    """CLIP's text model pools at the end token; its own mask is causal, and pads are not excluded inside."""

    def __init__(self):
        super().__init__()
        config = transformers.CLIPTextConfig(
            vocab_size=40,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            eos_token_id=39,
            bos_token_id=1,
            pad_token_id=0,
            initializer_range=0.3,
        )
        self.clip, self.head = transformers.CLIPTextModel(config), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(
            logits=self.head(self.clip(input_ids=input_ids, attention_mask=attention_mask).pooler_output)
        )


def clip_text(width: int) -> Scene:
    torch.manual_seed(0)
    model = adapted(ClipText(), ["q_proj", "v_proj"], modules_to_save=["head"])
    batch = labelled(padded(LENGTHS, 38, extra=width - 6))
    batch["input_ids"][torch.arange(4), torch.tensor(LENGTHS) - 1] = 39
    return Scene(model, [batch], words=(*WORDS, "example"), tolerance=1e-5)


def funnel() -> Scene:
    """Blocks that halve the number of positions: no mask of the batch describes them."""
    torch.manual_seed(0)
    config = transformers.FunnelConfig(
        vocab_size=40,
        block_sizes=[1, 1],
        num_decoder_layers=1,
        d_model=8,
        n_head=2,
        d_head=4,
        d_inner=8,
        num_labels=3,
        initializer_std=0.5,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    model = adapted(transformers.FunnelForSequenceClassification(config), ["q_head", "v_head"], task_type="SEQ_CLS")
    return Scene(model, [labelled(padded([8, 8, 4], 40))], words=(*WORDS, "example"), single=padded_row, factors=False)


def chunked_bert() -> Scene:
    """chunk_size_feed_forward: the feed-forward runs on two positions at a time."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
        initializer_range=0.3,
        chunk_size_feed_forward=2,
    )
    model = adapted(
        transformers.BertForSequenceClassification(config),
        r".*layer\.\d\.(intermediate|output)\.dense",
        task_type="SEQ_CLS",
    )
    return Scene(model, [labelled(padded([6, 4, 2, 6], 40, extra=2))], words=WORDS)


def electra_without_mask() -> Scene:
    """No mask in the batch at all: every position counts, the padding too."""
    torch.manual_seed(0)
    config = transformers.ElectraConfig(
        vocab_size=40,
        embedding_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
        initializer_range=0.3,
    )
    model = adapted(transformers.ElectraForSequenceClassification(config), ["query", "value"], task_type="SEQ_CLS")
    batch = labelled(padded(LENGTHS, 40))
    del batch["attention_mask"]
    return Scene(model, [batch])


SCENES: dict[str, Callable[[], Scene]] = {
    # Pads that count for nothing: right today.
    "pooled": of(Pooled, words=()),
    "flattened": of(FlatPads, words=()),
    "another pad token, causal LM": other_pad_token_causal,
    "no mask": electra_without_mask,
    "holes in the mask": of(Pooled, holes, words=()),
    "mask of bool": of(Pooled, another_mask(lambda m: m.bool()), words=()),
    "mask of floats": of(Pooled, another_mask(lambda m: m.double()), words=()),
    # The logits depend on padding.
    "mean over all positions": of(Mean, counts=True),
    "sum over all positions": of(SumOverLength, counts=True),
    "maximum over all positions": of(Maximum, counts=True),
    "last position": of(Last, counts=True),
    "recurrence from the right": of(FromTheRight, counts=True),
    "convolution over time": of(Convolution, counts=True),
    "attention without a mask": of(Attention, counts=True),
    "norm over time": of(NormOverTime, counts=True),
    "forward= without the mask": lambda: llama_lm(ignores_mask),
    "forward= without the mask, left padding": lambda: llama_lm(ignores_mask, "left"),
    "forward= that takes the last column": lambda: llama_lm(last_column),
    "forward= that averages logits": lambda: llama_lm(mean_of_logits),
    "another pad token": other_pad_token,
    "inverted mask": of(
        Inverted, another_mask(lambda m: 1 - m), single=padded_row, factors=False, words=(*WORDS, "valid")
    ),
    "funnel": funnel,
    # Positions that no mask describes, or the wrong one: what counts must not be guessed by length.
    "as many image tokens as text tokens": of(TextAndImage, with_image),
    "class token": of(WithClassToken),
    "two tokens at a time": of(Halved, even, single=unpadded_row),
    "text after itself": of(Doubled),
    "windows": of(Windowed, factors=False),
    "valid tokens only": of(Dense, words=(*WORDS, "example")),
    "tokens in parts": of(ByCharacters),
    "time in pieces": of(Pieces),
    "BERT, feed-forward in chunks": chunked_bert,
    "Longformer": lambda: longformer([6, 4, 5, 6]),
    "Longformer, whole windows": lambda: longformer([8, 4, 5, 6]),
    "CLIP text": lambda: clip_text(6),
    "CLIP text, more padding": lambda: clip_text(9),
    # Masks in other forms and under other names.
    "mask under another name": of(OtherName, another_mask(lambda m: 1 - m, "key_padding_mask"), single=by_real_mask),
    "mask as a list": of(Pooled, another_mask(lambda m: m.tolist()), single=by_real_mask, words=(*WORDS, "tensor")),
    "mask as an array": of(Pooled, another_mask(lambda m: m.numpy()), single=by_real_mask, words=(*WORDS, "tensor")),
}


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", SCENES)
def test_right_or_refused(name: str, curvature: str):
    judge_scene(SCENES[name](), curvature)


def four_dimensional(mask: Tensor) -> Tensor:
    """A causal mask for attention, `[N, 1, T, T]`."""
    causal = torch.ones(mask.shape[1], mask.shape[1]).tril().bool()
    return causal & mask.bool()[:, None, None, :]


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_mask_of_four_dimensions(curvature: str):
    torch.manual_seed(0)
    model = adapted(transformers.LlamaForCausalLM(llama_config()), ["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ids = [11, 12, 13]
    batch = labelled(padded(LENGTHS, 40))
    wide = {**batch, "attention_mask": four_dimensional(batch["attention_mask"])}

    def single(_: Any, i: int) -> Any:
        return unpadded_row(batch, i)

    scene = Scene(
        model, [wide], run=run_last(ids), single=single, arguments={"class_token_ids": ids}, words=WORDS, tolerance=1e-5
    )
    judge_scene(scene, curvature)


# Two calls in one forward, masks under other names.


def pair_of_calls(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    scores = [
        model(input_ids=batch[f"input_ids_{name}"], attention_mask=batch[f"attention_mask_{name}"]).logits
        for name in ("chosen", "rejected")
    ]
    return torch.cat(scores, dim=1)


def pairs(extra: int = 0, equal: bool = False) -> dict[str, Tensor]:
    batch = {"labels": torch.zeros(4, dtype=torch.long)}
    for name, lengths, seed in (("chosen", [5, 3, 5, 4], 6), ("rejected", [5, 5, 4, 3] if equal else [7, 2, 6, 5], 7)):
        for key, value in padded(lengths, 40, extra=extra, seed=seed).items():
            batch[f"{key}_{name}"] = value
    return batch


def unpadded_pair(batch: Any, i: int) -> Any:
    row = padded_row(batch, i)
    return {
        f"{key}_{name}": row[f"{key}_{name}"][:, row[f"attention_mask_{name}"][0].bool()]
        for name in ("chosen", "rejected")
        for key in ("input_ids", "attention_mask")
    }


def reward_model() -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(llama_config(num_labels=1))
    return adapted(model, ["q_proj", "v_proj"], task_type="SEQ_CLS")


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("equal", [False, True], ids=["other widths", "equal widths"])
@pytest.mark.parametrize("extra", [0, 3])
def test_two_calls_with_masks_of_their_own(extra: int, equal: bool, curvature: str):
    scene = Scene(
        reward_model(),
        [pairs(extra, equal)],
        run=pair_of_calls,
        single=unpadded_pair,
        arguments={"forward": pair_of_calls},
        words=WORDS,
        tolerance=1e-5,
    )
    judge_scene(scene, curvature)


# More padding changes nothing.

INVARIANT = (
    "pooled",
    "flattened",
    "class token",
    "text after itself",
    "windows",
    "valid tokens only",
    "tokens in parts",
)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", INVARIANT)
def test_more_padding_changes_no_factor(name: str, curvature: str):
    scene = SCENES[name]()

    def factors(extra: int) -> list[Tensor]:
        scene.batches = [labelled(padded(LENGTHS, 40, extra=extra))]
        found = fit(scene, curvature=curvature)
        return [x for f in found.factors.values() for x in (f.a, f.s)]

    judge(
        lambda: (factors(8), factors(0)),
        scene.words,
        lambda found: max(relative(a, b) for a, b in zip(*found, strict=True)),
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_more_padding_changes_no_factor_of_a_model_of_transformers(side: str):
    torch.manual_seed(0)
    model = adapted(transformers.LlamaForCausalLM(llama_config()), ["q_proj", "v_proj"], task_type="CAUSAL_LM")

    def factors(extra: int) -> list[Tensor]:
        scene = Scene(
            model, [labelled(padded(LENGTHS, 40, side=side, extra=extra))], arguments={"class_token_ids": [11, 12, 13]}
        )
        return [f.a for f in fit(scene).factors.values()]

    judge(lambda: (factors(7), factors(0)), (), lambda f: max(map(relative, *f)), tolerance=1e-5)


def test_the_scenes_are_what_they_say():
    """Padding counts where it is said to, and nowhere else."""
    for name, make in SCENES.items():
        scene = make()
        if not isinstance(scene.model, Text) or scene.single is by_real_mask:
            continue
        batch, off = scene.batches[0], 0.0
        for i in range(4):
            whole, cut = (scene.run(scene.model, single(batch, i)) for single in (padded_row, unpadded_row))
            off = max(off, relative(whole, cut) if not cut.isnan().any() else 1.0)
        assert (off > 1e-6) == (scene.single is padded_row), name
    assert run_plain(plain_module(Pooled), padded_row(SCENES["pooled"]().batches[0], 1)).shape == (1, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_classes_of_one_logit_differ_by_rounding_only(dtype: torch.dtype):
    """As with a head that is all zeros, or tokens that were just added to a vocabulary."""
    case = llama(classes=(2, 5), dtype=dtype)
    head = case.model.get_base_model().lm_head
    with torch.no_grad():
        head.weight[5] = head.weight[2]
    laplace = blk.LaplaceLoRA(case.model, class_token_ids=(2, 5)).fit(case.loader(4), progress=False)
    prediction = laplace.predict(case.batch())
    assert float(prediction.mean.diff(dim=1).abs().max()) <= 1e-5 * float(prediction.mean.abs().max())
    assert float(prediction.covariance.abs().max()) > 0
