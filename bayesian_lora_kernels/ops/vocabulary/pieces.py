"""Probabilities of samples over a whole vocabulary, piece by piece, in bounded memory: what the references loop over.

A *row* is one sample of one example; with mirror images it has logits of both signs, from one product. The logits of
all rows never exist at once. They are made in pieces, some rows and some tokens at a time, and there are two ways to
their probabilities:

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
# Tokens of a piece, at least, and logits' rows of a piece in two passes, about: a narrower matrix product is slower.
_TOKENS = 512
_ROWS = 512
# Elements of a weight in another dtype that are converted at a time.
_CONVERTED = 1 << 19


@dataclass(frozen=True)
class Piece:
    """``probability = values * scale`` of the rows from ``row`` and the tokens from ``token``.

    ``values: [k, r, v]``, free to be overwritten, ``scale: [k, r]``; k is 2 with mirror images, else 1.
    """

    row: int
    token: int
    values: Tensor
    scale: Tensor


class Pieces:
    """The pieces of ``hidden: [N, S, d]``.

    Logits are ``z = bias + weight h``, ``mirrored`` also ``bias - weight h``, then ``softcap * tanh(z / softcap)``;
    where the bias is minus infinity so is the logit.

    ``logsumexp: [k, N * S]`` is float64: float32 would lose 1e-3 of every probability where it is 1e4. With ``targets:
    [N]`` the logits of the targets are picked up on the way, ``target_logits: [k, N * S]``; minus infinity where the
    vocabulary given does not hold the target.
    """

    def __init__(
        self,
        weight: Tensor,
        hidden: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        mirrored: bool,
        dtype: torch.dtype,
        targets: Tensor | None = None,
        logsumexp: Tensor | None = None,
    ) -> None:
        self.weight, self.hidden, self.softcap, self.dtype = weight, hidden, softcap, dtype
        self.vocabulary = weight.shape[0]
        self.samples = hidden.shape[1]
        self.rows = hidden.shape[0] * self.samples
        self.signs = 2 if mirrored else 1
        self.logsumexp = hidden.new_full((self.signs, self.rows), -math.inf, dtype=torch.float64)
        if logsumexp is not None:
            self.of_examples(self.logsumexp).copy_(logsumexp.unflatten(1, (self.signs, -1)))
        self._bias = None if bias is None else bias.expand(hidden.shape[0], self.vocabulary)
        self._targets = None if targets is None else targets.to(torch.int64).repeat_interleave(self.samples)
        self.target_logits = hidden.new_full(self.logsumexp.shape, -math.inf, dtype=dtype)

    def of_examples(self, values: Tensor) -> Tensor:
        """``[N, k, S]`` of ``values: [k, N * S]``."""
        return values.view(self.signs, -1, self.samples).transpose(0, 1)

    def examples(self, row: int, rows: int) -> Iterator[tuple[slice, slice]]:
        """The examples to which so many rows from ``row`` belong, each with the same number of rows; and which of
        these rows: all at once if they are whole, else one by one.
        """
        first, last = row // self.samples, -(-(row + rows) // self.samples)
        step = last - first if row % self.samples == rows % self.samples == 0 else 1
        for example in range(first, last, max(step, 1)):
            end = min((example + step) * self.samples - row, rows)
            yield slice(example, example + step), slice(max(example * self.samples - row, 0), end)

    def strips(self, rows: int) -> Iterator[Piece]:
        """One pass; at most ``rows`` rows, times the vocabulary, are in scratch."""
        if self.vocabulary == 0:
            return
        rows = self._even(rows)
        tokens = self._tokens(rows, self.signs * rows * self.vocabulary)
        scratch = self.hidden.new_empty(self.signs * rows * self.vocabulary, dtype=self.dtype)
        for row in range(0, self.rows, rows):
            last = min(row + rows, self.rows)
            height = self.signs * (last - row)
            maxima, sums, kept = [], [], []
            for token in range(0, self.vocabulary, tokens):
                end = min(token + tokens, self.vocabulary)
                values = scratch[height * token : height * end].view(self.signs, last - row, end - token)
                maximum, total = self._exponentials(values, row, token)
                maxima.append(maximum)
                sums.append(total)
                kept.append((token, values))
            shifts = torch.stack(maxima, dim=2).double()
            logsumexp = torch.logsumexp(shifts + torch.stack(sums, dim=2).double().log(), dim=2)
            self.logsumexp[:, row:last] = logsumexp
            scales = torch.exp(shifts - logsumexp[:, :, None]).to(self.dtype)
            for i, (token, values) in enumerate(kept):
                yield Piece(row, token, values, scales[:, :, i])

    def first_pass(self, rows: int, elements: int) -> None:
        """The log-sum-exps of all rows, from pieces of at most ``rows`` rows and about ``elements`` elements."""
        for row, token, values in self._cut(rows, elements):
            maximum, total = self._exponentials(values, row, token)
            some = slice(row, row + values.shape[1])
            found = maximum.double() + total.double().log()
            self.logsumexp[:, some] = torch.logaddexp(self.logsumexp[:, some], found)

    def second_pass(self, rows: int, elements: int) -> Iterator[Piece]:
        """Pieces likewise, from known log-sum-exps. After a first pass of other pieces logits may be rounded otherwise:
        that shows where it is large.
        """
        shift = self.logsumexp.to(self.dtype)
        scale = torch.exp(shift.double() - self.logsumexp).to(self.dtype)
        for row, token, values in self._cut(rows, elements):
            some = slice(row, row + values.shape[1])
            self._logits(values, row, token)
            yield Piece(row, token, values.sub_(shift[:, some, None]).exp_(), scale[:, some])

    def _cut(self, rows: int, elements: int) -> Iterator[tuple[int, int, Tensor]]:
        """First row, first token and memory of every piece; the rows go faster, so that a part of the weight is read
        once.
        """
        rows = self._even(rows)
        tokens = self._tokens(rows, elements)
        scratch = self.hidden.new_empty(self.signs * rows * tokens, dtype=self.dtype)
        for token in range(0, self.vocabulary, tokens):
            width = min(tokens, self.vocabulary - token)
            for row in range(0, self.rows, rows):
                height = min(rows, self.rows - row)
                yield row, token, scratch[: self.signs * height * width].view(self.signs, height, width)

    def _even(self, most: int) -> int:
        """Rows of parts, none larger than ``most``, that cut all rows most evenly; whole examples if ``most`` is."""
        most = max(1, most)
        unit = self.samples if most % self.samples == 0 else 1
        parts = -(-self.rows // most)
        return -(-self.rows // (max(1, parts) * unit)) * unit or unit

    def _tokens(self, rows: int, elements: int) -> int:
        """Tokens of a piece: as the caches like it, but no more elements than allowed."""
        rows = max(1, self.signs * rows)
        wanted = max(PIECE // rows, _TOKENS)
        return max(1, min(wanted, elements // rows, max(1, self.vocabulary)))

    def _logits(self, out: Tensor, row: int, token: int) -> None:
        """Write the logits of the rows from ``row`` and the tokens from ``token``; pick up those of the targets."""
        rows, width = out.shape[1:]
        last, tokens = row + rows, slice(token, token + width)
        first, end = row // self.samples, (last - 1) // self.samples + 1
        some = self.hidden[first:end].reshape((end - first) * self.samples, self.hidden.shape[2])
        some = some[row - first * self.samples : last - first * self.samples].to(out.dtype)
        for part, weight in converted(self.weight[tokens], out.dtype, _CONVERTED // max(1, self.weight.shape[1])):
            torch.mm(some, weight.T, out=out[0, :, part])
        if self._bias is None:
            for images in out[1:]:
                torch.neg(out[0], out=images)
        else:
            for examples, which in self.examples(row, rows):
                bias = self._bias[examples, None, tokens].to(out.dtype)
                by_example = out[:, which].unflatten(1, (len(bias), -1))
                for images in by_example[1:]:
                    torch.sub(bias, by_example[0], out=images)
                by_example[0] += bias
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
            if self._bias is not None:
                for examples, which in self.examples(row, rows):
                    excluded = self._bias[examples, None, tokens] == -math.inf
                    out[:, which].unflatten(1, (len(excluded), -1)).masked_fill_(excluded, -math.inf)
        if self._targets is not None:
            place = self._targets[row:last] - token
            inside = (place >= 0) & (place < width)
            index = place.clamp(0, width - 1).expand(len(out), rows)[:, :, None]
            self.target_logits[:, row:last].copy_(
                torch.where(inside, out.gather(2, index)[:, :, 0], self.target_logits[:, row:last])
            )

    def _exponentials(self, out: Tensor, row: int, token: int) -> tuple[Tensor, Tensor]:
        """Write ``exp(logit - maximum)``; return the maximum and the sum of every row, ``[k, r]``."""
        self._logits(out, row, token)
        maximum = out.amax(2)
        # Where every token is excluded the maximum is minus infinity, and its difference from itself is no number.
        shift = torch.where(maximum == -math.inf, 0, maximum)
        out.sub_(shift[:, :, None]).exp_()
        return maximum, out.sum(2)


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


def piece_rows(samples: int, signs: int) -> int:
    """Rows of a piece in two passes: examples as a whole, about as many as a matrix product likes."""
    return whole_examples(samples, _ROWS // signs)
