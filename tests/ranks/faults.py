"""What goes wrong on one process of a group; run by `ranks.start.run`, each returns the error it met, if any."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Case, mlp
from torch.utils.data import DataLoader, DistributedSampler

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.curvature import kfac
from bayesian_lora_kernels.posterior.curvature import register
from bayesian_lora_kernels.processes import Processes

from . import checks

BAD = 1  # the rank where it happens


class Loader:
    """Batches, with something before the last of them."""

    def __init__(self, batches: list[Any], fault: Any):
        self.batches, self.fault = batches, fault

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches[:-1]
        self.fault()
        yield self.batches[-1]


def fitted(group: Any, case: Case, loader: Any, **settings: Any) -> str:
    """The error of a fit, and whether an earlier one is still there."""
    settings = {"fisher": "exact", "rank": None, **settings}
    laplace = blk.LaplaceLoRA(case.model, **settings).fit(case.loader(9)[:1], progress=False)
    before = laplace.posterior.curvature
    try:
        laplace.fit(loader, progress=False, group=group)
    except Exception as error:
        assert laplace.posterior.curvature is before
        return f"{type(error).__name__}: {error}"
    return "nothing wrong"


def bad_label(group: Any) -> list[str]:
    """A label out of range, and then a fit as if nothing had happened."""
    case = mlp(n=18)
    loader = checks.own_loader(case, group, "turns")
    if dist.get_rank(group) == BAD:
        inputs, labels = loader[1]
        loader[1] = inputs, labels + 7
    return [fitted(group, case, loader), fitted(group, case, checks.own_loader(case, group, "turns"))]


def killed(group: Any, which: int) -> str:
    case = mlp(n=18)

    def die() -> None:
        if dist.get_rank(group) == which:
            os.kill(os.getpid(), signal.SIGKILL)

    return fitted(group, case, Loader(checks.own_loader(case, group, "turns"), die))


def interrupted(group: Any) -> str:
    """Ctrl-C on one process."""
    case = mlp(n=18)

    def interrupt() -> None:
        if dist.get_rank(group) == BAD:
            raise KeyboardInterrupt

    try:
        return fitted(group, case, Loader(checks.own_loader(case, group, "turns"), interrupt))
    except KeyboardInterrupt:
        return "KeyboardInterrupt"


def in_a_reduction(group: Any) -> str:
    """One fails where the others already add up."""
    case = mlp(n=18)

    def out_of_memory(*_: Any) -> None:
        raise MemoryError("no more")

    if dist.get_rank(group) == BAD:
        Processes._joined = out_of_memory  # type: ignore[method-assign]
    return fitted(group, case, checks.own_loader(case, group, "turns"))


def other_settings(group: Any) -> list[str]:
    bad = dist.get_rank(group) == BAD
    case = mlp(n=18)
    loader = checks.own_loader(case, group, "turns")
    errors = [fitted(group, case, loader, tokens="reduce" if bad else "expand")]
    errors.append(fitted(group, case, loader, modules=["first", "last"] if bad else None))
    with torch.no_grad():
        case.model.first.weight[0, 0] += 1e-12 if bad else 0
    errors.append(fitted(group, case, loader))
    case = mlp(n=18, trainable=["first.weight"])
    with torch.no_grad():
        case.model.last.bias += 1 if bad else 0
    errors.append(fitted(group, case, loader))
    return errors


def refused(group: Any) -> dict[str, str]:
    """What a group cannot be served, by name, with the error."""
    bad, case = dist.get_rank(group) == BAD, mlp(n=17)
    data = [*zip(case.examples, case.labels, strict=True)]

    class Alone(kfac.KroneckerCurvature):
        of_all_processes = False

    register("alone")(Alone)
    errors = {"own kind": fitted(group, case, case.loader(9), curvature="alone"), "no data": fitted(group, case, [])}
    errors["same share"] = fitted(group, case, DataLoader(data, 4, sampler=DistributedSampler(data, 2, 0)))
    laplace = blk.LaplaceLoRA(case.model, fisher="exact").fit(case.loader(9), progress=False)
    for name, precision, batch, outputs in (
        ("prior", 2.0 if bad else 1.0, case.batch(), None),
        ("logits", 1.0, case.batch(), [0, 1] if bad else [1, 2]),
        ("count", 1.0, case.batch(), 3 if bad else 2),
        ("vocabulary", 1.0, case.batch(), "vocabulary"),
        ("nobody", 1.0, None, None),
    ):
        laplace.prior_precision = precision
        with pytest.raises(ValueError, match=r".") as caught:
            laplace.predict(batch, outputs, gather=group)
        errors[name] = str(caught.value)
    return errors


def rounds_otherwise(group: Any) -> str:
    """Eigenvectors that one machine rounds otherwise, or of which it drops one."""
    case, plain = mlp(n=18), kfac.eigenbases

    def other(factors: Any) -> Any:
        return {
            name: tuple(one._replace(vectors=-one.vectors[:, 1:], values=one.values[1:]) for one in pair)
            for name, pair in plain(factors).items()
        }

    for curvature in ("kfac", "ekfac"):
        settings = {"fisher": "exact", "rank": None, "curvature": curvature}
        single = blk.LaplaceLoRA(case.model, **settings).fit(case.loader(9), progress=False)
        if dist.get_rank(group) == BAD:
            kfac.eigenbases = other
        shared = blk.LaplaceLoRA(case.model, **settings)
        shared.fit(checks.own_loader(case, group, "turns"), progress=False, group=group)
        kfac.eigenbases = plain
        checks.check_equal(single, shared, case, group)
    return "nothing wrong"
