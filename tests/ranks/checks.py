"""A fit of several processes against one of all the data on a single process, in float64."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dense import relative
from models import Case, llama, mlp

import bayesian_lora_kernels as blk

SHARES = ("turns", "uneven", "empty")
EXACTLY = 1e-10


def share(n: int, group: Any, kind: str) -> list[int]:
    """Which of n examples are this process' own: every so many, most of them on one, or none on the first and last."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if kind == "turns" or size == 1:
        return [*range(rank, n, size)]
    if kind == "uneven":
        return [*range(size - 1, n)] if rank == 0 else [rank - 1]
    holder = size // 2
    return [*range(n)] if rank == holder else []


def own_loader(case: Case, group: Any, kind: str, size: int = 2) -> list[Any]:
    """Batches of this process' share; those of another rank are of another size."""
    own, size = share(len(case.examples), group, kind), size + dist.get_rank(group)
    return [case.batch(own[i : i + size]) for i in range(0, len(own), size)]


def fits(case: Case, group: Any, kind: str, **settings: Any) -> tuple[blk.LaplaceLoRA, blk.LaplaceLoRA]:
    """One process with all the data, and the group with a share each."""
    settings = {**case.arguments, "fisher": "exact", "rank": None, "prior_precision": 0.7, **settings}
    single = blk.LaplaceLoRA(case.model, **settings).fit(case.loader(3), progress=False)
    shared = blk.LaplaceLoRA(case.model, **settings)
    return single, shared.fit(own_loader(case, group, kind), progress=False, group=group)


def same_everywhere(laplace: blk.LaplaceLoRA, group: Any) -> None:
    """The curvature is the same on all processes, bit for bit."""
    tensors, described = laplace.posterior.curvature.pack()
    digest = hashlib.sha256(repr(described).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, digest.hexdigest(), group=group)
    assert len(set(found)) == 1, found


def check_equal(single: blk.LaplaceLoRA, shared: blk.LaplaceLoRA, case: Case, group: Any) -> None:
    """All that a fit is asked for is the same."""
    assert shared.n_examples == single.n_examples == len(case.examples)
    assert shared.log_likelihood == pytest.approx(single.log_likelihood, rel=EXACTLY)
    assert float(shared.log_marginal_likelihood()) == pytest.approx(
        float(single.log_marginal_likelihood()), rel=EXACTLY
    )
    batch = case.batch()
    assert relative(shared.predict(batch).covariance, single.predict(batch).covariance) < EXACTLY
    same_everywhere(shared, group)


def sharing(laplace: blk.LaplaceLoRA) -> set[frozenset[str]]:
    """Which layers share the tensor of their input factor."""
    groups: dict[int, set[str]] = {}
    for name, factors in laplace.factors.items():
        groups.setdefault(id(factors.a), set()).add(name)
    return {frozenset(names) for names in groups.values()}


def factors_equal(single: blk.LaplaceLoRA, shared: blk.LaplaceLoRA) -> None:
    for name, one in single.factors.items():
        other = shared.factors[name]
        for side in ("a", "s", "tail_a", "tail_s"):
            assert relative(getattr(other, side), getattr(one, side)) < EXACTLY, (name, side)
    assert sharing(shared) == sharing(single)


def check_kfac(group: Any, kind: str) -> None:
    """Texts of several lengths, padded, whose q, k and v share an input."""
    case = llama((5, 3, 6, 4, 7, 2, 5), targets=("q_proj", "k_proj", "v_proj"))
    single, shared = fits(case, group, kind)
    factors_equal(single, shared)
    check_equal(single, shared, case, group)


def check_ekfac(group: Any, kind: str) -> None:
    case = llama((5, 3, 6, 4, 7, 2, 5))
    check_equal(*fits(case, group, kind, curvature="ekfac"), case, group)


def check_mlp(group: Any, kind: str, **settings: Any) -> None:
    case = mlp(n=9, tokens=3)
    single, shared = fits(case, group, kind, **settings)
    if settings.get("curvature") != "exact":
        factors_equal(single, shared)
    check_equal(single, shared, case, group)
