"""Launches the kernels of `kernel.py`: which modules go together, in which configuration, with which workspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from ..device import int64_table, is_aligned, on_device
from ..kernel_types import TYPES
from . import kernel
from .routes import side_by_side

# Elements of float32 workspace per launch, 128 MiB: more modules, then more examples, go in further launches.
_WORKSPACE = 1 << 25
# Programs per launch beyond which a program takes several tiles: 8 per multiprocessor of an H100.
_PROGRAMS = 1056


@dataclass(frozen=True)
class Configuration:
    """How the wide side is cut, and with which resources a program works on it.

    Args:
        width: columns of a tile.
        tokens: tokens of one dot, at most.
        num_warps: warps per program.
        num_stages: tiles in flight.
        max_registers: what the assembler may use. Left to itself it spills a little to fit one program more on a
            multiprocessor; with room it often needs no more.
    """

    width: int
    tokens: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# Rows of a Jacobian (outputs times directions of the narrow side) in one program. More would read the wide side from L2
# less often, but 32 is what a Gram matrix in tf32x3, whose operands are in registers, leaves without spills.
_ROWS = 32

# Programs are small, so that two to four share a multiprocessor and hide each other's latency; the same on sm_80, sm_90
# and sm_100, since nothing needs more than 48 KB of shared memory.
_INPUT_PLANES = Configuration(width=64, tokens=64, num_warps=4, num_stages=3)
_INPUT = Configuration(width=64, tokens=32, num_warps=4, num_stages=3)
_OUTPUT = Configuration(width=64, tokens=1, num_warps=8, num_stages=1)


def configuration(wide_input: bool, planes: bool, outputs: int, rows: int) -> tuple[int, int, Configuration]:
    """Outputs and directions side by side in one program, and its configuration."""
    c, o = side_by_side(outputs, rows, _ROWS)
    chosen = (_INPUT_PLANES if planes else _INPUT) if wide_input else _OUTPUT
    if c > _ROWS:
        chosen = replace(chosen, width=32, tokens=min(32, chosen.tokens), max_registers=255)
    elif c * o < _ROWS:
        chosen = replace(chosen, num_warps=4, max_registers=192 if wide_input else 168)
    return c, o, chosen


def kept_configuration(outputs: int) -> tuple[int, int]:
    """Columns of z that `kept_rows_kernel` takes at once, and its warps: what registers leave."""
    return (32, 4) if outputs <= _ROWS else (16, 8)


def narrow_tokens(rows: int) -> int:
    """Tokens that a program of `narrow_rows_kernel` takes, at most: the product of both is what registers leave."""
    return min(64, 4096 // rows)


@dataclass(frozen=True)
class _Covariance:
    """The posteriors of a group of modules, as the kernels read them; all float32."""

    maps: Tensor | None  # [entries, width of the narrow side, rows]; None: as it is
    deviations: Tensor  # [entries, rows, K_]
    relative: Tensor  # [entries, rows]
    largest: Tensor  # [entries]
    kept: int  # columns of the wide side's basis
    rest: bool  # whether the wide side has a complement


def jacobian_gram(out: Tensor, a: Tensor, g: Tensor, mask: Tensor | None) -> None:
    """As in reference.py."""
    narrow, wide_input = _narrow_width(a, g)
    ones = torch.ones((1, narrow), dtype=torch.float32, device=out.device)
    covariance = _Covariance(None, ones[:, :, None], ones, ones[:, 0], 0, True)
    with on_device(out):
        _write(out, _group(out, [a], [g], [mask], [None], covariance, wide_input))


def jacobian_covariance(
    out: Tensor,
    a: Tensor,
    g: Tensor,
    basis_s: Tensor,
    basis_a: Tensor,
    kept: Tensor,
    rest_a: Tensor,
    rest_s: Tensor,
    rest: Tensor,
    mask: Tensor | None,
) -> None:
    """As in reference.py."""
    precisions = [kept], [rest_a], [rest_s], [rest]
    grouped_jacobian_covariance(out, [a], [g], [basis_s], [basis_a], *precisions, [mask])


def grouped_jacobian_covariance(
    out: Tensor,
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    basis_s: Sequence[Tensor],
    basis_a: Sequence[Tensor],
    kept: Sequence[Tensor],
    rest_a: Sequence[Tensor],
    rest_s: Sequence[Tensor],
    rest: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> None:
    """As in reference.py: four launches for every set of modules that agree in shapes, dtypes, strides."""
    basis_s, basis_a = [basis.float() for basis in basis_s], [basis.float() for basis in basis_a]
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, mask in enumerate(masks):
        key = tuple(
            None if x is None else (x.shape, x.stride(), x.dtype) for x in (a[i], g[i], mask, basis_s[i], basis_a[i])
        )
        groups.setdefault((*key, is_aligned(a[i]), is_aligned(g[i])), []).append(i)
    total = torch.zeros(out.shape, dtype=torch.float64, device=out.device)
    with on_device(out):
        for members in groups.values():
            _, wide_input = _narrow_width(a[members[0]], g[members[0]])
            wide, narrow = (basis_a, basis_s) if wide_input else (basis_s, basis_a)
            single = (rest_a, rest_s) if wide_input else (rest_s, rest_a)
            blocks = [[kept[i] if wide_input else kept[i].mT for i in members]]
            blocks += [[precision[i] for i in members] for precision in (*single, rest)]
            covariance = _prepare(
                torch.stack([narrow[i] for i in members]),
                wide[members[0]],
                # Stacked first: then the launches do not grow with the number of modules.
                *(torch.stack(block).double().reciprocal() for block in blocks),
            )
            total += _group(
                out,
                [a[i] for i in members],
                [g[i] for i in members],
                [masks[i] for i in members],
                [wide[i] for i in members],
                covariance,
                wide_input,
            )
        _write(out, total)


def _write(out: Tensor, value: Tensor) -> None:
    value = value.float()
    torch.add(value, value.mT, out=out).mul_(0.5)


def _narrow_width(a: Tensor, g: Tensor) -> tuple[int, bool]:
    """Width of the narrow side, and whether the input is the wide one."""
    return (g.shape[3], True) if a.shape[2] >= g.shape[3] else (a.shape[2], False)


def _prepare(
    narrow: Tensor, wide: Tensor, kept: Tensor, narrow_kept: Tensor, wide_kept: Tensor, neither: Tensor
) -> _Covariance:
    """Directions of the narrow side and standard deviations on them.

    `narrow [entries, d, k]`; variances `kept [entries, k, k_wide]`, `narrow_kept [entries, k]` on the complement of the
    wide side, `wide_kept [entries, k_wide]` on that of the narrow one, `neither [entries]`.
    """
    entries, width, columns = narrow.shape
    maps, remainder = narrow, narrow_kept
    if columns < width:
        basis = narrow.double()
        complement = torch.eye(width, dtype=torch.float64, device=narrow.device) - basis @ basis.mT
        maps = torch.cat([basis, complement], dim=2)
        kept = torch.cat([kept, wide_kept[:, None, :].expand(-1, width, -1)], dim=1)
        remainder = torch.cat([narrow_kept, neither[:, None].expand(-1, width)], dim=1)
    rest = wide.shape[1] < wide.shape[0]
    if rest and remainder.shape[1]:
        largest = remainder.amax(1)
        relative = (remainder / largest[:, None]).sqrt()
    else:  # a complement that does not exist has variances that mean nothing
        largest, relative = remainder.new_ones(entries), torch.ones_like(remainder)
    return _Covariance(
        maps.float().contiguous(),
        kept.sqrt().float(),
        relative.float().contiguous(),
        largest.float(),
        wide.shape[1],
        rest,
    )


def _group(
    out: Tensor,
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    bases: Sequence[Tensor | None],
    covariance: _Covariance,
    wide_input: bool,
) -> Tensor:
    """Sum over modules that agree in everything but their addresses, `[N, C, C]` float64."""
    examples, outputs = out.shape[:2]
    total = torch.zeros(out.shape, dtype=torch.float64, device=out.device)
    rows = covariance.relative.shape[1]
    tokens, width = a[0].shape[1], max(a[0].shape[2], g[0].shape[3])
    if not (total.numel() and tokens and width and rows and (covariance.rest or covariance.kept)):
        return total
    per_example = rows * tokens * (outputs if wide_input else 1)
    if covariance.kept:
        tiles = triton.cdiv(width, configuration(wide_input, _planes(a[0], wide_input), outputs, rows)[2].width)
        per_example += rows * outputs * tiles * _power(covariance.kept, 16)
    step = max(1, min(examples, _WORKSPACE // per_example))
    together = max(1, _WORKSPACE // (per_example * step))
    for first in range(0, len(a), together):
        some = slice(first, first + together)
        part = _Covariance(
            None if covariance.maps is None else covariance.maps[some],
            covariance.deviations[some],
            covariance.relative[some],
            covariance.largest[some],
            covariance.kept,
            covariance.rest,
        )
        for start in range(0, examples, step):
            piece = slice(start, start + step)
            total[piece] += _launch(
                [x[piece] for x in a[some]],
                [x[piece] for x in g[some]],
                [None if mask is None else mask[piece] for mask in masks[some]],
                bases[some],
                part,
                wide_input,
            )
    return total


def _launch(
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    bases: Sequence[Tensor | None],
    covariance: _Covariance,
    wide_input: bool,
) -> Tensor:
    entries, device = len(a), a[0].device
    wides, narrows = (a, g) if wide_input else (g, a)
    wide, narrow, mask, basis = wides[0], narrows[0], masks[0], bases[0]
    examples, tokens, width = wide.shape[0], wide.shape[-2], wide.shape[-1]
    outputs, narrow_outputs = g[0].shape[1], narrow.shape[1] if wide_input else 1
    rows, kept, rest = covariance.relative.shape[1], covariance.kept, covariance.rest
    pointers = [
        [0 if x is None else x.data_ptr() for x in one] for one in zip(wides, narrows, masks, bases, strict=True)
    ]
    table = int64_table(pointers, device)
    mask_strides = (0, 0) if mask is None else mask.stride()
    planes = _planes(wide, wide_input)
    c_, o_, chosen = configuration(wide_input, planes, outputs, rows)
    tiles = triton.cdiv(width, chosen.width)
    k_ = _power(kept, 16) if kept else 0

    def workspace(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    # Dummies where nothing is kept: the kernels do not touch them.
    unit = workspace(entries, tiles * chosen.width, k_) if k_ else table
    mixing = workspace(entries, tiles * k_, k_) if k_ else table
    z = workspace(entries, examples, rows, outputs, tiles * k_) if k_ else table
    if k_:
        assert basis is not None
        kernel.tile_bases_kernel[(tiles, entries)](
            table, unit, mixing, width, kept, tiles, *basis.stride(),
            D_=chosen.width, K_=k_, num_warps=8, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip

    projected = torch.empty(
        (3 if planes else 1, entries, examples, narrow_outputs, rows, tokens),
        dtype=torch.bfloat16 if planes else torch.float32,
        device=device,
    )
    r_ = _power(rows, 16)
    t_ = min(narrow_tokens(r_), _power(tokens, 16))
    n_stride, c_stride = narrow.stride(0), narrow.stride(1) if wide_input else 0
    kernel.narrow_rows_kernel[(triton.cdiv(tokens, t_) * narrow_outputs * examples * entries,)](
        table, table if covariance.maps is None else covariance.maps, projected, projected[0].numel(),
        narrow_outputs, tokens, narrow.shape[-1], rows,
        n_stride, c_stride, *narrow.stride()[-2:], *mask_strides, examples,
        DTYPE=TYPES[narrow.dtype], MASKED=mask is not None, MAPPED=covariance.maps is not None,
        PLANES=planes, T_=t_, R_=r_,
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip

    row_blocks = triton.cdiv(rows, o_)
    sharing = row_blocks if wide_input else 1  # programs that share a run of tiles
    per_program = max(1, min(8, entries * examples * sharing * tiles // _PROGRAMS))
    splits = triton.cdiv(tiles, per_program)
    blocks = entries * splits * sharing if rest else 0
    partial = workspace(blocks + (entries * rows if k_ else 0), examples, outputs, outputs)
    grid = (entries * examples * splits * sharing,)
    options = {
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
        "maxnreg": chosen.max_registers,
        "enable_fp_fusion": True,
    }
    tensors = (unit, covariance.relative, covariance.largest, z, partial)
    sizes = (examples, outputs, rows, tokens, width, tiles, per_program, splits, row_blocks, k_)
    shared = {
        "DTYPE": TYPES[wide.dtype],
        "ALIGNED": is_aligned(wide),
        "MASKED": mask is not None,
        "REST": rest,
        "C_": c_,
        "O_": o_,
        "D_": chosen.width,
        "K_": k_,
    }
    if wide_input:
        kernel.wide_input_kernel[grid](
            table, projected, projected[0].numel(), *tensors, *sizes, *wide.stride(), *mask_strides,
            PLANES=planes, T_=chosen.tokens, **shared, **options,
        )  # fmt: skip
    else:
        kernel.wide_output_kernel[grid](
            table, projected, *tensors, *sizes, *wide.stride(), *mask_strides, **shared, **options
        )
    if k_:
        deviations = torch.zeros((entries, rows, k_), dtype=torch.float32, device=device)
        deviations[:, :, :kept] = covariance.deviations
        kernel.kept_rows_kernel[(entries * examples * rows,)](
            z, mixing, deviations, covariance.relative, covariance.largest, partial[blocks:],
            examples, outputs, rows, tiles * k_,
            REST=rest, C_=_power(outputs, 16), L_=kept_configuration(outputs)[0], K_=k_,
            num_warps=kept_configuration(outputs)[1], num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    return partial.sum(0, dtype=torch.float64)


def _planes(wide: Tensor, wide_input: bool) -> bool:
    """Whether the narrow operand comes as three bfloat16 numbers: products with a bfloat16 input are exact then. The
    interpreter computes bfloat16 wrongly; there the input is widened, as of the other dtypes.
    """
    return wide_input and wide.dtype == torch.bfloat16 and wide.is_cuda


def _power(size: int, least: int) -> int:
    return max(least, triton.next_power_of_2(size))
