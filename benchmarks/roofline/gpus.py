"""The GPUs that are estimated for: what a multiprocessor holds and does in a cycle, and what the device measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "roofline.json"


@dataclass(frozen=True)
class GPU:
    """Rates are of the whole device, per second.

    Args:
        architecture: what is compiled for.
        bandwidth: of a copy, read and written bytes.
        cache: bytes of its L2, and ``cache_bandwidth`` what it delivers.
        tensor: operations of a bf16 product by the best instruction, as measured with PyTorch's matmul.
        mma: what of it ``mma.sync`` reaches.
        float64: multiply-adds of a multiprocessor per cycle, and ``tensor64`` operations by matrix instructions.
        shared: bytes of shared memory of a multiprocessor; ``warps`` and ``blocks`` that it holds.
    """

    name: str
    architecture: str
    multiprocessors: int
    clock: float
    bandwidth: float
    cache: int
    cache_bandwidth: float
    tensor: float
    mma: float
    float64: int
    tensor64: float
    shared: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536


# The H100 of docs/performance.md. On Hopper mma.sync reaches 0.63 of the peak of 989 TFLOP/s (Luo et al. 2024, arXiv
# 2402.13499), that is 0.78 of what matmul measured.
H100 = GPU("H100", "sm_90", 132, 1.755e9, 3.0e12, 50 << 20, 5.5e12, 798e12, 0.78, 64, 60e12, 228 << 10)
A100 = GPU("A100", "sm_80", 108, 1.41e9, 1.6e12, 40 << 20, 4.0e12, 250e12, 1.0, 32, 19e12, 164 << 10)
RTX_4090 = GPU(
    "RTX 4090", "sm_89", 128, 2.52e9, 0.93e12, 72 << 20, 4.5e12, 165e12, 1.0, 2, 0.0, 100 << 10, warps=48, blocks=24
)
ALL = (H100, A100, RTX_4090)

LAUNCH = 2.5e-6  # from the end of one kernel to the start of the next
SHARE = 0.8  # of what a multiprocessor could do at most: of GEMMs in Triton 0.63 to 0.81 are published
STALL = 2.5  # cycles between two instructions of a warp
LATENCY = 700  # cycles of a load from device memory or L2, with its queue
BARRIER = 25  # cycles
CACHED = 0.7  # of the L2 that data of an earlier kernel is found in
