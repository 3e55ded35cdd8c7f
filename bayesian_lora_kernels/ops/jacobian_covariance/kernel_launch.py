"""Launches the Triton kernels: which modules go together, their posteriors as kernels read them, in which pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..device import architecture, is_aligned, on_device, widened
from .group import Covariance, Group
from .launch_jacobians import jacobian_workspace, launch_jacobians
from .launch_tokens import launch_tokens, token_workspace
from .variants import Shape, Variant, variant

# Elements of float32 workspace per launch, 256 MiB: more modules, then more examples, go in further launches.
_WORKSPACE = 1 << 26


def jacobian_gram(out: Tensor, a: Tensor, g: Tensor, mask: Tensor | None) -> None:
    """As in reference.py."""
    none, one = a.new_ones(0, dtype=torch.float32), a.new_ones((), dtype=torch.float32)
    jacobian_covariance(out, a, g, _no_basis(g), _no_basis(a), none.reshape(0, 0), none, none, one, mask)


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
    """As in reference.py: a few launches for every set of modules that agree in shapes, dtypes, strides."""
    basis_s, basis_a, masks = _as_float32(basis_s), _as_float32(basis_a), widened(masks)
    total = torch.zeros(out.shape, dtype=torch.float64, device=out.device)
    with on_device(out):
        for members, inputs, chosen in _groups(out, a, g, basis_s, basis_a, masks):
            wide_input = chosen.shape.wide_input
            wides, narrows, bases, eigenbases = (a, g, basis_a, basis_s) if wide_input else (g, a, basis_s, basis_a)
            single = (rest_a, rest_s) if wide_input else (rest_s, rest_a)
            blocks = [[kept[i] if wide_input else kept[i].mT for i in members]]
            blocks += [[precision[i] for i in members] for precision in (*single, rest)]
            # Stacked first: then the launches do not grow with the number of modules.
            variances = [torch.stack(block).double().reciprocal() for block in blocks]
            covariance = _prepare(chosen, torch.stack([eigenbases[i] for i in members]), *variances)
            group = Group(
                [wides[i] for i in members],
                [narrows[i] for i in members],
                [masks[i] for i in members],
                [bases[i] for i in members],
                inputs,
                covariance,
                chosen,
            )
            _add(total, group)
    value = total.float()
    torch.add(value, value.mT, out=out).mul_(0.5)


def variants(out: Tensor, a: Any, g: Any, *rest: Any) -> tuple[Variant, ...]:
    """What the arguments of a function of this module have compiled."""
    *posterior, masks = rest
    if isinstance(a, Tensor):
        a, g, masks = [a], [g], [masks]
        posterior = [[one] for one in posterior[:2] or (_no_basis(g[0]), _no_basis(a[0]))]
    chosen = {one for _, _, one in _groups(out, a, g, posterior[0], posterior[1], masks)}
    return tuple(sorted(chosen, key=str))


def _no_basis(operand: Tensor) -> Tensor:
    return operand.new_empty((operand.shape[-1], 0), dtype=torch.float32)


def _as_float32(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each distinct tensor once, so that modules that shared it still do."""
    made: dict[int, Tensor] = {}
    for one in tensors:
        if one.dtype != torch.float32 and id(one) not in made:
            made[id(one)] = one.float()
    return [made.get(id(one), one) for one in tensors]


def _groups(
    out: Tensor,
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    basis_s: Sequence[Tensor],
    basis_a: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> list[tuple[list[int], list[int], Variant]]:
    """Modules that agree in shapes, strides and dtypes, which input each has, in order, and what is compiled."""
    groups: dict[tuple[object, ...], dict[tuple[int, ...], list[int]]] = {}
    for i, (one_a, one_g, one_s, one_q, mask) in enumerate(zip(a, g, basis_s, basis_a, masks, strict=True)):
        operands = (x for one in (one_a, one_g, one_s, one_q) for x in (one.shape, one.stride(), one.dtype))
        key = (*operands, mask is None, is_aligned(one_a), is_aligned(one_g))
        same = one_a.data_ptr(), one_q.data_ptr(), 0 if mask is None else mask.data_ptr()
        groups.setdefault(key, {}).setdefault(same, []).append(i)
    result = []
    for sharing in groups.values():
        members = [i for some in sharing.values() for i in some]
        inputs = [which for which, some in enumerate(sharing.values()) for _ in some]
        i = members[0]
        shape = _shape(a[i], g[i], basis_s[i], basis_a[i], masks[i] is not None)
        if out.numel() and shape.tokens and shape.width and shape.rows and (shape.rest or shape.kept):
            result.append((members, inputs, variant(shape, len(sharing), len(members), architecture(out.device))))
    return result


def _shape(a: Tensor, g: Tensor, basis_s: Tensor, basis_a: Tensor, masked: bool) -> Shape:
    wide_input = a.shape[2] >= g.shape[3]
    wide, narrow, basis, eigenbasis = (a, g, basis_a, basis_s) if wide_input else (g, a, basis_s, basis_a)
    size, columns = eigenbasis.shape
    return Shape(
        wide_input,
        outputs=g.shape[1],
        tokens=a.shape[1],
        width=wide.shape[-1],
        rows=columns if columns == size else columns + size,
        kept=basis.shape[1],
        wide=wide.dtype,
        narrow=narrow.dtype,
        interpreted=wide.device.type == "cpu",
        masked=masked,
        aligned=is_aligned(wide),
        contiguous=wide.stride(-1) == 1,
    )


def _prepare(
    chosen: Variant, narrow: Tensor, kept: Tensor, narrow_kept: Tensor, wide_kept: Tensor, neither: Tensor
) -> Covariance:
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
    if chosen.shape.rest:
        largest = remainder.amax(1)
        relative = (remainder / largest[:, None]).sqrt()
    else:  # a complement that does not exist has variances that mean nothing
        largest, relative = remainder.new_ones(entries), torch.ones_like(remainder)
    deviations = torch.nn.functional.pad(kept.sqrt().float(), (0, chosen.kept - kept.shape[2]))
    return Covariance(maps.float().contiguous(), deviations, relative.float().contiguous(), largest.float())


def _add(total: Tensor, group: Group) -> None:
    """Add the sum over a group's modules to `total [N, C, C]` float64, in as many pieces as the workspace asks for."""
    tokens = group.variant.route == "tokens"
    per_example = token_workspace(group) if tokens else jacobian_workspace(group)
    launch = launch_tokens if tokens else launch_jacobians
    step = max(1, min(len(total), _WORKSPACE // per_example))
    pieces = math.ceil(len(group.wides) / max(1, _WORKSPACE // (per_example * step)))
    together = math.ceil(len(group.wides) / pieces)  # as many in each
    for first in range(0, len(total), step):
        piece = total[first : first + step]
        for part, table in group.parts(together, first):
            piece += launch(part, table, len(piece))
