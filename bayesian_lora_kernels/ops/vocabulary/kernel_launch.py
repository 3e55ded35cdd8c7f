"""Launches the kernels of `kernel.py` and `kernel_scratch.py`: configurations, scratch, and which passes.

One pass where the exponentials of enough columns fit into the scratch: some examples at a time, `exponentials_kernel`
with `STORE`, merge, reduce. Otherwise two: the log-sum-exps of all, then `means_kernel` for the probabilities, while
the statistics, which need all samples of a token at once, store the exponentials of a range of tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from ..device import SCRATCH_BYTES, architecture, on_device
from ..tuning import choose_configuration
from . import kernel, kernel_scratch


@dataclass(frozen=True)
class Configuration:
    """Tile of tokens, columns and width, warps, pipeline depth."""

    block_v: int
    block_c: int
    block_k: int
    num_warps: int
    num_stages: int


# Sums of 128 x 256 take 128 registers of each of 256 threads, 4 stages of 48 KB what a multiprocessor of sm_90 has. It
# spills where the columns are three planes, and on sm_100; a float32 product is split into three in registers.
_CONFIGURATIONS = {
    "sm_80": {
        "half": (Configuration(128, 32, 64, 4, 4), Configuration(128, 128, 32, 8, 4)),
        "planes": (Configuration(128, 32, 64, 4, 4), Configuration(128, 128, 32, 8, 4)),
        "float32": (Configuration(64, 32, 32, 4, 3), Configuration(64, 64, 32, 4, 3)),
    },
    "sm_90": {
        "half": (Configuration(128, 32, 64, 4, 4), Configuration(128, 256, 64, 8, 4)),
        "planes": (Configuration(128, 32, 64, 4, 4), Configuration(128, 128, 64, 8, 4)),
        "float32": (Configuration(64, 32, 32, 4, 3), Configuration(64, 64, 32, 4, 3)),
    },
    "sm_100": {
        "half": (Configuration(128, 32, 32, 4, 4), Configuration(128, 64, 64, 8, 4)),
        "planes": (Configuration(128, 32, 32, 4, 4), Configuration(128, 64, 64, 8, 4)),
        "float32": (Configuration(64, 32, 32, 4, 3), Configuration(64, 64, 32, 8, 3)),
    },
}
# Columns that share one reading of the weight from memory.
_SHARING = 2048
# With fewer columns in a strip, reading the weight for each strip takes longer than a second pass.
_STRIP_COLUMNS = 256
# Memory of the tiles' maxima and sums in a first pass; and, since statistics need some scratch, their least.
_PARTIAL_BYTES = 32 << 20
_LEAST_BYTES = 16 << 20
# Tokens and samples at a time in `kernel_scratch.py`.
SCRATCH_TILE = (64, 64)


def configurations(name: str, planes: int, half: bool) -> tuple[Configuration, ...]:
    """By growing number of columns."""
    return _CONFIGURATIONS[name]["planes" if planes > 1 else "half" if half else "float32"]


def group(configuration: Configuration) -> int:
    """Tiles of columns that go together."""
    return max(1, _SHARING // configuration.block_c)


@dataclass(frozen=True)
class _Problem:
    """A product as the kernels take it; ``columns: [planes, N, S, d]`` in any order of memory."""

    weight: Tensor
    columns: Tensor
    bias: Tensor | None
    softcap: float | None
    configuration: Configuration
    half: bool
    widen: bool

    @property
    def tokens(self) -> int:
        return self.weight.shape[0]

    @property
    def examples(self) -> int:
        return self.columns.shape[1]

    @property
    def samples(self) -> int:
        return self.columns.shape[2]

    @property
    def padded(self) -> int:
        """Columns per example."""
        return padded_columns(self.samples, self.configuration.block_c)

    @property
    def row(self) -> int:
        """Columns of all tiles."""
        block = self.configuration.block_c
        return triton.cdiv(self.examples * self.padded, block) * block

    def token_tiles(self, tokens: int) -> int:
        return triton.cdiv(tokens, self.configuration.block_v)

    def some(self, first: int, last: int) -> _Problem:
        """Some of the examples."""
        return replace(self, columns=self.columns[:, first:last])

    def parts(self, examples: int) -> Iterator[tuple[slice, _Problem]]:
        """The examples, at most so many at a time, as evenly as can be."""
        count = triton.cdiv(self.examples, max(1, examples))
        step = triton.cdiv(self.examples, count)
        for first in range(0, self.examples, step):
            some = slice(first, min(first + step, self.examples))
            yield some, self.some(some.start, some.stop)

    def product(self) -> dict[str, object]:
        """Arguments that all kernels with a product share."""
        chosen = self.configuration
        names = ("stride_p", "stride_n", "stride_s", "stride_d")
        return {
            "weight_ptr": self.weight,
            "columns_ptr": self.columns,
            "examples": self.examples,
            "samples": self.samples,
            "width": self.weight.shape[1],
            "stride_wv": self.weight.stride(0),
            "stride_wd": self.weight.stride(1),
            **dict(zip(names, self.columns.stride(), strict=True)),
            "PADDED": self.padded,
            "PLANES": self.columns.shape[0],
            "WIDEN": self.widen,
            "PRECISION": "ieee" if self.half else "tf32x3",
            "BV": chosen.block_v,
            "BC": chosen.block_c,
            "BK": chosen.block_k,
            "GROUP": group(chosen),
            "num_warps": chosen.num_warps,
            "num_stages": chosen.num_stages,
            "enable_fp_fusion": True,
        }

    def head(self) -> dict[str, object]:
        """Arguments of the kernels that make logits."""
        return {
            "bias_ptr": self.weight if self.bias is None else self.bias,
            "softcap": 1.0 if self.softcap is None else self.softcap,
            "HAS_BIAS": self.bias is not None,
            "SOFTCAP": self.softcap is not None,
        }


@dataclass(frozen=True)
class _Targets:
    """``tokens: [N]`` int64, and where their logits go, ``logits: [N, S]`` float32."""

    tokens: Tensor
    logits: Tensor

    def some(self, examples: slice) -> _Targets:
        return _Targets(self.tokens[examples], self.logits[examples])


def padded_columns(samples: int, block_c: int) -> int:
    """Columns that an example takes: a power of two within a tile, else whole tiles."""
    if samples <= block_c:
        return int(triton.next_power_of_2(samples))
    return int(triton.cdiv(samples, block_c) * block_c)


def vocabulary_logsumexp(
    out: Tensor, weight: Tensor, hidden: Tensor, bias: Tensor | None, softcap: float | None
) -> None:
    """As in reference.py."""
    if out.numel() == 0 or weight.shape[0] == 0:
        out.fill_(-math.inf)
        return
    with on_device(hidden):
        _first_pass(out, _problem(weight, hidden, bias, softcap), None)


def vocabulary_probs(
    out: Tensor,
    weight: Tensor,
    hidden: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logsumexp: Tensor | None,
    scratch_bytes: int | None,
) -> None:
    """As in reference.py."""
    if out.numel() == 0:
        return
    with on_device(hidden):
        problem = _problem(weight, hidden, bias, softcap)
        together = _strip(problem, SCRATCH_BYTES if scratch_bytes is None else scratch_bytes)
        if logsumexp is None and together:
            for some, part in problem.parts(together):
                stored = _scratch(part, part.tokens)
                lse, maxima = _stored_strip(part, stored, None)
                _stored_means(out[some], part, stored, maxima, lse)
            return
        lse = hidden.new_empty(hidden.shape[:2], dtype=torch.float64)
        if logsumexp is None:
            _first_pass(lse, problem, None)
        else:
            lse.copy_(logsumexp)
        chosen = problem.configuration
        examples = max(1, chosen.block_c // problem.padded)
        grid = (problem.token_tiles(problem.tokens) * triton.cdiv(problem.examples, examples),)
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
    targets: Tensor | None,
    logsumexp: Tensor | None,
    scratch_bytes: int | None,
) -> None:
    """As in reference.py; float32 scratch, at least 16 MiB of it."""
    if hidden.shape[0] == 0:
        return
    wanted = None
    if targets is not None:
        logits = hidden.new_full(hidden.shape[:2], -math.inf, dtype=torch.float32)
        wanted = _Targets(targets.to(torch.int64).contiguous(), logits)
    lse = hidden.new_full(hidden.shape[:2], -math.inf, dtype=torch.float64)
    totals = entropy.new_zeros((2, entropy.shape[0]), dtype=torch.float64)
    scratch_bytes = max(SCRATCH_BYTES if scratch_bytes is None else scratch_bytes, _LEAST_BYTES)
    if logsumexp is not None:
        lse.copy_(logsumexp)
    if weight.shape[0]:
        with on_device(hidden):
            problem = _problem(weight, hidden, bias, softcap)
            together = _strip(problem, scratch_bytes)
            if logsumexp is None and together:
                for some, part in problem.parts(together):
                    stored = _scratch(part, part.tokens)
                    lse[some], maxima = _stored_strip(part, stored, wanted and wanted.some(some))
                    totals[:, some] += _stored_statistics(part, stored, maxima, lse[some], part.tokens)
            else:
                if logsumexp is None:
                    _first_pass(lse, problem, wanted)
                _statistics_by_range(totals, problem, lse, None if logsumexp is None else wanted, scratch_bytes)
    entropy.copy_(totals[0].clamp_min_(0))
    mutual_information.copy_(totals[1].clamp_min_(0))
    if wanted is not None:
        log_probs = torch.logsumexp(wanted.logits.double() - lse, dim=1) - math.log(hidden.shape[1])
        target_log_prob.copy_(log_probs.clamp_max_(0))


def vocabulary_variance(out: Tensor, weight: Tensor, factor: Tensor) -> None:
    """As in reference.py."""
    if out.numel() == 0:
        return
    if factor.shape[2] == 0:
        out.zero_()
        return
    with on_device(factor):
        # The columns are small beside the weight; a copy that lies as samples do is read 16 bytes at a time.
        problem = _problem(weight, factor.mT.contiguous(), None, None)
        examples = max(1, problem.configuration.block_c // problem.padded)
        grid = (problem.token_tiles(problem.tokens) * triton.cdiv(problem.examples, examples),)
        kernel.squares_kernel[grid](out_ptr=out, tokens=problem.tokens, stride_o=out.stride(0), **problem.product())


def split_planes(x: Tensor) -> Tensor:
    """``[3, ...]`` bfloat16 whose sum is the float32 ``x`` to its last bit, but for the smallest numbers."""
    high = x.bfloat16()
    rest = x - high.float()
    middle = rest.bfloat16()
    return torch.stack([high, middle, (rest - middle.float()).bfloat16()])


def _as_planes(weight: Tensor) -> bool:
    """Whether columns beside this weight become bfloat16; not in the interpreter, which computes it wrongly."""
    return weight.dtype == torch.bfloat16 and weight.is_cuda


def _problem(weight: Tensor, columns: Tensor, bias: Tensor | None, softcap: float | None) -> _Problem:
    """How these arguments are multiplied, and in which configuration.

    A bfloat16 weight with columns of another dtype takes these as a sum of three bfloat16 numbers: every product is
    exact in float32, at half the price of widening the weight. A float16 weight, whose products would overflow, is
    widened in registers, and so is bfloat16 in the interpreter. Columns are small, and widened before.
    """
    as_planes = _as_planes(weight)
    if columns.dtype != weight.dtype or (weight.dtype == torch.bfloat16 and not as_planes):
        columns = columns.float()
    planes = split_planes(columns) if as_planes and columns.dtype == torch.float32 else columns[None]
    widen = weight.dtype != planes.dtype
    half = planes.dtype != torch.float32
    name = architecture(weight.device)
    sizes = configurations(name, len(planes), half)
    examples, samples = columns.shape[:2]
    wanted = examples * triton.next_power_of_2(samples)
    first = next((i for i, one in enumerate(sizes) if one.block_c >= wanted), len(sizes) - 1)
    bias = None if bias is None else bias.float().contiguous()
    problem = _Problem(weight, planes, bias, softcap, sizes[first], half, widen)
    candidates = (sizes[first], *sizes[:first], *sizes[first + 1 :])
    key = ("vocabulary", name, weight.dtype, columns.dtype, *weight.shape, examples, samples)
    scratch = columns.new_empty((examples, samples), dtype=torch.float64)
    chosen = choose_configuration(
        key, candidates, lambda one: _first_pass(scratch, replace(problem, configuration=one), None)
    )
    return replace(problem, configuration=chosen)


def _strip(problem: _Problem, scratch_bytes: int) -> int:
    """Examples whose exponentials fit into the scratch; 0 where they are too few for a strip."""
    rows = problem.token_tiles(problem.tokens) * problem.configuration.block_v
    block = problem.configuration.block_c
    columns = scratch_bytes // (4 * rows) // block * block
    together = min(columns // problem.padded, problem.examples)
    return together if together * problem.padded >= min(_STRIP_COLUMNS, problem.examples * problem.padded) else 0


def _scratch(problem: _Problem, tokens: int) -> Tensor:
    rows = problem.token_tiles(tokens) * problem.configuration.block_v
    return torch.empty((rows, problem.row), dtype=torch.float32, device=problem.weight.device)


def _exponentials(
    problem: _Problem,
    tokens: tuple[int, int],
    stored: Tensor | None,
    targets: _Targets | None,
) -> Tensor:
    """Maxima and sums, ``[2, token tiles, columns]``, of a range of tokens."""
    tiles = problem.token_tiles(tokens[1] - tokens[0])
    partial = torch.empty((2, tiles, problem.row), dtype=torch.float32, device=problem.weight.device)
    kernel.exponentials_kernel[(tiles * (problem.row // problem.configuration.block_c),)](
        maxima_ptr=partial[0],
        sums_ptr=partial[1],
        stored_ptr=partial if stored is None else stored,
        target_logits_ptr=partial if targets is None else targets.logits,
        targets_ptr=partial if targets is None else targets.tokens,
        first_token=tokens[0],
        end_token=tokens[1],
        HAS_TARGETS=targets is not None,
        STORE=stored is not None,
        **problem.head(),
        **problem.product(),
    )
    return partial


def _merge(out: Tensor, problem: _Problem, partial: Tensor) -> None:
    kernel.merge_kernel[(triton.cdiv(problem.row, 32),)](
        out, partial[0], partial[1], partial.shape[1], problem.row, problem.examples, problem.samples,
        PADDED=problem.padded, BT=32, BC=32, num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip


def _first_pass(out: Tensor, problem: _Problem, targets: _Targets | None) -> None:
    """Log-sum-exps of all columns to ``out: [N, S]`` float64, contiguous."""
    per_example = 8 * problem.token_tiles(problem.tokens) * problem.padded
    together = max(problem.configuration.block_c // problem.padded, _PARTIAL_BYTES // per_example)
    for some, part in problem.parts(together):
        _merge(out[some], part, _exponentials(part, (0, part.tokens), None, targets and targets.some(some)))


def _stored_strip(problem: _Problem, stored: Tensor, targets: _Targets | None) -> tuple[Tensor, Tensor]:
    """Fill the scratch; log-sum-exps ``[N, S]``, and the maxima that the scratch is relative to."""
    lse = torch.empty((problem.examples, problem.samples), dtype=torch.float64, device=stored.device)
    partial = _exponentials(problem, (0, problem.tokens), stored, targets)
    _merge(lse, problem, partial)
    return lse, partial[0]


def _stored_means(out: Tensor, problem: _Problem, stored: Tensor, maxima: Tensor, lse: Tensor) -> None:
    block, samples = SCRATCH_TILE
    kernel_scratch.stored_means_kernel[(triton.cdiv(problem.tokens, block) * problem.examples,)](
        out, stored, maxima, lse, problem.tokens, problem.samples, problem.row, out.stride(0),
        PADDED=problem.padded, TILE=problem.configuration.block_v, BV=block, BS=samples,
        num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip


def _stored_statistics(problem: _Problem, stored: Tensor, maxima: Tensor, lse: Tensor, tokens: int) -> Tensor:
    """Terms of the entropy and of the mutual information, ``[2, N]`` float64."""
    block, samples = SCRATCH_TILE
    blocks = triton.cdiv(tokens, block)
    terms = torch.empty((2, problem.examples, blocks), dtype=torch.float32, device=stored.device)
    kernel_scratch.stored_statistics_kernel[(blocks * problem.examples,)](
        terms[0], terms[1], stored, maxima, lse, tokens, problem.samples, problem.row,
        PADDED=problem.padded, TILE=problem.configuration.block_v, BV=block, BS=samples,
        num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    return terms.sum(2, dtype=torch.float64)


def _statistics_by_range(
    totals: Tensor,
    problem: _Problem,
    lse: Tensor,
    targets: _Targets | None,
    scratch_bytes: int,
) -> None:
    """Adds to ``totals: [2, N]``, from known log-sum-exps, a range of tokens at a time."""
    block = problem.configuration.block_v
    together = scratch_bytes // (8 * block * problem.padded * 4)
    together = max(together, problem.configuration.block_c // problem.padded)
    for some, part in problem.parts(together):
        step = max(1, scratch_bytes // (part.row * 4 * block)) * block
        for first in range(0, part.tokens, step):
            last = min(first + step, part.tokens)
            stored = _scratch(part, last - first)
            partial = _exponentials(part, (first, last), stored, targets and targets.some(some))
            totals[:, some] += _stored_statistics(part, stored, partial[0], lse[some], last - first)
