"""`score`: every token of a text against predictions after each of its beginnings."""

from __future__ import annotations

import pytest
import torch
from dense import relative
from models import llama, seq2seq
from torch import Tensor

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.predictive import scoring


def fitted(case, **arguments) -> blk.LaplaceLoRA:
    return blk.LaplaceLoRA(case.model, **{**case.arguments, **arguments}).fit(case.loader(2), progress=False)


def expected_scores(laplace: blk.LaplaceLoRA, ids: Tensor, n: int) -> dict[str, Tensor]:
    """One prediction for each beginning of a text, all with the same samples of the weights."""
    model = laplace.model.eval()
    rows = []
    for t in range(1, len(ids)):
        prefix = {"input_ids": ids[None, :t]}
        posterior = laplace.predict(prefix, outputs="vocabulary")
        found = posterior.statistics(ids[t][None], n, torch.Generator().manual_seed(4))
        with torch.no_grad():
            log_prob_map = model(**prefix).logits[0, -1].log_softmax(dim=-1)[ids[t]]
        rows.append((log_prob_map, found.target_log_prob[0], found.entropy[0], found.mutual_information[0]))
    columns = [torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in c]) for c in zip(*rows, strict=True)]
    return dict(zip(("log_prob_map", "log_prob", "entropy", "mutual_information"), columns, strict=True))


ADAPTERS = {
    "LoRA": {},
    "adapted head": {"targets": ("q_proj", "lm_head")},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_the_predictions_after_each_beginning(side, adapter):
    case = llama(classes=None, lengths=(5, 3, 6), **ADAPTERS[adapter])
    laplace = fitted(case, fisher="mc")
    batch = case.batch(side=side, extra=2)
    scores = laplace.score(batch, 7, torch.Generator().manual_seed(4))
    valid = batch["attention_mask"].bool()
    width = valid.shape[1]
    for row, ids in enumerate(case.examples):
        first = width - len(ids) if side == "left" else 0
        places = range(first + 1, first + len(ids))
        assert scores.mask[row].nonzero()[:, 0].tolist() == list(places)
        for name, truth in expected_scores(laplace, ids, 7).items():
            found = getattr(scores, name)
            assert found.shape == valid.shape
            assert relative(found[row, list(places)], truth) < 1e-8
            assert not found[row][~scores.mask[row]].any()


@pytest.mark.parametrize("changed", ["budget", "piece", "both"])
def test_pieces_change_nothing(changed, monkeypatch):
    case = llama(classes=None, lengths=(5, 3, 6))
    expected = fitted(case).score(case.batch(), 6, torch.Generator().manual_seed(1))
    if changed != "budget":
        monkeypatch.setattr(scoring, "PIECE_LOGITS", 30)
    laplace = fitted(case, **({"memory_budget": 1} if changed != "piece" else {}))
    found = laplace.score(case.batch(), 6, torch.Generator().manual_seed(1))
    assert torch.equal(found.mask, expected.mask)
    for a, b in zip(found[:4], expected[:4], strict=True):
        assert relative(a, b) < 1e-9


def test_without_a_mask_and_labels_are_ignored():
    case = llama(classes=None, lengths=(5, 5))
    laplace = fitted(case)
    noise = torch.Generator().manual_seed(1)
    expected = laplace.score(case.batch(), 4, noise)
    ids = case.batch()["input_ids"]
    found = laplace.score({"input_ids": ids, "labels": ids}, 4, noise.manual_seed(1))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_posterior_for_choices_scores_texts_too():
    case = llama(lengths=(5, 3))
    scores = fitted(case).score(case.batch(), 4)
    assert scores.log_prob.shape == (2, 5)
    assert (scores.mutual_information[scores.mask] > 0).all()


def test_bad_calls():
    case = llama(classes=None)
    laplace = fitted(case)
    with pytest.raises(ValueError, match="n_samples: expected at least 1, got 0"):
        laplace.score(case.batch(), 0)
    with pytest.raises(TypeError, match="n_samples: expected a positive int"):
        laplace.score(case.batch(), 1.5)
    with pytest.raises(ValueError, match="two tokens at least"):
        laplace.score({"input_ids": torch.tensor([[3], [4]])}, 2)
    with pytest.raises(TypeError, match="expected a mapping"):
        laplace.score(torch.tensor([[3, 4]]), 2)
    other = seq2seq()
    with pytest.raises(ValueError, match="decoder-only"):
        fitted(other).score(other.batch(), 2)
    embedded = {"inputs_embeds": torch.zeros(1, 3, 16, dtype=torch.float64)}
    with pytest.raises(ValueError, match="input_ids"):
        laplace.score(embedded, 2)
