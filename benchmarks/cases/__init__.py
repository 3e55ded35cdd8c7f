"""Every kernel case, once, for the GPU report, pytest-benchmark and the tests."""

from __future__ import annotations

import torch

from .attention import Attention
from .case import Case, Provider, Target, Work, interpretable
from .incremental_svd import IncrementalSvd
from .jacobian import JacobianCovariance
from .outer_product import GroupedOuterProduct, OuterProduct
from .small_eigh import SmallEigh
from .square_sum import SquareSum
from .vocabulary import VocabularyProbs, VocabularyStatistics, VocabularyVariance

__all__ = ["Case", "Provider", "Target", "Work", "all_cases", "interpretable"]

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def all_cases() -> list[Case]:
    """The rows of docs/performance.md in order of importance, then the same kernels in other dtypes."""
    of_addmm = (Target("triton", times=1.5, over="addmm"), Target("triton", times=1.75, over="addmm"))
    einsum = Target("triton", times=3, over="einsum fp32")
    peer = Target("triton", times=100, over="bayesian_lora")
    fast, fast_past_32 = (Target("native", times=times, over="torch.linalg.eigh") for times in (3, 50))
    batched = (Target("triton", times=1.2, over="baddbmm"), Target("triton", times=1.2, over="addmm loop"))
    of_gemm = Target("triton", times=1 / 1.10, over="gemm alone")
    recomputed = (Target("triton", times=1 / 1.5, over="torch"), Target("triton", memory=1 / 30, over="torch"))
    loop = Target("triton", times=30, over="addmm loop")
    return [
        OuterProduct(BF16, 177, of_addmm, extras=True),
        GroupedOuterProduct(BF16, 11, (Target("triton", microseconds=18), loop)),
        IncrementalSvd(BF16, 1600, (Target("triton", microseconds=3000), peer), extras=True),
        JacobianCovariance(BF16, 1260, (Target("triton", microseconds=2000), einsum), extras=True),
        JacobianCovariance(BF16, 1330, (Target("triton", microseconds=2700), einsum), outputs=32),
        SmallEigh(FP64, None, (fast,), n=32),
        SmallEigh(FP64, None, (fast, fast_past_32), n=74),
        VocabularyVariance(BF16, 1350, (of_gemm,)),
        VocabularyProbs(BF16, 2700, recomputed),
        VocabularyStatistics(BF16, 2700),
        Attention(BF16, 1420, (Target("triton", memory=1 / 10, over="torch"),)),
        SquareSum(BF16),
        *masked_cases(),
        JacobianCovariance(FP32, 310, tokens=8, outputs=4, wide_output=True),
        JacobianCovariance(FP32, 2500, tokens=8, outputs=32, wide_output=True),
        OuterProduct(BF16, None, of_addmm[:1], width=8192),
        GroupedOuterProduct(BF16, None, batched, rows=8192, widths=(2048,), count=16),
        GroupedOuterProduct(BF16, rows=2048, widths=(4, 8, 16, 32, 64, 128), count=32),
        SmallEigh(FP32, None, (fast,), n=32),
        SmallEigh(FP32, None, (fast,), n=74),
        # Where PyTorch's issues 174674, 175585 and 183806 find torch.linalg.eigh slow.
        SmallEigh(FP32, count=500, n=100),
        SmallEigh(FP64, count=128, n=128),
        SmallEigh(FP64, count=512, n=3),
        IncrementalSvd(BF16, columns=74),
        Attention(BF16, width=64),
        Attention(FP32, width=64),
        OuterProduct(FP16),
        OuterProduct(FP32),
        GroupedOuterProduct(FP32),
        IncrementalSvd(FP16, modules=32),
        IncrementalSvd(FP32, modules=32),
        JacobianCovariance(FP16, modules=32),
        JacobianCovariance(FP32, modules=32),
    ]


def masked_cases() -> list[Case]:
    """As most batches come: with padding that must not be read."""
    return [
        OuterProduct(BF16, masked=True),
        GroupedOuterProduct(BF16, masked=True),
        IncrementalSvd(BF16, masked=True),
        *(JacobianCovariance(BF16, outputs=outputs, masked=True) for outputs in (4, 32)),
        JacobianCovariance(BF16, tokens=8, wide_output=True, masked=True),
        SquareSum(BF16, masked=True),
    ]
