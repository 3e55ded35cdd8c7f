"""How a causal LM rates every token of a text, with the posterior and without, and how sure it can be of that."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesian_lora_kernels.model.memory import default_budget
from bayesian_lora_kernels.predictive.hidden_samples import Deviations, HiddenSampler
from bayesian_lora_kernels.predictive.sampled_logits import SampledLogits

# Logits at the MAP weights that a piece of positions may have.
PIECE_LOGITS = 2**22


class TokenScores(NamedTuple):
    """Of each token given those before it, in nats; zero where there is nothing to say.

    Attributes:
        log_prob_map: `[N, T]` log-probability at the MAP weights.
        log_prob: `[N, T]` log of the mean probability over posterior samples.
        entropy: `[N, T]` of the mean distribution at this place: all of the uncertainty.
        mutual_information: `[N, T]` between the token at this place and the weights: the epistemic part.
        mask: `[N, T]` bool, False at padding and at the first token of each text, before which there is nothing.
    """

    log_prob_map: Tensor
    log_prob: Tensor
    entropy: Tensor
    mutual_information: Tensor
    mask: Tensor


def score_tokens(sampler: HiddenSampler, batch: Any, n_samples: int, generator: torch.Generator | None) -> TokenScores:
    """Scores of all tokens of a batch.

    Memory is that of the hidden states of all samples, `[S / 2, N, T, d]`, for as many examples as fit the sampler's
    budget, and a fixed amount for logits, whatever T and V.

    Args:
        sampler: of hidden states.
        batch: with `input_ids [N, T]`.
        n_samples: half are drawn, half are mirror images.
        generator: of the samples.

    Raises:
        ValueError: for an encoder-decoder model, a batch without `input_ids`, or no position to score.
    """
    if sampler.forward.seq2seq:
        raise ValueError("score: expected a decoder-only model, this one has an encoder")
    prepared = sampler.prepare(batch)
    ids = prepared.inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError("score: expected a batch with input_ids [N, T]")
    hidden, valid = sampler.mean(prepared, every=True)
    head = sampler.head(prepared)
    if hidden.shape[:2] != ids.shape:
        raise ValueError(
            f"score: expected hidden states of the {list(ids.shape)} tokens, got {list(hidden.shape[:2])} positions"
        )
    mask = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid.to(ids.device)
    mask = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:] & mask[:, :-1]], dim=1)
    results = torch.zeros(4, *ids.shape, dtype=hidden.dtype, device=ids.device)
    places = mask.cpu()
    if not places.any():
        raise ValueError("score: expected a text of two tokens at least")
    pairs = -(-n_samples // 2)
    budget = sampler.memory_budget or default_budget(hidden.device)
    examples = max(1, budget // max(3 * pairs * hidden[0].numel() * hidden.element_size(), 1))
    step = max(1, PIECE_LOGITS // head.vocabulary)
    state = None if generator is None else generator.get_state()
    for rows, piece in prepared.pieces(examples):
        if generator is not None and state is not None:
            generator.set_state(state)  # the same samples of the weights for every example, however many run at once
        drawn = sampler.draw(piece, pairs, True, generator)
        at = places[rows].nonzero().to(mask.device)
        for i in range(0, len(at), step):
            n, t = at[i : i + step].unbind(dim=1)
            samples = Deviations(drawn.hidden[:, n, t - 1], drawn.head)
            logits = SampledLogits(head, hidden[rows][n, t - 1], samples, n_samples, mirrored=True)
            targets = ids[rows][n, t].to(logits.mean.device)
            found, point = logits.statistics(targets), head.capped(logits.mean)
            log_prob_map = point.gather(1, targets[:, None])[:, 0] - point.logsumexp(dim=1)
            values = (log_prob_map, found.target_log_prob, found.entropy, found.mutual_information)
            for result, value in zip(results, values, strict=True):
                assert value is not None
                result[rows][n, t] = value.to(result)
    return TokenScores(results[0], results[1], results[2], results[3], mask)
