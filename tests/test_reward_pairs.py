"""Reward models on pairs, as trainers call them: one forward or two, margins, masks of their own, ties and lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from dense import relative
from models import in_float64
from situations import CURVATURES, Scene, adapted, fit, judge, judge_scene, padded, padded_row
from torch import Tensor, nn

import bayesian_lora_kernels as blk

WORDS = ("mask", "pairs", "2 rows", "several rows", "example")
SIDES = ("chosen", "rejected")
CHOSEN, REJECTED = [5, 3, 6, 4], [7, 2, 4, 6]


def reward_model(family: str = "llama") -> Any:
    torch.manual_seed(0)
    common: dict[str, Any] = dict(vocab_size=40, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3)
    if family == "llama":
        config = transformers.LlamaConfig(
            **common, hidden_size=16, intermediate_size=16, num_key_value_heads=1, pad_token_id=0, num_labels=1
        )
        model: Any = transformers.LlamaForSequenceClassification(config)
        return in_float64(adapted(model, ["q_proj", "v_proj"], task_type="SEQ_CLS"))
    config = transformers.BertConfig(
        **common, hidden_size=16, intermediate_size=16, max_position_embeddings=32, num_labels=1
    )
    model = transformers.BertForSequenceClassification(config)
    return adapted(model, ["query", "value"], task_type="SEQ_CLS")


def pairs(
    extra: int = 0,
    names: tuple[str, str] = ("input_ids_{}", "attention_mask_{}"),
    lengths: tuple[list[int], list[int]] = (CHOSEN, REJECTED),
) -> dict[str, Tensor]:
    """Columns for both sides, padded to widths of their own."""
    batch: dict[str, Tensor] = {}
    for side, counts, seed in zip(SIDES, lengths, (6, 7), strict=True):
        found = padded(counts, 40, extra=extra, seed=seed)
        batch[names[0].format(side)], batch[names[1].format(side)] = found["input_ids"], found["attention_mask"]
    batch["labels"] = torch.zeros(len(lengths[0]), dtype=torch.long)
    return batch


def together(batch: Mapping[str, Tensor], names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Both sides below each other, at the larger width."""
    ids, masks = ([batch[name.format(side)] for side in SIDES] for name in names)
    width = max(x.shape[1] for x in ids)
    stretch = [[nn.functional.pad(x, (0, width - x.shape[1])) for x in part] for part in (ids, masks)]
    return torch.cat(stretch[0]), torch.cat(stretch[1])


NAMES = ("input_ids_{}", "attention_mask_{}")
TRL = ("{}_input_ids", "{}_attention_mask")


def two_calls(model: Any, batch: Mapping[str, Tensor], names: tuple[str, str] = NAMES) -> Tensor:
    scores = [
        model(input_ids=batch[names[0].format(side)], attention_mask=batch[names[1].format(side)]).logits
        for side in SIDES
    ]
    return torch.cat(scores, dim=1)


