"""Launches the kernels of `kernel.py` and `kernel_scratch.py`, as `kernel_variants.py` says.

One pass where the products of enough columns fit into the scratch: some examples at a time, `exponentials_kernel` with
`STORE`, merge, reduce. Otherwise two: the log-sum-exps of all, then `means_kernel` for the probabilities, while the
statistics, which need all samples of a token at once, store the products of a range of tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from ..device import on_device
from ..tuning import autotuning, choose_configuration
from . import kernel, kernel_scratch
from .kernel_variants import (
    Variant,
    configurations,
    statistics_scratch,
    strip,
    vocabulary_logsumexp_variants,
    vocabulary_probs_variants,
    vocabulary_statistics_variants,
    vocabulary_variance_variants,
)

# Columns that share one reading of the weight from memory.
_SHARING = 2048
# Memory of the tiles' maxima and sums in a first pass.
_PARTIAL_BYTES = 32 << 20
# Tokens and samples at a time in `kernel_scratch.py`, tiles and columns in `merge_kernel`.
SCRATCH_TILE = (64, 64)
_MERGE_TILE = (128, 16)


@dataclass(frozen=True)
class _Problem:
    """Operands as the kernels take them: ``columns: [planes, N, S, d]`` contiguous, ``bias: [N, V]`` float32."""

    variant: Variant
    weight: Tensor
    columns: Tensor
    bias: Tensor | None
    softcap: float | None

    @property
    def tokens(self) -> int:
        return self.weight.shape[0]

    @property
    def examples(self) -> int:
        return self.columns.shape[1]

    @property
    def samples(self) -> int:
        """As many as there are columns; mirror images are others."""
        return self.columns.shape[2]

    @property
    def signs(self) -> int:
        return 1 + self.variant.mirrored

    @property
    def row(self) -> int:
        """Columns of all tiles."""
        block = self.variant.configuration.block_c
        return int(triton.cdiv(self.examples * self.variant.padded, block) * block)

    def token_tiles(self, tokens: int) -> int:
        return int(triton.cdiv(tokens, self.variant.configuration.block_v))

    def example_tiles(self) -> int:
        return int(triton.cdiv(self.examples, max(1, self.variant.configuration.block_c // self.variant.padded)))

    def parts(self, examples: int) -> Iterator[tuple[slice, _Problem]]:
        """The examples, at most so many at a time, as evenly as can be."""
        count = triton.cdiv(self.examples, max(1, examples))
        step = triton.cdiv(self.examples, count)
        if count == 1:
            yield slice(0, self.examples), self
            return
        for first in range(0, self.examples, step):
            some = slice(first, min(first + step, self.examples))
            # The planes of some examples are apart.
            columns = self.columns[:, some].contiguous()
            yield some, replace(self, columns=columns, bias=None if self.bias is None else self.bias[some])

    def product(self) -> dict[str, object]:
        """Arguments that all kernels with a product share."""
        variant, chosen = self.variant, self.variant.configuration
        return {
            "weight_ptr": self.weight,
            "columns_ptr": self.columns,
            "examples": self.examples,
            "samples": self.samples,
            "width": self.weight.shape[1],
            "stride_wv": self.weight.stride(0),
            "stride_wd": self.weight.stride(1),
            "PADDED": variant.padded,
            "PLANES": variant.planes,
            "WIDEN": variant.weight != variant.columns,
            "EVEN": variant.even,
            "PRECISION": "tf32x3" if variant.columns == torch.float32 else "ieee",
            "BV": chosen.block_v,
            "BC": chosen.block_c,
            "BK": chosen.block_k,
            "GROUP": max(1, _SHARING // chosen.block_c),
            "num_warps": chosen.num_warps,
            "num_stages": chosen.num_stages,
            "enable_fp_fusion": True,
        }

    def head(self) -> dict[str, object]:
        """Arguments of the kernels that make logits."""
        return {
            "bias_ptr": self.weight if self.bias is None else self.bias,
            "stride_b": 0 if self.bias is None else self.bias.stride(0),
            "softcap": 1.0 if self.softcap is None else self.softcap,
            "HAS_BIAS": self.variant.bias,
            "SOFTCAP": self.variant.softcap,
            "SIGNS": self.signs,
        }


def vocabulary_logsumexp(
    out: Tensor, weight: Tensor, hidden: Tensor, bias: Tensor | None, softcap: float | None, mirrored: bool
) -> None:
    """As in reference.py."""
    if out.numel() == 0 or weight.shape[0] == 0:
        out.fill_(-math.inf)
        return
    (variant,) = vocabulary_logsumexp_variants(out, weight, hidden, bias, softcap, mirrored)
    with on_device(hidden):
        _first_pass(out, _problem(variant, weight, hidden, bias, softcap))


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
    """As in reference.py."""
    if out.numel() == 0:
        return
    (variant,) = vocabulary_probs_variants(
        out, weight, hidden, bias, softcap, mirrored, logsumexp, scratch_bytes
    )  # fmt: skip
    with on_device(hidden):
        problem = _problem(variant, weight, hidden, bias, softcap)
        if variant.passes == "one pass":
            for some, part in problem.parts(strip(problem.variant, len(weight), len(hidden), scratch_bytes)):
                _stored_means(out[some], part, *_stored_strip(part))
            return
        lse = _logsumexps(problem)
        if logsumexp is None:
            _first_pass(lse, problem)
        else:
            lse.copy_(logsumexp)
        grid = (problem.token_tiles(problem.tokens) * problem.example_tiles(),)
        kernel.means_kernel[grid](
            out_ptr=out, logsumexp_ptr=lse, tokens=problem.tokens, stride_o=out.stride(0), **problem.head(),
            **problem.product(),
        )  # fmt: skip


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
    """As in reference.py; float32 scratch, at least 16 MiB of it."""
    if hidden.shape[0] == 0:
        return
    totals = entropy.new_zeros((2, entropy.shape[0]), dtype=torch.float64)
    lse = hidden.new_full((len(hidden), (1 + mirrored) * hidden.shape[1]), -math.inf, dtype=torch.float64)
    if logsumexp is not None:
        lse.copy_(logsumexp)
    if weight.shape[0]:
        (variant,) = vocabulary_statistics_variants(
            entropy, mutual_information, target_log_prob, weight, hidden, bias, softcap, mirrored, targets, logsumexp,
            scratch_bytes,
        )  # fmt: skip
        scratch_bytes = statistics_scratch(scratch_bytes)
        with on_device(hidden):
            problem = _problem(variant, weight, hidden, bias, softcap)
            if variant.passes == "one pass":
                for some, part in problem.parts(strip(problem.variant, len(weight), len(hidden), scratch_bytes)):
                    stored, lse[some] = _stored_strip(part)
                    totals[:, some] += _stored_statistics(part, stored, lse[some], 0, part.tokens)
            else:
                if logsumexp is None:
                    _first_pass(lse, problem)
                _statistics_by_range(totals, problem, lse, scratch_bytes)
    entropy.copy_(totals[0].clamp_min_(0))
    mutual_information.copy_(totals[1].clamp_min_(0))
    if targets is not None:
        logits = _target_logits(weight, hidden, bias, softcap, mirrored, targets)
        log_probs = torch.logsumexp(logits.double() - lse, dim=1) - math.log(lse.shape[1])
        target_log_prob.copy_(log_probs.clamp_max_(0))


def vocabulary_variance(out: Tensor, weight: Tensor, factor: Tensor) -> None:
    """As in reference.py."""
    if out.numel() == 0:
        return
    if factor.shape[2] == 0:
        out.zero_()
        return
    (variant,) = vocabulary_variance_variants(out, weight, factor)
    with on_device(factor):
        problem = _problem(variant, weight, factor.mT, None, None)
        grid = (problem.token_tiles(problem.tokens) * problem.example_tiles(),)
        kernel.squares_kernel[grid](out_ptr=out, tokens=problem.tokens, stride_o=out.stride(0), **problem.product())


def split_planes(x: Tensor) -> Tensor:
    """``[3, ...]`` bfloat16 whose sum is the float32 ``x`` to its last bit, but for the smallest numbers."""
    high = x.bfloat16()
    rest = x - high.float()
    middle = rest.bfloat16()
    return torch.stack([high, middle, (rest - middle.float()).bfloat16()])


def _problem(variant: Variant, weight: Tensor, columns: Tensor, bias: Tensor | None, softcap: float | None) -> _Problem:
    """Operands as a variant takes them; columns are small beside the weight, and copied if need be."""
    planes = split_planes(columns.float()) if variant.planes > 1 else columns.to(variant.columns)[None]
    if bias is not None:
        bias = bias.float()
        bias = (bias if bias.stride(-1) == 1 else bias.contiguous()).expand(columns.shape[0], -1)
    problem = _Problem(variant, weight, planes.contiguous(), bias, softcap)
    return _tuned(problem) if autotuning() else problem


def _tuned(problem: _Problem) -> _Problem:
    """In the fastest configuration."""
    variant, examples, samples = problem.variant, problem.examples, problem.samples
    tokens, width = problem.weight.shape
    candidates = [variant.configured(one, samples, width) for one in configurations(variant, problem.weight.device)]
    candidates.sort(key=lambda one: one != variant)  # the first is known to be good
    key = ("vocabulary", str(variant), tokens, width, examples, samples)
    scratch = _logsumexps(problem)
    chosen = choose_configuration(key, candidates, lambda one: _first_pass(scratch, replace(problem, variant=one)))
    return replace(problem, variant=chosen)


def _logsumexps(problem: _Problem) -> Tensor:
    shape = (problem.examples, problem.signs * problem.samples)
    return problem.columns.new_empty(shape, dtype=torch.float64)


def _target_logits(
    weight: Tensor, hidden: Tensor, bias: Tensor | None, softcap: float | None, mirrored: bool, targets: Tensor
) -> Tensor:
    """Logits ``[N, k S]`` of one token per example; minus infinity where the vocabulary given does not hold it."""
    if not len(weight):
        return hidden.new_full((len(hidden), (1 + mirrored) * hidden.shape[1]), -math.inf, dtype=torch.float32)
    inside = (targets >= 0) & (targets < len(weight))
    place = targets.clamp(0, len(weight) - 1).long()
    # No matrix product, which PyTorch may be told to compute in TF32.
    products = (hidden.float() * weight[place].float()[:, None]).sum(2)
    logits = torch.cat([products, -products], dim=1) if mirrored else products
    if bias is not None:
        offset = bias.expand(len(hidden), -1).gather(1, place[:, None]).float()
        logits += offset
        inside = inside & (offset[:, 0] != -math.inf)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.where(inside[:, None], logits, -math.inf)


def _scratch(problem: _Problem, tokens: int) -> Tensor:
    rows = problem.token_tiles(tokens) * problem.variant.configuration.block_v
    return torch.empty((rows, problem.row), dtype=torch.float32, device=problem.weight.device)


def _exponentials(problem: _Problem, tokens: tuple[int, int], stored: Tensor | None, sums: bool) -> Tensor:
    """Maxima and sums, ``[2, token tiles, signs, columns]``, of a range of tokens, if they are wanted."""
    tiles = problem.token_tiles(tokens[1] - tokens[0])
    shape = (2, tiles if sums else 0, problem.signs, problem.row)
    partial = torch.empty(shape, dtype=torch.float32, device=problem.weight.device)
    kernel.exponentials_kernel[(tiles * (problem.row // problem.variant.configuration.block_c),)](
        maxima_ptr=partial[0], sums_ptr=partial[1], stored_ptr=partial if stored is None else stored,
        first_token=tokens[0], end_token=tokens[1], SUMS=sums, STORE=stored is not None, **problem.head(),
        **problem.product(),
    )  # fmt: skip
    return partial


def _merge(out: Tensor, problem: _Problem, partial: Tensor) -> None:
    tiles, columns = _MERGE_TILE
    kernel.merge_kernel[(triton.cdiv(problem.signs * problem.row, columns),)](
        out, partial[0], partial[1], partial.shape[1], problem.row, problem.examples, problem.samples,
        SIGNS=problem.signs, PADDED=problem.variant.padded, BT=tiles, BC=columns, num_warps=4, num_stages=2,
        enable_fp_fusion=True,
    )  # fmt: skip


def _first_pass(out: Tensor, problem: _Problem) -> None:
    """Log-sum-exps of all samples to ``out: [N, k S]`` float64, contiguous."""
    variant = problem.variant
    per_example = 8 * problem.token_tiles(problem.tokens) * problem.signs * variant.padded
    together = max(variant.configuration.block_c // variant.padded, _PARTIAL_BYTES // per_example)
    for some, part in problem.parts(together):
        _merge(out[some], part, _exponentials(part, (0, part.tokens), None, True))


def _stored_strip(problem: _Problem) -> tuple[Tensor, Tensor]:
    """The products, and the log-sum-exps ``[N, k S]``."""
    stored, lse = _scratch(problem, problem.tokens), _logsumexps(problem)
    _merge(lse, problem, _exponentials(problem, (0, problem.tokens), stored, True))
    return stored, lse


def _of_stored(problem: _Problem, stored: Tensor, lse: Tensor, first: int, last: int) -> dict[str, object]:
    """Arguments of the kernels that read the products of a range of tokens."""
    block, samples = SCRATCH_TILE
    names = {"stored_ptr": stored, "logsumexp_ptr": lse, "first_token": first, "end_token": last, "row": problem.row}
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    tile = {"samples": problem.samples, "PADDED": problem.variant.padded, "BV": block, "BS": samples}
    return names | tile | problem.head() | options


def _stored_means(out: Tensor, problem: _Problem, stored: Tensor, lse: Tensor) -> None:
    grid = (triton.cdiv(problem.tokens, SCRATCH_TILE[0]) * problem.examples,)
    arguments = _of_stored(problem, stored, lse, 0, problem.tokens)
    kernel_scratch.stored_means_kernel[grid](out_ptr=out, stride_o=out.stride(0), **arguments)


def _stored_statistics(problem: _Problem, stored: Tensor, lse: Tensor, first: int, last: int) -> Tensor:
    """Terms of the entropy and of the mutual information, ``[2, N]`` float64."""
    blocks = triton.cdiv(last - first, SCRATCH_TILE[0])
    terms = torch.empty((2, problem.examples, blocks), dtype=torch.float32, device=stored.device)
    kernel_scratch.stored_statistics_kernel[(blocks * problem.examples,)](
        entropy_ptr=terms[0], information_ptr=terms[1], **_of_stored(problem, stored, lse, first, last)
    )
    return terms.sum(2, dtype=torch.float64)


def _statistics_by_range(totals: Tensor, problem: _Problem, lse: Tensor, scratch_bytes: int) -> None:
    """Adds to ``totals: [2, N]``, from known log-sum-exps, a range of tokens at a time."""
    block = problem.variant.configuration.block_v
    together = scratch_bytes // (8 * block * problem.variant.padded * 4)
    together = max(together, problem.variant.configuration.block_c // problem.variant.padded)
    for some, part in problem.parts(together):
        step = max(1, scratch_bytes // (part.row * 4 * block)) * block
        for first in range(0, part.tokens, step):
            last = min(first + step, part.tokens)
            stored = _scratch(part, last - first)
            _exponentials(part, (first, last), stored, False)
            totals[:, some] += _stored_statistics(part, stored, lse[some], first, last)
