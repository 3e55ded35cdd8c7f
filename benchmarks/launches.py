"""What the Triton launchers launch, recorded without a GPU: every kernel, in every configuration that can be asked for.

What `benchmarks.recorder` saw of these problems is what `benchmarks.aot` compiles.

Sizes are chosen for the variant with the most code: masked, accumulating, counts that are neither. Of layouts with
tiles of their own there is one each. `tests/test_kernels_launches.py` asks for other sizes and finds no other tile.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bayesian_lora_kernels.ops import device

from .recorder import MULTIPROCESSORS, Launch, is_kernel, launched, modules

__all__ = ["MULTIPROCESSORS", "PROBLEMS", "is_kernel", "modules", "recorded"]

BF16, FP16, FP32 = DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def recorded(architecture: str) -> dict[str, Launch]:
    """Everything that `PROBLEMS` launch, by name; once for all architectures that share a table."""
    if (table := device.TABLES[architecture]) != architecture:
        return recorded(table)
    found: dict[str, Launch] = {}
    for problem in PROBLEMS:
        for one in launched(architecture, problem):
            if found.setdefault(one.name, one) != one:
                raise ValueError(f"{one.name} is launched in two ways that differ in alignment: choose other sizes")
    return found


def _empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _rows(height: int, width: int, dtype: torch.dtype, strided: bool) -> Tensor:
    return _empty(height, 2 * width, dtype=dtype)[:, ::2] if strided else _empty(height, width, dtype=dtype)


def outer_products(
    widths: Sequence[int] = (4, 8, 16, 32, 64, 1000, 4096), height: int = 512, dtypes: Sequence[torch.dtype] = DTYPES
) -> None:
    """Every width and layout, with masks (which have a stride) and without; float16 compiles to what bfloat16 does."""
    from bayesian_lora_kernels.ops.outer_product import kernel_launch

    for dtype, width in itertools.product(dtypes, widths):
        for masked, strided in ((False, False), (True, False), (True, True)):
            if dtype == FP16 and masked:
                continue
            size = width - strided  # one that is no multiple of 16
            x, out = _rows(height, size, dtype, strided), _empty(size, size)
            mask = _empty(2 * height, dtype=torch.bool)[::2] if masked else None
            kernel_launch.grouped_outer_product([out], [x], [mask], [1.0], True)


def split_outer_products() -> None:
    """So many rows that they are split, and the sums added by a kernel of its own."""
    outer_products((4, 8, 16, 32, 64, 128), 5120, (FP16,))


def mirrored() -> None:
    from bayesian_lora_kernels.ops.outer_product import kernel_launch

    kernel_launch.mirror_lower(_empty(112, 112))


def square_sums(widths: Sequence[int] = (32, 4096)) -> None:
    from bayesian_lora_kernels.ops.square_sum import kernel

    for dtype, width, strided in itertools.product(DTYPES, widths, (False, True)):
        x, mask = _rows(64, width, dtype, strided), _empty(64, dtype=torch.bool)
        kernel.grouped_square_sum(_empty(1, dtype=torch.float64), [x], [mask])


def weight_gradients(sizes: Sequence[tuple[int, int]] = ((4096, 8), (8, 4096), (200, 72)), tokens: int = 112) -> None:
    """LoRA B, LoRA A and a wide layer, in either layout; float16 compiles to what bfloat16 does."""
    from bayesian_lora_kernels.ops.weight_gradient import kernel

    for dtype, (d_out, d_in), strided in itertools.product((BF16, FP32), sizes, (False, True)):
        g = _rows(18 * tokens, d_out - strided, dtype, strided).unflatten(0, (18, tokens))
        a, mask = _empty(18, tokens, d_in, dtype=dtype), _empty(18, tokens, dtype=torch.bool)
        kernel.grouped_weight_gradient([_empty(18, g.shape[2], d_in)], [g], [a], [mask])


def masked_gradients(widths: Sequence[int] = (32, 4096), tokens: int = 112) -> None:
    from bayesian_lora_kernels.ops.masked_gradient import kernel

    for dtype, width, strided in itertools.product(DTYPES, widths, (False, True)):
        g = _rows(18 * tokens, width - strided, dtype, strided).unflatten(0, (18, tokens))
        a, mask = _empty(18, tokens, 64, dtype=dtype), _empty(18, tokens, dtype=torch.bool)
        kernel.grouped_masked_gradient(_empty(1, dtype=torch.bool), [g], [a], [mask])


def incremental_svds(columns: Sequence[int] = (16, 30, 64, 128)) -> None:
    """Two streams of many rows, in either layout, and of few."""
    from bayesian_lora_kernels.ops.incremental_svd import kernel

    for dtype, wanted in itertools.product(DTYPES, columns):
        for height, strided in ((9000, False), (200, False), (9000, True)):
            x, mask = _rows(height, 320, dtype, strided), _empty(height, dtype=torch.bool)
            basis, out = _empty(320, wanted), _empty(320, wanted)
            rows, signs = _empty(wanted, 16, dtype=torch.int64), _empty(wanted, 16)
            kernel.grouped_incremental_svd(*([one] * 2 for one in (out, basis, x, mask, rows, signs)), fresh=10)


# Outputs, width of the narrow side, directions kept of it and of the wide side. The first for every dtype: one of each
# class that `by_jacobian` knows, and of the rows that `narrow_rows_kernel` takes. The others for the kernels that
# read the basis of the wide side.
_JACOBIANS = (
    *((1, 8, 8, 10), (4, 4, 4, 0), (4, 4, 4, 10), (4, 40, 40, 0), (4, 40, 39, 10)),
    *((30, 24, 24, 10), (60, 8, 8, 0), (60, 8, 8, 10)),
)
_SIDES = tuple((dtype, wide_input) for dtype in DTYPES for wide_input in (True, False) if dtype != FP16 or wide_input)
_JACOBIANS_OF_WIDE_BASES = tuple((outputs, 2, 2, kept) for outputs in (15, 30, 60) for kept in (30, 60))
# The rows of `token_gram_kernel`, and the columns that a basis has.
_THROUGH_TOKENS = (*((outputs, 8, 8, 5) for outputs in (1, 4)), *((30, 8, 8, kept) for kept in (5, 10, 12, 30)))


def jacobians(
    sizes: Sequence[tuple[int, int, int, int]] = _JACOBIANS,
    sides: Sequence[tuple[torch.dtype, bool]] = _SIDES,
    tokens: int = 64,
    route: str = "by_jacobian",
) -> None:
    """The wide side is the input or the output; as the latter, float16 compiles to what bfloat16 does."""
    from bayesian_lora_kernels.ops.jacobian_covariance import kernel_launch, variants

    def variant(shape: Any, inputs: int, entries: int, architecture: str) -> Any:
        return variants.by_tokens(shape, architecture) if route == "by_tokens" else variants.by_jacobian(shape)

    examples = 18
    for (dtype, wide_input), (outputs, narrow, kept_narrow, kept) in itertools.product(sides, sizes):
        wide = 3968 if outputs > 32 else 7936  # 124 tiles, two to a program
        d_in, d_out = (wide, narrow) if wide_input else (narrow, wide)
        k_in, k_out = (kept, kept_narrow) if wide_input else (kept_narrow, kept)
        a, g = _empty(examples, tokens, d_in, dtype=dtype), _empty(examples, outputs, tokens, d_out, dtype=dtype)
        mask = _empty(examples, tokens, dtype=torch.bool)
        bases = _empty(d_out, k_out), _empty(d_in, k_in)
        precisions = _empty(k_out, k_in), _empty(k_out), _empty(k_in), _empty()
        with mock.patch.object(kernel_launch, "variant", variant):
            kernel_launch.jacobian_covariance(_empty(examples, outputs, outputs), a, g, *bases, *precisions, mask)


def jacobians_of_wide_bases() -> None:
    jacobians(_JACOBIANS_OF_WIDE_BASES, ((FP32, False),))


def jacobians_of_few_tokens() -> None:
    """Of a wide output: gradients of its weight."""
    sizes = ((1, 8, 8, 0), (1, 8, 8, 10), (4, 8, 8, 0), (4, 8, 8, 10), (4, 40, 39, 10), (15, 8, 8, 10))
    jacobians(sizes, ((BF16, False), (FP32, False)), tokens=2)


def jacobians_through_tokens(
    sizes: Sequence[tuple[int, int, int, int]] = _THROUGH_TOKENS, dtypes: Sequence[torch.dtype] = (BF16, FP32)
) -> None:
    """Of few tokens and of many; float16 compiles to what bfloat16 does."""
    for dtype, tokens in itertools.product(dtypes, (64, 256)):
        jacobians(sizes, ((dtype, True),), tokens, "by_tokens")


_VOCABULARIES = ((BF16, BF16), (BF16, FP32), (FP32, FP32), (FP16, FP32))  # float16 alone compiles to what bfloat16 does


def vocabularies(
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]] = _VOCABULARIES,
    examples: int = 8,
    samples: int = 60,
    width: int = 4096,
) -> None:
    """With bias and soft cap, mirrored and not."""
    from bayesian_lora_kernels.ops.vocabulary import kernel_launch, kernel_variants

    tokens = 50257
    on_gpu = mock.patch.object(kernel_variants, "as_planes", lambda weight: weight.dtype == BF16)
    for of_weight, of_hidden in dtypes:
        weight, hidden = _empty(tokens, width, dtype=of_weight), _empty(examples, samples, width, dtype=of_hidden)
        statistics, targets = [_empty(examples) for _ in range(3)], _empty(examples, dtype=torch.int64)
        out, bias = _empty(examples, tokens), _empty(examples, tokens)
        with on_gpu:
            kernel_launch.vocabulary_variance(out, weight, hidden.mT)
            for mirrored in (False, True):
                head = (bias, 30.0, mirrored)
                kernel_launch.vocabulary_statistics(*statistics, weight, hidden, *head, targets, None, None)
                kernel_launch.vocabulary_probs(out, weight, hidden, *head, None, None)


def other_vocabularies() -> None:
    """With few samples of each example; of a width that cannot be loaded 16 bytes at a time."""
    vocabularies(_VOCABULARIES[:1], 16, 20)
    vocabularies(width=4100)


def attentions(
    widths: Sequence[int] = (16, 32, 48, 64, 112, 128, 240, 256),
    dtypes: Sequence[torch.dtype] = (BF16, FP32),
    tokens: int = 500,
) -> None:
    """Causal, with an additive mask, columns that a tile has too many of; float16 compiles to what bfloat16 does."""
    from bayesian_lora_kernels.ops.attention import kernel_launch

    for dtype, width in itertools.product(dtypes, widths):
        q, kv = _empty(2, 4, tokens, width, dtype=dtype), _empty(2, 2, tokens, width, dtype=dtype)
        changes = [_empty(3, *one.shape, dtype=dtype) for one in (q, kv, kv)]
        mask = _empty(2, 1, tokens, tokens, dtype=dtype).expand(2, 4, tokens, tokens)
        kernel_launch.attention_jvp(q, torch.empty_like(changes[0]), q, kv, kv, *changes, mask, True, 0.1)


PROBLEMS: tuple[Callable[[], None], ...] = (
    *(outer_products, split_outer_products, mirrored, square_sums, weight_gradients, masked_gradients),
    *(incremental_svds, jacobians, jacobians_of_wide_bases, jacobians_of_few_tokens, jacobians_through_tokens),
    *(vocabularies, other_vocabularies, attentions),
)