def two_calls_trl(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return two_calls(model, batch, TRL)


def rejected_first(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    scores = [
        model(input_ids=batch[f"input_ids_{side}"], attention_mask=batch[f"attention_mask_{side}"]).logits
        for side in SIDES[::-1]
    ]
    return torch.cat(scores[::-1], dim=1)


def one_call(model: Any, batch: Mapping[str, Tensor], names: tuple[str, str] = NAMES) -> Tensor:
    ids, mask = together(batch, names)
    return torch.cat(model(input_ids=ids, attention_mask=mask).logits.chunk(2), dim=1)


def one_call_trl(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return one_call(model, batch, TRL)


def interleaved(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    ids, mask = together(batch, NAMES)
    n = len(ids) // 2
    order = torch.arange(2 * n).view(2, n).T.flatten()
    return model(input_ids=ids[order], attention_mask=mask[order]).logits.view(n, 2)


def margin(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The difference as one logit."""
    scores = two_calls(model, batch)
    return scores[:, :1] - scores[:, 1:]


def against_zero(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The difference and a constant, a classification of which side wins."""
    difference = margin(model, batch)
    return torch.cat([difference, torch.zeros_like(difference)], dim=1)


def without_mask(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The model finds the last token by its pad token."""
    return torch.cat([model(input_ids=batch[f"input_ids_{side}"]).logits for side in SIDES], dim=1)


def detached_reference(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """As DPO: a reference in the same model, its adapter disabled, under no_grad."""
    with torch.no_grad(), model.disable_adapter():
        reference = two_calls(model, batch)
    return two_calls(model, batch) - reference


def unpadded_pair(names: tuple[str, str] = NAMES) -> Callable[[Any, int], Any]:
    def single(batch: Any, i: int) -> Any:
        row = padded_row(batch, i)
        cut = {}
        for side in SIDES:
            valid = row[names[1].format(side)][0].bool()
            for name in names:
                cut[name.format(side)] = row[name.format(side)][:, valid]
        return cut

    return single


FORWARDS: dict[str, tuple[Callable[..., Tensor], tuple[str, str]]] = {
    "two calls": (two_calls, NAMES),
    "two calls, TRL's names": (two_calls_trl, TRL),
    "two calls, the other way round": (rejected_first, NAMES),
    "one call": (one_call, NAMES),
    "one call, TRL's names": (one_call_trl, TRL),
    "one call, interleaved": (interleaved, NAMES),
    "margin": (margin, NAMES),
    "margin against zero": (against_zero, NAMES),
    "ids alone": (without_mask, NAMES),
    "against a reference": (detached_reference, NAMES),
}


def scene(name: str, extra: int = 0, family: str = "llama", **more: Any) -> Scene:
    forward, names = FORWARDS[name]
    arguments: dict[str, Any] = {"forward": forward}
    if name == "margin":
        arguments["likelihood"] = "regression"
    batches = [pairs(extra, names), pairs(extra, names, ([3, 5], [4, 4]))]
    if name == "margin":
        for batch in batches:
            batch["labels"] = torch.ones(len(batch["labels"]), 1).double()
    return Scene(
        reward_model(family),
        batches,
        run=forward,
        single=unpadded_pair(names),
        arguments=arguments,
        words=WORDS,
        tolerance=1e-6,
        # In one call the shorter side of a pair is padded to the longer, also where it runs alone: the truth about
        # A would count that padding.
        factors=not name.startswith("one call"),
        **more,
    )


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("name", FORWARDS)
def test_pairs(name: str, extra: int, curvature: str):
    judge_scene(scene(name, extra), curvature)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", ["two calls", "one call"])
def test_pairs_of_an_encoder(name: str, curvature: str):
    """BERT's pooler sees [N, d], which no mask describes."""
    judge_scene(scene(name, 2, "bert"), curvature)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", ["two calls", "one call", "margin against zero"])
def test_one_pair_at_a_time(name: str, curvature: str):
    s = scene(name)
    s.batches = [pairs(1, FORWARDS[name][1], ([n], [m])) for n, m in zip(CHOSEN, REJECTED, strict=True)]
    judge_scene(s, curvature)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact"])
@pytest.mark.parametrize("name", FORWARDS)
def test_padding_changes_nothing(name: str, curvature: str):
    names = FORWARDS[name][1]

    def covariance(extra: int) -> Tensor:
        s = scene(name, extra)
        return fit(s, curvature=curvature).predict(pairs(0, names)).covariance

    judge(lambda: (covariance(10), covariance(0)), WORDS, lambda found: relative(*found), 1e-6)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_both_sides_without_padding(curvature: str):
    """All of one length: nothing to mask, so that two calls are right today."""
    s = scene("two calls")
    s.batches = [pairs(0, NAMES, ([5] * 4, [7] * 4))]
    s.words = ()
    judge_scene(s, curvature)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_shared_prompt(curvature: str):
    """The prompt is a column of its own, put in front of either answer."""
    s = scene("two calls")
    prompt = torch.randint(3, 40, (4, 3))

    def forward(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        ones = torch.ones_like(batch["prompt"])
        scores = []
        for side in SIDES:
            ids = torch.cat([batch["prompt"], batch[f"input_ids_{side}"]], dim=1)
            mask = torch.cat([ones, batch[f"attention_mask_{side}"]], dim=1)
            scores.append(model(input_ids=ids, attention_mask=mask).logits)
        return torch.cat(scores, dim=1)

    def single(batch: Any, i: int) -> Any:
        return {**unpadded_pair()(batch, i), "prompt": batch["prompt"][i : i + 1]}

    s.batches = [{**pairs(), "prompt": prompt}]
    s.run, s.single, s.arguments = forward, single, {"forward": forward}
    judge_scene(s, curvature)


def listwise(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """K answers as [N, K, T], run as one batch."""
    n, k, t = batch["answers"].shape
    mask = batch["answers_mask"].view(n * k, t)
    return model(input_ids=batch["answers"].view(n * k, t), attention_mask=mask).logits.view(n, k)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_lists_of_answers(curvature: str):
    found = padded([4, 6, 3, 5, 2, 6], 40)
    batch = {
        "answers": found["input_ids"].view(2, 3, 6),
        "answers_mask": found["attention_mask"].view(2, 3, 6),
        "labels": torch.tensor([0, 2]),
    }
    s = Scene(
        reward_model(),
        [batch],
        run=listwise,
        single=padded_row,
        arguments={"forward": listwise},
        words=WORDS,
        factors=False,
    )
    judge_scene(s, curvature)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_the_columns_that_a_collator_stacks(curvature: str):
    """2N rows of input_ids, chosen first, and N labels: TRL's collator. The logits are for pairs."""
    ids, mask = together(pairs(), NAMES)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(4, dtype=torch.long)}

    def forward(model: Any, b: Mapping[str, Tensor]) -> Tensor:
        logits = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits
        return torch.cat(logits.chunk(2), dim=1)

    model = reward_model()
    apart = pairs()

    def run() -> Any:
        return blk.LaplaceLoRA(model, forward=forward, rank=None, curvature=curvature).fit([batch], progress=False)

    expected = blk.LaplaceLoRA(model, forward=two_calls, rank=None, curvature="exact")
    expected.fit([apart], progress=False)

    def off(found: blk.LaplaceLoRA) -> float:
        if curvature == "exact":
            got, wanted = found.predict(batch).covariance, expected.predict(apart).covariance
            return relative(got, wanted)
        return relative(torch.tensor(found.log_likelihood), torch.tensor(expected.log_likelihood))

    judge(run, (*WORDS, "logits of shape"), off)
