"""Launches the kernels of `kernel.py` and `kernel_scratch.py`, compiled as `kernel_variants.py` says.

Products go to bounded scratch and are reduced there, twice: to log-sum-exps, then to what is asked for. They are
computed once where those of enough columns fit, all tokens of some examples at a time; else twice, a range of tokens
of all examples at a time. The variance needs none of that: one kernel multiplies and adds up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from ..device import SCRATCH_BYTES, on_device
from ..tuning import choose_configuration
from . import kernel, kernel_scratch
from .kernel_variants import (
    Configuration,
    Variant,
    configurations,
    vocabulary_logsumexp_variants,
    vocabulary_probs_variants,
    vocabulary_statistics_variants,
    vocabulary_variance_variants,
)

# Columns that share one reading of the weight from memory.
_SHARING = 2048
# With the products of fewer columns in scratch, reading the weight for each takes longer than computing them twice.
_STRIP_COLUMNS = 256
# The least scratch: products that a GPU computes at a time.
_LEAST_BYTES = 16 << 20


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

    @property
    def tile(self) -> tuple[int, int]:
        """Tokens and samples at a time in `kernel_scratch.py`."""
        return (128, 32) if self.variant.padded <= 32 else (64, 64)

    def token_tiles(self, tokens: int) -> int:
        return int(triton.cdiv(tokens, self.variant.configuration.block_v))

    def parts(self, examples: int) -> Iterator[tuple[slice, _Problem]]:
        """The examples, at most so many at a time, as evenly as can be."""
        count = triton.cdiv(self.examples, max(1, examples))
        step = triton.cdiv(self.examples, count)
        for first in range(0, self.examples, step):
            some = slice(first, min(first + step, self.examples))
            bias = None if self.bias is None else self.bias[some]
            yield some, replace(self, columns=self.columns[:, some].contiguous(), bias=bias)

    def product(self) -> dict[str, object]:
        """Arguments of the kernels with a product."""
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

    def stored(self, products: Tensor, tokens: range) -> dict[str, object]:
        """Arguments of the kernels that read the products of a range of tokens."""
        block, samples = self.tile
        return {
            "stored_ptr": products,
            "bias_ptr": products if self.bias is None else self.bias,
            "softcap": 1.0 if self.softcap is None else self.softcap,
            "first_token": tokens.start,
            "end_token": tokens.stop,
            "samples": self.samples,
            "row": self.row,
            "stride_b": 0 if self.bias is None else self.bias.stride(0),
            "HAS_BIAS": self.variant.bias,
            "SOFTCAP": self.variant.softcap,
            "SIGNS": self.signs,
            "PADDED": self.variant.padded,
            "BV": block,
            "BS": samples,
            "num_warps": 8,
            "maxnreg": 128,  # else the assembler spills a few to fit one more block
            "num_stages": 2,
            "enable_fp_fusion": True,
        }


# What reads the products of a range of tokens of some examples: their problem, which they are, products, range,
# log-sum-exps.
_Reduce = Callable[[_Problem, slice, Tensor, range, Tensor], None]


def vocabulary_logsumexp(
    out: Tensor, weight: Tensor, hidden: Tensor, bias: Tensor | None, softcap: float | None, mirrored: bool
) -> None:
    """As in reference.py."""
    if out.numel() == 0 or weight.shape[0] == 0:
        out.fill_(-math.inf)
        return
    (variant,) = vocabulary_logsumexp_variants(out, weight, hidden, bias, softcap, mirrored)
    with on_device(hidden):
        _through_scratch(_problem(variant, weight, hidden, bias, softcap), out, None, None)


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

    def reduce(part: _Problem, some: slice, products: Tensor, tokens: range, lse: Tensor) -> None:
        grid = (triton.cdiv(len(tokens), part.tile[0]) * part.examples,)
        kernel_scratch.means_kernel[grid](
            out_ptr=out[some], logsumexp_ptr=lse, stride_o=out.stride(0), **part.stored(products, tokens)
        )

    (variant,) = vocabulary_probs_variants(
        out, weight, hidden, bias, softcap, mirrored, logsumexp, scratch_bytes
    )  # fmt: skip
    lse = _logsumexps(hidden, mirrored, logsumexp)
    with on_device(hidden):
        _through_scratch(_problem(variant, weight, hidden, bias, softcap), lse, reduce, scratch_bytes)


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
    """As in reference.py."""
    if hidden.shape[0] == 0:
        return
    totals = entropy.new_zeros((2, entropy.shape[0]), dtype=torch.float64)

    def reduce(part: _Problem, some: slice, products: Tensor, tokens: range, lse: Tensor) -> None:
        blocks = triton.cdiv(len(tokens), part.tile[0])
        terms = lse.new_empty((2, part.examples, blocks), dtype=torch.float32)
        kernel_scratch.statistics_kernel[(blocks * part.examples,)](
            entropy_ptr=terms[0], information_ptr=terms[1], logsumexp_ptr=lse, **part.stored(products, tokens)
        )
        totals[:, some] += terms.sum(2, dtype=torch.float64)

    lse = _logsumexps(hidden, mirrored, logsumexp)
    if weight.shape[0]:
        (variant,) = vocabulary_statistics_variants(
            entropy, mutual_information, target_log_prob, weight, hidden, bias, softcap, mirrored, targets, logsumexp,
            scratch_bytes,
        )  # fmt: skip
        with on_device(hidden):
            _through_scratch(_problem(variant, weight, hidden, bias, softcap), lse, reduce, scratch_bytes)
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
        tiles = triton.cdiv(problem.examples, max(1, problem.variant.configuration.block_c // problem.variant.padded))
        kernel.squares_kernel[(problem.token_tiles(problem.tokens) * tiles,)](
            out_ptr=out, tokens=problem.tokens, stride_o=out.stride(0), **problem.product()
        )


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
    examples, samples, width = columns.shape
    first = variant.configuration  # known to be good
    candidates = (first, *(one for one in configurations(variant, weight.device) if one != first))
    some = range(min(problem.tokens, _LEAST_BYTES // (4 * problem.row)))

    def configured(one: Configuration) -> _Problem:
        return replace(problem, variant=variant.configured(one, samples, width))

    def run(one: Configuration) -> None:
        _product(configured(one), some)

    chosen = choose_configuration(("vocabulary", variant, problem.tokens, width, examples, samples), candidates, run)
    return problem if chosen == first else configured(chosen)


def _logsumexps(hidden: Tensor, mirrored: bool, known: Tensor | None) -> Tensor:
    """``[N, k S]`` float64, contiguous."""
    shape = (hidden.shape[0], (1 + mirrored) * hidden.shape[1])
    result = hidden.new_full(shape, -math.inf, dtype=torch.float64)
    return result if known is None else result.copy_(known)


def _target_logits(
    weight: Tensor, hidden: Tensor, bias: Tensor | None, softcap: float | None, mirrored: bool, targets: Tensor
) -> Tensor:
    """Logits ``[N, k S]`` of one token per example; minus infinity where the vocabulary given does not hold it."""
    if not len(weight):
        return _logsumexps(hidden, mirrored, None)
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


def _product(problem: _Problem, tokens: range) -> Tensor:
    """``[tokens and more, row]``, all columns of a range of tokens."""
    chosen, tiles = problem.variant.configuration, problem.token_tiles(len(tokens))
    out = torch.empty((tiles * chosen.block_v, problem.row), dtype=torch.float32, device=problem.weight.device)
    kernel.product_kernel[(tiles * (problem.row // chosen.block_c),)](
        out_ptr=out, first_token=tokens.start, end_token=tokens.stop, **problem.product()
    )
    return out


def _sums(problem: _Problem, products: Tensor, tokens: range) -> Tensor:
    """Maxima of blocks of logits and sums of their exponentials, ``[2, blocks, k, row]``."""
    blocks = triton.cdiv(len(tokens), problem.tile[0])
    out = products.new_empty((2, blocks, problem.signs, problem.row))
    kernel_scratch.sums_kernel[(blocks * problem.examples,)](
        maxima_ptr=out[0], sums_ptr=out[1], **problem.stored(products, tokens)
    )
    return out


def _merge(out: Tensor, problem: _Problem, sums: Tensor) -> None:
    """Log-sum-exps of all samples to ``out: [N, k S]`` float64, contiguous."""
    kernel_scratch.merge_kernel[(triton.cdiv(problem.signs * problem.row, 16),)](
        out, sums[0], sums[1], sums.shape[1], problem.examples, problem.samples, problem.row,
        SIGNS=problem.signs, PADDED=problem.variant.padded, BT=64, BC=16, num_warps=4, num_stages=2,
        enable_fp_fusion=True,
    )  # fmt: skip


def _through_scratch(problem: _Problem, lse: Tensor, reduce: _Reduce | None, scratch_bytes: int | None) -> None:
    """Log-sum-exps to ``lse: [N, k S]``, unless they are known, and then what ``reduce`` does."""
    scratch_bytes = SCRATCH_BYTES if scratch_bytes is None else max(scratch_bytes, _LEAST_BYTES)
    if reduce is None or problem.variant.known:
        scratch_bytes = _LEAST_BYTES  # products are computed once, however few fit
    variant, tokens = problem.variant, problem.tokens
    block = variant.configuration.block_c
    # Examples whose products of all tokens fit, in whole tiles of columns; if they are too few, all examples.
    rows = problem.token_tiles(tokens) * variant.configuration.block_v
    together = scratch_bytes // (4 * rows) // block * block // variant.padded
    if min(together, problem.examples) * variant.padded < min(_STRIP_COLUMNS, problem.examples * variant.padded):
        together = max(1, _SHARING // variant.padded)
    for some, part in problem.parts(together):
        step = max(1, scratch_bytes // (4 * part.row) // variant.configuration.block_v) * variant.configuration.block_v
        ranges = [range(first, min(first + step, tokens)) for first in range(0, tokens, step)]
        products: Tensor | None = None
        if not variant.known:
            sums = []
            for one in ranges:
                products = _product(part, one)
                sums.append(_sums(part, products, one))
            _merge(lse[some], part, sums[0] if len(sums) == 1 else torch.cat(sums, dim=1))
        if reduce is not None:
            for one in ranges:
                if products is None or len(ranges) > 1:
                    products = _product(part, one)
                reduce(part, some, products, one, lse[some])
