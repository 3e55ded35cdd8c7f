"""Operations on a whole vocabulary in plain PyTorch: the definition, and what CPU users run.

Which scratch they take, unless ``scratch_bytes`` says it, within 14 and 64 MiB: ``vocabulary_probs`` 1.8 times its
result, or half the weight where the weight is at least eight results large (the more rows a strip has, the faster its
matrix product); the statistics, which need all samples of an example at once, 64 MiB. A piece of 1 MiB (2 in float64)
is taken in any case.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import accumulate_dtype
from .pieces import PIECE, Piece, Pieces, piece_rows, whole_examples

_LEAST_BYTES, _MOST_BYTES = 14 << 20, 64 << 20
# With fewer rows in a strip, reading the weight for each strip costs more than a second pass.
_FEWEST_ROWS = 4
# Elements of one product of `vocabulary_variance`, and columns of it to which examples are put together.
_PRODUCT = 1 << 18
_COLUMNS = 256


def vocabulary_logsumexp(
    out: Tensor, weight: Tensor, hidden: Tensor, bias: Tensor | None, softcap: float | None, mirrored: bool
) -> None:
    """Write to ``out: [N, k S]`` (float64) the log-sum-exps of the logits."""
    pieces = Pieces(weight, hidden, bias, softcap, mirrored, accumulate_dtype(weight, hidden))
    pieces.first_pass(_probs_rows(pieces), PIECE)
    out.copy_(pieces.of_examples(pieces.logsumexp).flatten(1))


def vocabulary_probs(
    out: Tensor,
    weight: Tensor,
    hidden: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mirrored: bool,
    logsumexp: Tensor | None,
    scratch_bytes: int | None,
) -> None:
    """Write to ``out: [N, V]`` the mean over samples of the probabilities."""
    pieces = Pieces(weight, hidden, bias, softcap, mirrored, out.dtype, None, logsumexp)
    if scratch_bytes is None:
        wanted = max(out.nbytes * 9 // 5, weight.nbytes // 2 if weight.nbytes >= 8 * out.nbytes else 0)
        scratch_bytes = max(_LEAST_BYTES, min(wanted, _MOST_BYTES))
    samples = pieces.samples
    rows = min(pieces.rows, scratch_bytes // out.element_size() // max(1, pieces.signs * pieces.vocabulary))
    out.zero_()
    if logsumexp is None and rows >= min(_FEWEST_ROWS, pieces.rows):
        whole = whole_examples(samples, rows)
        parts = pieces.strips(whole if 4 * rows // 5 <= whole <= rows else rows)
    else:
        size = _probs_rows(pieces), PIECE
        if logsumexp is None:
            pieces.first_pass(*size)
        parts = pieces.second_pass(*size)
    for piece in parts:
        tokens = slice(piece.token, piece.token + piece.values.shape[2])
        share = piece.scale / (pieces.signs * samples)
        # An example may have the rest of its samples in other pieces.
        for examples, which in pieces.examples(piece.row, piece.values.shape[1]):
            for values, factors in zip(piece.values[:, which], share[:, which], strict=True):
                count = examples.stop - examples.start
                means = torch.bmm(factors.reshape(count, 1, -1), values.unflatten(0, (count, -1)))
                out[examples, tokens] += means[:, 0]


def vocabulary_statistics(
    entropy: Tensor,
    mutual_information: Tensor,
    target_log_prob: Tensor,
    weight: Tensor,
    hidden: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mirrored: bool,
    targets: Tensor | None,
    logsumexp: Tensor | None,
    scratch_bytes: int | None,
) -> None:
    """Write the entropy of the mean probabilities, the mutual information, the log of the target's mean probability."""
    pieces = Pieces(weight, hidden, bias, softcap, mirrored, entropy.dtype, targets, logsumexp)
    elements = (_MOST_BYTES if scratch_bytes is None else scratch_bytes) // entropy.element_size()
    samples, each = pieces.samples, pieces.signs * pieces.vocabulary
    if logsumexp is None and elements >= samples * each:
        parts = pieces.strips(whole_examples(samples, elements // max(1, each)))
    else:
        size = piece_rows(samples, pieces.signs), max(PIECE, elements)
        if logsumexp is None:
            pieces.first_pass(*size)
        parts = pieces.second_pass(*size)
    totals = entropy.new_zeros((2, entropy.shape[0]), dtype=torch.float64)
    for piece in parts:
        first, last = piece.row // samples, (piece.row + piece.values.shape[1]) // samples
        totals[:, first:last] += _entropy_and_information(piece, samples)
    entropy.copy_(totals[0].clamp_min_(0))
    mutual_information.copy_(totals[1].clamp_min_(0))
    if targets is not None:
        log_probs = pieces.of_examples(pieces.target_logits.double() - pieces.logsumexp).flatten(1)
        target_log_prob.copy_((torch.logsumexp(log_probs, dim=1) - math.log(log_probs.shape[1])).clamp_max_(0))


def vocabulary_variance(out: Tensor, weight: Tensor, factor: Tensor) -> None:
    """Write to ``out: [N, V]`` the squared norms of ``weight_v factor_n``."""
    examples, width, columns = factor.shape
    together = max(1, min(examples, _COLUMNS // max(1, columns)))
    tokens = max(1, _PRODUCT // max(1, together * columns, width))
    scratch = out.new_empty(together * columns * tokens)
    for first in range(0, examples, together):
        count = min(first + together, examples) - first
        rows = factor[first : first + count].to(out.dtype).mT.reshape(count * columns, width)
        for token in range(0, weight.shape[0], tokens):
            some = weight[token : token + tokens].to(out.dtype)
            product = scratch[: rows.shape[0] * some.shape[0]].view(rows.shape[0], some.shape[0])
            torch.mm(rows, some.T, out=product)
            squares = product.square_().view(count, columns, some.shape[0])
            torch.sum(squares, dim=1, out=out[first : first + count, token : token + some.shape[0]])


def _probs_rows(pieces: Pieces) -> int:
    """Rows of a piece where an example may be cut: whole examples but for very many samples."""
    return min(piece_rows(pieces.samples, pieces.signs), 1 << 12)


def _entropy_and_information(piece: Piece, samples: int) -> Tensor:
    """What the tokens of a piece add to the entropy of the mean probabilities q and to the information, ``[2, n]``.

    The information is the mean over samples of ``q (r log r - (r - 1))``, ``r = p / q``: no term is negative, and those
    of samples that agree are zero, so it is exact to rounding where a difference of two entropies is lost. (The terms
    ``r - 1`` have mean zero; with them the terms are of second order in ``r - 1``, and so is what rounding does.)
    """
    probs = piece.values.mul_(piece.scale[:, :, None]).unflatten(1, (-1, samples))  # [k, n, S, v]
    means = probs.mean(2).mean(0)
    entropy = torch.special.entr(means).sum(1, dtype=torch.float64)
    # A token whose probability underflows in every sample adds nothing; the smallest number keeps 0 / 0 away.
    least = torch.finfo(probs.dtype).tiny
    ratio = probs.div_(means.clamp_min(least)[:, None]).clamp_min_(least)
    terms = ratio.log().mul_(ratio)
    terms.sub_(ratio.sub_(1))
    information = (terms.mean(2).mean(0) * means).sum(1, dtype=torch.float64)
    return torch.stack([entropy, information])
