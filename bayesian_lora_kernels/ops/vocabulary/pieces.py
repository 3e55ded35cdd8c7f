"""Probabilities of samples over a whole vocabulary, piece by piece, in bounded memory: what the references loop over.

A *row* is one sample of one example. The logits of all rows never exist at once. They are made in pieces, some rows and
some tokens at a time, and there are two ways to their probabilities:

- *strips*: the exponentials of some rows for the whole vocabulary, shifted by each piece's own maximum, stay in scratch
  until the log-sum-exps of these rows are known. Every logit is computed once.
- *two passes*: the log-sum-exps of all rows first, then all logits again. The scratch is one piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of a piece: what the caches keep for the passes that follow the matrix product.
PIECE = 1 << 18
# Tokens of a piece, at least, and rows of a piece in two passes, about: a narrower matrix product is slower.
_TOKENS = 512
_ROWS = 512
# Elements of a weight in another dtype that are converted at a time.
_CONVERTED = 1 << 19


@dataclass(frozen=True)
class Piece:
    """``probability = values * scale`` of the rows from ``row`` and the tokens from ``token``.

    ``values: [r, v]``, free to be overwritten, ``scale: [r]``.
    """

    row: int
    token: int
    values: Tensor
    scale: Tensor


class Pieces:
    """The pieces of ``hidden: [N, S, d]``.

    Logits are ``z = weight h + bias``, then ``softcap * tanh(z / softcap)``; where the bias is minus infinity so is the
    logit.

    ``logsumexp: [N * S]`` is float64: float32 would lose 1e-3 of every probability where it is 1e4. With ``targets:
    [N]`` the logits of the targets are picked up on the way, ``target_logits: [N * S]``; minus infinity where the
    vocabulary given does not hold the target.
    """

    def __init__(
        self,
        weight: Tensor,
        hidden: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        dtype: torch.dtype,
        targets: Tensor | None,
        logsumexp: Tensor | None,
    ) -> None:
        self.weight, self.hidden, self.bias, self.softcap, self.dtype = weight, hidden, bias, softcap, dtype
        self.vocabulary = weight.shape[0]
        self.samples = hidden.shape[1]
        self.rows = hidden.shape[0] * self.samples
        self.logsumexp = hidden.new_full((self.rows,), -math.inf, dtype=torch.float64)
        if logsumexp is not None:
            self.logsumexp.copy_(logsumexp.reshape(-1))
        self._targets = None if targets is None else targets.to(torch.int64).repeat_interleave(self.samples)
        self.target_logits = hidden.new_full((0 if targets is None else self.rows,), -math.inf, dtype=dtype)

    def strips(self, rows: int) -> Iterator[Piece]:
        """One pass; at most ``rows`` rows, times the vocabulary, are in scratch."""
        if self.vocabulary == 0:
            return
        rows = self._even(rows)
        tokens = self._tokens(rows, rows * self.vocabulary)
        scratch = self.hidden.new_empty(rows * self.vocabulary, dtype=self.dtype)
        for row in range(0, self.rows, rows):
            last = min(row + rows, self.rows)
            maxima, sums, kept = [], [], []
            for token in range(0, self.vocabulary, tokens):
                end = min(token + tokens, self.vocabulary)
                values = scratch[(last - row) * token : (last - row) * end].view(last - row, end - token)
                maximum, total = self._exponentials(values, row, token)
                maxima.append(maximum)
                sums.append(total)
                kept.append((token, values))
            shifts = torch.stack(maxima, dim=1).double()
            logsumexp = torch.logsumexp(shifts + torch.stack(sums, dim=1).double().log(), dim=1)
            self.logsumexp[row:last] = logsumexp
            scales = torch.exp(shifts - logsumexp[:, None]).to(self.dtype)
            for i, (token, values) in enumerate(kept):
                yield Piece(row, token, values, scales[:, i])

    def first_pass(self, rows: int, elements: int) -> None:
        """The log-sum-exps of all rows, from pieces of at most ``rows`` rows and about ``elements`` elements."""
        for row, token, values in self._cut(rows, elements):
            maximum, total = self._exponentials(values, row, token)
            so_far = self.logsumexp[row : row + len(values)]
            torch.logaddexp(so_far, maximum.double() + total.double().log(), out=so_far)

    def second_pass(self, rows: int, elements: int) -> Iterator[Piece]:
        """Pieces likewise, from known log-sum-exps. After a first pass of other pieces logits may be rounded otherwise:
        that shows where it is large.
        """
        shift = self.logsumexp.to(self.dtype)
        scale = torch.exp(shift.double() - self.logsumexp).to(self.dtype)
        for row, token, values in self._cut(rows, elements):
            some = slice(row, row + len(values))
            self._logits(values, row, token)
            yield Piece(row, token, values.sub_(shift[some, None]).exp_(), scale[some])

    def _cut(self, rows: int, elements: int) -> Iterator[tuple[int, int, Tensor]]:
        """First row, first token and memory of every piece; the rows go faster, so that a part of the weight is read
        once.
        """
        rows = self._even(rows)
        tokens = self._tokens(rows, elements)
        scratch = self.hidden.new_empty(rows * tokens, dtype=self.dtype)
        for token in range(0, self.vocabulary, tokens):
            width = min(tokens, self.vocabulary - token)
            for row in range(0, self.rows, rows):
                height = min(rows, self.rows - row)
                yield row, token, scratch[: height * width].view(height, width)

    def _even(self, most: int) -> int:
        """Rows of parts, none larger than ``most``, that cut all rows most evenly; whole examples if ``most`` is."""
        most = max(1, most)
        unit = self.samples if most % self.samples == 0 else 1
        parts = -(-self.rows // most)
        return -(-self.rows // (max(1, parts) * unit)) * unit or unit

    def _tokens(self, rows: int, elements: int) -> int:
        """Tokens of a piece: as the caches like it, but no more elements than allowed."""
        wanted = max(PIECE // max(1, rows), _TOKENS)
        return max(1, min(wanted, elements // max(1, rows), max(1, self.vocabulary)))

    def _logits(self, out: Tensor, row: int, token: int) -> None:
        """Write the logits of the rows from ``row`` and the tokens from ``token``; pick up those of the targets."""
        last = row + out.shape[0]
        first, end = row // self.samples, (last - 1) // self.samples + 1
        some = self.hidden[first:end].reshape((end - first) * self.samples, self.hidden.shape[2])
        some = some[row - first * self.samples : last - first * self.samples].to(out.dtype)
        tokens = slice(token, token + out.shape[1])
        bias = None if self.bias is None else self.bias[tokens]
        for part, weight in converted(self.weight[tokens], out.dtype, _CONVERTED // max(1, self.weight.shape[1])):
            if bias is None:
                torch.mm(some, weight.T, out=out[:, part])
            else:
                torch.addmm(bias[part].to(out.dtype), some, weight.T, out=out[:, part])
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
            if bias is not None:
                out.masked_fill_(bias == -math.inf, -math.inf)
        if self._targets is not None:
            rows = slice(row, last)
            place = self._targets[rows] - token
            found = out.gather(1, place.clamp(0, out.shape[1] - 1)[:, None])[:, 0]
            inside = (place >= 0) & (place < out.shape[1])
            self.target_logits[rows] = torch.where(inside, found, self.target_logits[rows])

    def _exponentials(self, out: Tensor, row: int, token: int) -> tuple[Tensor, Tensor]:
        """Write ``exp(logit - maximum)``; return the maximum and the sum of every row."""
        self._logits(out, row, token)
        maximum = out.amax(1)
        # Where every token is excluded the maximum is minus infinity, and its difference from itself is no number.
        shift = torch.where(maximum == -math.inf, 0, maximum)
        out.sub_(shift[:, None]).exp_()
        return maximum, out.sum(1)


def converted(weight: Tensor, dtype: torch.dtype, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of ``weight: [V, d]`` in a dtype: all at once if they have it, else so many at a time; and which they
    are.
    """
    step = max(1, len(weight) if weight.dtype == dtype else rows)
    for start in range(0, len(weight), step):
        some = slice(start, start + step)
        yield some, weight[some].to(dtype)


def whole_examples(samples: int, rows: int) -> int:
    """The largest number of rows, a multiple of ``samples`` and at least one, within ``rows`` where possible."""
    return max(1, rows // samples) * samples


def piece_rows(samples: int) -> int:
    """Rows of a piece in two passes: examples as a whole, about as many as a matrix product likes."""
    return whole_examples(samples, _ROWS)
