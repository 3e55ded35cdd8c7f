"""What the processes of a fit send each other, modelled and measured: `python -m benchmarks.traffic`.

A process sends `2 (W - 1) / W` of what it holds at the end of each pass, W processes: full sums, traces and EKFAC's
eigenvalues by all-reduce; low-rank streams to the process that merges them, and the merged ones back to all. Nothing is
sent in between, so that the number of batches does not matter.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.curvature.factor_sums import stream_columns
from bayesian_lora_kernels.curvature.passes import Passes, fit_curvature
from bayesian_lora_kernels.curvature.reduction import TOGETHER, leading
from bayesian_lora_kernels.model.forward import Forward
from bayesian_lora_kernels.model.layers import find_layers
from bayesian_lora_kernels.processes import Processes

LINKS = {"NVLink 4, 450 GB/s": 450e9, "InfiniBand NDR, 50 GB/s": 50e9}  # nominal, of one GPU in one direction
EIGH = 9  # n^3 multiplications of a symmetric eigendecomposition with all vectors (Golub, Van Loan 2013, section 8.3)


@dataclass(frozen=True)
class Layer:
    """A matrix `[d_out, d_in]`, and which input it sees: layers with one input share a sum."""

    source: str
    d_out: int
    d_in: int


@dataclass(frozen=True)
class Held:
    """What a process holds at the end of a fit.

    Attributes:
        streams: width and columns of each low-rank sum.
        bytes_streams: of these, in float32.
        bytes_full: of full sums, and of all traces.
        bytes_eigenvalues: of EKFAC's sums, where every factor keeps all the directions that it may.
    """

    streams: Sequence[tuple[int, int]]
    bytes_streams: int
    bytes_full: int
    bytes_eigenvalues: int

    @classmethod
    def of(cls, layers: Sequence[Layer], config: LaplaceConfig, itemsize: int = 4) -> Held:
        """By these layers."""
        widths = [*{one.source: one.d_in for one in layers}.values(), *(one.d_out for one in layers)]
        columns = {width: stream_columns(config, width) for width in widths}
        streams = [(width, kept) for width in widths if (kept := columns[width]) is not None]
        full = [width for width in widths if columns[width] is None]
        blocks = 0
        for one in layers:
            k_s, k_a = (d if columns[d] is None else config.rank or d for d in (one.d_out, one.d_in))
            blocks += k_s * k_a + k_s + k_a + 1
        return cls(
            streams,
            itemsize * sum(width * kept for width, kept in streams),
            itemsize * sum(width**2 for width in full) + 8 * len(widths),
            8 * blocks,
        )

    def sent(self, size: int, curvature: str) -> float:
        """Bytes that one of `size` processes sends."""
        held = self.bytes_streams + self.bytes_full + (self.bytes_eigenvalues if curvature == "ekfac" else 0)
        return 2 * (size - 1) / size * held

    def merging(self, size: int) -> float:
        """Operations in float64 of the process that merges most: Gram matrices, eigendecompositions, products."""
        count, total = size, 0.0
        mean = sum(width for width, _ in self.streams) / len(self.streams)
        columns = self.streams[0][1]
        while count > 1:
            together, merges = min(count, TOGETHER), -(-count // TOGETHER)
            n = together * columns
            total += merges * (2 * mean * n**2 + EIGH * n**3 + 2 * mean * n * columns)
            count = merges
        return total * -(-len(self.streams) // size)


def llama(hidden: int, intermediate: int, values: int, depth: int, r: int = 16) -> list[Layer]:
    """LoRA on all linear modules; `values` is the width of keys and values."""
    found = []
    for i in range(depth):
        for name, source, d_in, d_out in (
            ("q", "attention", hidden, hidden),
            ("k", "attention", hidden, values),
            ("v", "attention", hidden, values),
            ("o", "o", hidden, hidden),
            ("gate", "mlp", hidden, intermediate),
            ("up", "mlp", hidden, intermediate),
            ("down", "down", intermediate, hidden),
        ):
            found += [Layer(f"{i} {source}", r, d_in), Layer(f"{i} {name} A", d_out, r)]
    return found


MODELS = {"7B": llama(4096, 11008, 4096, 32), "70B": llama(8192, 28672, 1024, 80)}
CONFIG = LaplaceConfig()


def modelled() -> Iterator[str]:
    """A table for large models."""
    links = " | ".join(f"at {name}" for name in LINKS)
    yield f"| model, LoRA r 16 on all linear modules | GPUs | sent per GPU | EKFAC adds | {links} | merging per GPU |"
    yield "|---|---|---|---|---|---|---|"
    for name, layers in MODELS.items():
        held = Held.of(layers, CONFIG)
        for size in (8, 64):
            sent = held.sent(size, "kfac")
            more = held.sent(size, "ekfac") - sent
            times = " | ".join(f"{1e3 * (sent + more) / rate:.1f} ms" for rate in LINKS.values())
            yield (
                f"| {name} | {size} | {sent / 1e9:.2f} GB | {more / 1e6:.1f} MB | {times} | "
                f"{held.merging(size) / 1e12:.1f} T operations in float64 |"
            )


# ---- measured --------------------------------------------------------------------------------------------------------

SMALL = {"rank": 8, "rank_threshold": 64}


class Chain(nn.Module):
    """Wide and narrow layers by turns, as LoRA has them."""

    def __init__(self, width: int = 300, r: int = 8, depth: int = 6):
        super().__init__()
        down = [nn.Linear(width, r, bias=False) for _ in range(depth)]
        self.layers = nn.ModuleList(
            one for pair in ((a, nn.Linear(r, width, bias=False)) for a in down) for one in pair
        )
        self.head = nn.Linear(width, 3).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(0, len(self.layers), 2):
            x = x + self.layers[i + 1](torch.tanh(self.layers[i](x)))
        return self.head(x)


def small_layers(model: Chain) -> list[Layer]:
    """Each sees an input of its own."""
    return [Layer(name, m.out_features, m.in_features) for name, m in model.layers.named_children()]  # type: ignore[arg-type]


def sent(group: Any, batches: int, curvature: str) -> int:
    """Bytes that this process sends in a fit of so many batches on each process."""
    torch.manual_seed(0)
    model, processes = Chain(), Processes(group)
    config = LaplaceConfig(curvature=curvature, fisher="empirical", check="off", **SMALL)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(processes.rank)
    loader = [
        (torch.randn(40, 300, generator=generator), torch.randint(0, 3, (40,), generator=generator))
        for _ in range(batches)
    ]
    forward = Forward(model, None, None, True, config.check)
    fit_curvature(Passes(model, find_layers(model), forward, loader, config, False, processes))
    return processes.sent


def compared(size: int, sent_by_first: dict[tuple[int, str], int]) -> Iterator[str]:
    """Rows of the table of small cases."""
    held = Held.of(small_layers(Chain()), LaplaceConfig(**SMALL))  # type: ignore[arg-type]
    for (batches, curvature), number in sent_by_first.items():
        model = held.sent(size, curvature)
        yield f"| {size} | {batches} | {curvature} | {number} | {model:.0f} | {number / model:.3f} |"


def merging_seconds(size: int, width: int = 4096, columns: int = 64) -> float:
    """Of this process' one thread, for one stream of `size` processes."""
    estimates = [torch.randn(width, columns) for _ in range(size)]
    start = time.process_time()
    leading(estimates, columns)
    return time.process_time() - start


def run(work: Callable[[Any], None], size: int) -> None:
    """`work(group)` in each of so many processes, over gloo."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_run, (work, size, port), nprocs=size)


def _run(rank: int, work: Callable[[Any], None], size: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=120), rank=rank, world_size=size)
    work(dist.group.WORLD)
    dist.destroy_process_group()


def _print_sent(group: Any) -> None:
    found = {(n, curvature): sent(group, n, curvature) for curvature in ("kfac", "ekfac") for n in (2, 16)}
    if dist.get_rank(group) == 0:
        print("\n".join(compared(dist.get_world_size(group), found)), flush=True)


def main() -> None:
    print("\n".join(modelled()))
    print(
        "\n| processes | batches of each | curvature | bytes sent | modelled | ratio |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for size in (2, 3, 4):
        run(_print_sent, size)
    torch.set_num_threads(1)
    times = ", ".join(f"{merging_seconds(size):.2f} s of {size} processes" for size in (8, 64))
    print(f"\nmerging one stream of 4096 x 64 on one CPU core: {times}")


if __name__ == "__main__":
    main()
