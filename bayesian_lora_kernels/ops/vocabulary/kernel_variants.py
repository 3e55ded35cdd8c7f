"""What is compiled for a call of the vocabulary kernels: decided here, from shapes, dtypes, strides and alignment.

There is one variant for each call: how the operands are multiplied, and what follows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from ..device import architecture, is_aligned


@dataclass(frozen=True)
class Configuration:
    """Tile of tokens, columns and width, warps, pipeline depth."""

    block_v: int
    block_c: int
    block_k: int
    num_warps: int
    num_stages: int


# By growing number of columns. Sums of 128 x 256 take 128 registers of each of 256 threads, 4 stages of 48 KB what a
# multiprocessor of sm_90 has; where the columns are three planes they spill. A float32 product is split into three in
# registers.
_CONFIGURATIONS: dict[str, dict[str, tuple[Configuration, ...]]] = {
    "sm_80": {
        "half": (Configuration(128, 32, 64, 8, 4), Configuration(128, 128, 32, 8, 4)),
        "planes": (Configuration(128, 32, 64, 8, 4), Configuration(128, 128, 32, 8, 4)),
        "float32": (Configuration(64, 64, 32, 4, 3),),
    },
    "sm_90": {
        "half": (Configuration(128, 32, 64, 4, 4), Configuration(128, 256, 64, 8, 4)),
        "planes": (Configuration(128, 32, 64, 4, 4), Configuration(128, 128, 64, 8, 4)),
        "float32": (Configuration(64, 32, 32, 4, 3), Configuration(64, 64, 32, 4, 3)),
    },
    "sm_100": {
        "half": (Configuration(128, 32, 32, 4, 4), Configuration(128, 256, 64, 8, 4)),
        "planes": (Configuration(128, 128, 64, 8, 4),),
        "float32": (Configuration(64, 32, 32, 8, 3), Configuration(64, 64, 32, 8, 3)),
    },
}
# Where operands cannot be loaded 16 bytes at a time, each element takes an address.
_SCATTERED = Configuration(64, 32, 32, 8, 2)
# Columns of an example, at least: with fewer, sums of each take the registers of the products.
_LEAST_COLUMNS = 8
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Variant:
    """One way to compute one operation.

    Args:
        operation: without ``vocabulary_``.
        weight: its dtype; beside columns of float32 it is widened in registers.
        columns: dtype in which they are multiplied.
        planes: of how many numbers of that dtype each column is the sum.
        vectors: whether the rows of both lie without gaps and begin where Triton loads 16 bytes at once.
        even: whether the configuration's step divides the width.
        padded: columns that an example takes: a power of two within a tile, else whole tiles.
        known: whether the log-sum-exps are given.
        mirrored: whether every column stands for two samples.
        bias: whether there is one.
        softcap: likewise.
        configuration: of the product.
    """

    operation: str
    weight: torch.dtype
    columns: torch.dtype
    planes: int
    vectors: bool
    even: bool
    padded: int
    known: bool
    mirrored: bool
    bias: bool
    softcap: bool
    configuration: Configuration

    def __str__(self) -> str:
        one = self.configuration
        columns = _NAMES[self.columns] + (f"x{self.planes}" if self.planes > 1 else "")
        names = ("known", "mirrored", "bias", "softcap", "vectors", "even")
        tile = f"BV={one.block_v} BC={one.block_c} BK={one.block_k}"
        flags = [name for name in names if getattr(self, name)]
        return " ".join([self.operation, _NAMES[self.weight], columns, *flags, f"padded={self.padded}", tile])

    def configured(self, configuration: Configuration, samples: int, width: int) -> Variant:
        """In a configuration, with as many samples of that width."""
        block = configuration.block_c
        power = max(triton.next_power_of_2(samples), _LEAST_COLUMNS)
        padded = power if power <= block else triton.cdiv(samples, block) * block
        even = width % configuration.block_k == 0
        return replace(self, configuration=configuration, padded=int(padded), even=even)


def vocabulary_logsumexp_variants(
    out: Tensor, weight: Tensor, hidden: Tensor, bias: Tensor | None, softcap: float | None, mirrored: bool
) -> tuple[Variant, ...]:
    """What ``vocabulary_logsumexp`` of these arguments compiles."""
    return (_variant("logsumexp", weight, hidden, bias, softcap, mirrored),)


def vocabulary_probs_variants(
    out: Tensor,
    weight: Tensor,
    hidden: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mirrored: bool,
    logsumexp: Tensor | None,
    scratch_bytes: int | None,
) -> tuple[Variant, ...]:
    """What ``vocabulary_probs`` of these arguments compiles."""
    return (_variant("probs", weight, hidden, bias, softcap, mirrored, logsumexp),)


def vocabulary_statistics_variants(
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
) -> tuple[Variant, ...]:
    """What ``vocabulary_statistics`` of these arguments compiles."""
    return (_variant("statistics", weight, hidden, bias, softcap, mirrored, logsumexp),)


def vocabulary_variance_variants(out: Tensor, weight: Tensor, factor: Tensor) -> tuple[Variant, ...]:
    """What ``vocabulary_variance`` of these arguments compiles."""
    return (_variant("variance", weight, factor.mT, None, None, False),)


def configurations(variant: Variant, device: torch.device) -> tuple[Configuration, ...]:
    """All that its product may have, by growing number of columns."""
    if not variant.vectors:
        return (_SCATTERED,)
    kind = "float32" if variant.columns == torch.float32 else "planes" if variant.planes > 1 else "half"
    return _CONFIGURATIONS[architecture(device)][kind]


def as_planes(weight: Tensor) -> bool:
    """Whether columns beside this weight become bfloat16; not in the interpreter, which computes it wrongly."""
    return weight.dtype == torch.bfloat16 and weight.is_cuda


def _variant(
    operation: str,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mirrored: bool,
    logsumexp: Tensor | None = None,
) -> Variant:
    """The product with ``columns: [N, S, d]``, and its configuration.

    A bfloat16 weight with columns of another dtype takes these as a sum of three bfloat16 numbers: every product is
    exact in float32, at half the price of widening the weight. A float16 weight, whose products would overflow, is
    widened in registers, and so is bfloat16 in the interpreter. Columns are small, and widened before.
    """
    dtype, planes = torch.float32, 1
    if as_planes(weight):
        dtype, planes = torch.bfloat16, 1 if columns.dtype == torch.bfloat16 else 3
    elif weight.dtype == columns.dtype == torch.float16:
        dtype = torch.float16
    examples, samples, width = columns.shape
    rows = weight.stride(1) == 1 and weight.stride(0) % 16 == 0 and is_aligned(weight)
    flags = (logsumexp is not None, mirrored, bias is not None, softcap is not None)
    vectors = rows and width % 16 == 0
    first = Variant(operation, weight.dtype, dtype, planes, vectors, False, 1, *flags, _SCATTERED)
    sizes = configurations(first, weight.device)
    wanted = examples * triton.next_power_of_2(samples)
    return first.configured(next((one for one in sizes if one.block_c >= wanted), sizes[-1]), samples, width)
