"""A fit of several processes against one of all the data on a single process, in float64.

Every check runs on all processes of a group at once, and raises on each of them where something is wrong.
"""

from __future__ import annotations

import copy
import hashlib
import random
import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dense import relative
from models import Case, bert, llama, mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.curvature import passes
from bayesian_lora_kernels.curvature.factor_sums import FactorSum, FactorSums
from bayesian_lora_kernels.curvature.reduction import SumOfAll, reduce
from bayesian_lora_kernels.model.deferred import AT_ONCE
from bayesian_lora_kernels.processes import Processes

SHARES = ("turns", "uneven", "empty")
EXACTLY = 1e-10


def share(n: int, group: Any, kind: str) -> list[int]:
    """Which of n examples are this process' own: every so many, most of them on one, or none but on one."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if kind == "turns" or size == 1:
        return [*range(rank, n, size)]
    if kind == "uneven":
        return [*range(size - 1, n)] if rank == 0 else [rank - 1]
    return [*range(n)] if rank == size // 2 else []


def own_loader(case: Case, group: Any, kind: str, size: int = 2) -> list[Any]:
    """Batches of this process' share; those of another rank are of another size."""
    own, size = share(len(case.examples), group, kind), size + dist.get_rank(group)
    return [case.batch(own[i : i + size]) for i in range(0, len(own), size)]


def both(case: Case, loader: Any, group: Any, **settings: Any) -> tuple[blk.LaplaceLoRA, blk.LaplaceLoRA]:
    """The fit of a single process with all the data, and that of the group with a loader each."""
    settings = {**case.arguments, "fisher": "exact", "rank": None, "prior_precision": 0.7, **settings}
    single = blk.LaplaceLoRA(case.model, **settings).fit(case.loader(3), progress=False)
    return single, blk.LaplaceLoRA(case.model, **settings).fit(loader, progress=False, group=group)


def everyone(own: Any, group: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    return found


def check_same_bits(laplace: blk.LaplaceLoRA, group: Any) -> None:
    """The curvature is the same on all processes, bit for bit."""
    tensors, described = laplace.posterior.curvature.pack()
    digest = hashlib.sha256(repr(described).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    assert len(set(everyone(digest.hexdigest(), group))) == 1


def check_equal(
    single: blk.LaplaceLoRA, shared: blk.LaplaceLoRA, case: Case, group: Any, tolerance: float = EXACTLY
) -> None:
    """All that a fit is asked for is the same."""
    assert shared.n_examples == single.n_examples == len(case.examples)
    assert shared.log_likelihood == pytest.approx(single.log_likelihood, rel=EXACTLY)
    evidence = float(single.log_marginal_likelihood())
    assert float(shared.log_marginal_likelihood()) == pytest.approx(evidence, rel=tolerance)
    covariances = [laplace.predict(case.batch()).covariance for laplace in (shared, single)]
    assert relative(*covariances) < tolerance
    check_same_bits(shared, group)


def sharing(laplace: blk.LaplaceLoRA) -> set[frozenset[str]]:
    """Which layers share the tensor of their input factor."""
    groups: dict[int, set[str]] = {}
    for name, factors in laplace.factors.items():
        groups.setdefault(id(factors.a), set()).add(name)
    return {frozenset(names) for names in groups.values()}


def check_factors(single: blk.LaplaceLoRA, shared: blk.LaplaceLoRA) -> None:
    for name, one in single.factors.items():
        other = shared.factors[name]
        for side in ("a", "s", "tail_a", "tail_s"):
            assert relative(getattr(other, side), getattr(one, side)) < EXACTLY, (name, side)
    assert sharing(shared) == sharing(single)


def check_kfac(group: Any, kind: str) -> None:
    """Padded texts, and q, k and v that share an input."""
    case = llama((5, 3, 6, 4, 7, 2, 5), targets=("q_proj", "k_proj", "v_proj"), layers=1)
    single, shared = both(case, own_loader(case, group, kind), group)
    check_factors(single, shared)
    check_equal(single, shared, case, group)


def check_mlp(group: Any, kind: str, **settings: Any) -> None:
    case = mlp(n=9, tokens=3)
    single, shared = both(case, own_loader(case, group, kind), group, **settings)
    if settings.get("curvature") != "exact":
        check_factors(single, shared)
    check_equal(single, shared, case, group)


def check_low_rank(group: Any, kind: str) -> None:
    """What is known without loss stays so: counts, likelihood, the traces; and all processes have the same."""
    case = mlp(n=60, tokens=4, width=40, inputs=24)
    settings = {"rank": 4, "rank_threshold": 8}
    single, _ = both(case, [*case.loader(60)] if dist.get_rank(group) == 0 else [], group)
    loader = own_loader(case, group, kind, size=10)
    shared = blk.LaplaceLoRA(case.model, fisher="exact", prior_precision=0.7, **settings)
    shared.fit(loader, progress=False, group=group)
    assert shared.log_likelihood == pytest.approx(single.log_likelihood, rel=EXACTLY)
    for name, one in shared.factors.items():
        assert one.a.shape[1] == 4
        assert float(one.trace()) == pytest.approx(float(single.factors[name].trace()), rel=EXACTLY)
    check_same_bits(shared, group)


def check_merge(group: Any) -> None:
    """A merged stream errs by no more than the streams that went into it, and what the merge truncates."""
    processes = Processes(group)
    d, columns, size = 40, 14, processes.size
    generator = torch.Generator().manual_seed(processes.rank)
    decay = torch.arange(1, d + 1, dtype=torch.float64).reciprocal()
    turned = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    rows = torch.randn(600, d, generator=generator, dtype=torch.float64) * decay @ turned
    sums = FactorSums(LaplaceConfig(rank=2, rank_threshold=8))
    if processes.rank or size == 1:  # the first of several has none
        for part in rows.split(100):
            sums.add({"x": (part, None)}, AT_ONCE, lambda key: ValueError(key))
        sums.flush()
    own: FactorSum = sums.sums.get("x", FactorSum(d, columns))
    estimate = None if own.matrix is None else own.matrix.clone()
    dtypes = [None if size > 1 and rank == 0 else "float64" for rank in range(size)]
    reduce(processes, [SumOfAll(own, dtypes, torch.device("cpu"))])
    parts = [(x, b) for x, b in everyone((rows, estimate), group) if b is not None]
    exact = sum(x.T @ x for x, _ in parts)
    assert own.matrix is not None
    assert own.matrix.shape == (d, columns)
    assert own.trace is not None
    assert float(own.trace) == pytest.approx(float(exact.trace()), rel=1e-12)
    lost = sum(float(torch.linalg.matrix_norm(x.T @ x - b @ b.T)) for x, b in parts)
    values = torch.linalg.eigvalsh(sum(b @ b.T for _, b in parts)).flip(0)
    truncated = float(values[columns:].norm())
    error = float(torch.linalg.matrix_norm(exact - own.matrix @ own.matrix.T))
    assert error <= (lost + truncated) * (1 + 1e-9)
    assert relative(own.matrix.square().sum(dim=0), values[:columns]) < 1e-9
    bits = everyone(own.matrix.numpy().tobytes(), group)
    assert len(set(bits)) == 1


class Moody(nn.Module):
    """Two layers on one input; where a batch's first number is large, the second gets another, or is not called."""

    def __init__(self, mood: str):
        super().__init__()
        self.mood = mood
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        moody = self.mood != "" and bool(x[0, 0] > 9)
        if moody and self.mood == "only then":
            return self.first(x)
        return self.first(x) + torch.tanh(self.second(2 * x if moody else x))


def check_pairs(group: Any, kind: str) -> None:
    """Pairs of answers below each other, as TRL's collator has them, each with a weight of its own."""

    def collate(pairs: Any, weights: Tensor) -> dict[str, Tensor]:
        ids = torch.stack([pair[side] for side in (0, 1) for pair in pairs])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "weights": weights}

    case = bert(classes=1)
    generator = torch.Generator().manual_seed(6)
    case.examples = list(torch.randint(1, 13, (7, 2, 5), generator=generator))
    case.labels, case.collate = torch.tensor([2.0, 0.5, 0.0, 1.0, 3.0, 0.1, 1.0]), collate
    loader, settings = own_loader(case, group, kind), {"likelihood": "bradley-terry"}
    check_equal(*both(case, loader, group, curvature="ekfac", **settings), case, group)
    evidences = [float(x.log_marginal_likelihood()) for x in both(case, loader, group, curvature="exact", **settings)]
    assert evidences[1] == pytest.approx(evidences[0], rel=EXACTLY)


def check_moods(group: Any) -> None:
    """Layers that part, or of which one is not called, on one process only."""
    torch.manual_seed(2)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    batches = [(torch.randn(2, 4, dtype=torch.float64), torch.tensor([0, 2])) for _ in range(5)]
    batches[-1][0][0, 0] = 10.0
    for mood, shared in (("", 1), ("parts", 2), ("only then", 2)):
        model = Moody(mood)
        settings = {"fisher": "exact", "rank": None, "check": "off"}
        single = blk.LaplaceLoRA(model, **settings).fit(batches, progress=False)
        group_fit = blk.LaplaceLoRA(model, **settings).fit(batches[rank::size], progress=False, group=group)
        assert len(sharing(single)) == shared, mood
        check_factors(single, group_fit)
        check_same_bits(group_fit, group)


def check_repeats(group: Any) -> None:
    """The same texts on all processes, in another order and otherwise padded: they are warned of, others are not."""
    case = llama((5, 3, 6, 4, 7, 2, 5, 3, 4, 6), layers=1)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(rank)).tolist()
    laplace = blk.LaplaceLoRA(case.model, fisher="empirical", rank=None, **case.arguments)
    for loader, expected in (
        ([case.batch(order[i : i + 3], side="left" if rank else "right") for i in range(0, 10, 3)], size > 1),
        (own_loader(case, group, "turns"), False),
    ):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            laplace.fit(loader, progress=False, group=group)
        said = [str(one.message) for one in seen if "the same examples" in str(one.message)]
        assert [one[:48] for one in said] == ["fit: ranks 0 and 1 of the group were given the s"] * expected


def check_random(group: Any, seed: int) -> None:
    """Any settings, models and shares, in batches of any size.

    Eigenvectors of eigenvalues that are close move by more than rounding, and EKFAC's posterior with them: one process
    that takes the same batches in another order differs by up to 4e-10, too.
    """
    draw = random.Random(seed)
    case = draw.choice([mlp, llama, bert])()
    rank, size, n = dist.get_rank(group), dist.get_world_size(group), len(case.examples)
    owners = [draw.randrange(size) for _ in range(n)]
    own = [i for i in range(n) if owners[i] == rank]
    step = draw.randint(1, 3)
    loader = [case.batch(own[i : i + step]) for i in range(0, len(own), step)]
    settings = {
        "curvature": draw.choice(["kfac", "ekfac"]),
        "tokens": draw.choice(["expand", "reduce", "last"]),
        "fisher": draw.choice(["exact", "empirical"]),
        "seed": draw.randint(-5, 5),
        "prior_precision": 10 ** draw.uniform(-2, 2),
    }
    single, shared = both(case, loader, group, **settings)
    check_factors(single, shared)
    check_equal(single, shared, case, group, tolerance=1e-8)


def check_sampler(group: Any) -> None:
    """What a `DistributedSampler` repeats counts once."""
    case, size = mlp(n=10), dist.get_world_size(group)
    data = [*zip(case.examples, case.labels, strict=True)]
    loader = DataLoader(data, 2, sampler=DistributedSampler(data, size, dist.get_rank(group), shuffle=True))
    single, shared = both(case, loader, group, curvature="ekfac")
    check_factors(single, shared)
    check_equal(single, shared, case, group)


def check_labels(group: Any) -> None:
    """A likelihood of all labels is known where all processes have them, whatever the others know."""
    case = mlp(n=6)
    inputs, labels = case.batch()
    loader = [inputs if dist.get_rank(group) == 0 else (inputs, labels)]
    laplace = blk.LaplaceLoRA(case.model, fisher="exact", rank=None).fit(loader, progress=False, group=group)
    assert laplace.n_examples == 6 * dist.get_world_size(group)
    assert laplace.log_likelihood is None


def check_samples(group: Any) -> None:
    """Targets are drawn anew on every process: equal data do not give it the same gradients twice."""
    case, size = mlp(n=6), dist.get_world_size(group)
    settings = {"fisher": "mc", "rank": None}
    single = blk.LaplaceLoRA(case.model, **settings).fit(case.loader(6), progress=False)
    shared = blk.LaplaceLoRA(case.model, **settings).fit(case.loader(6), progress=False, group=group)
    for name, factors in single.factors.items():
        assert relative(shared.factors[name].a, factors.a) < EXACTLY
        assert (relative(shared.factors[name].s, size * factors.s) > 1e-3) == (size > 1)
    check_same_bits(shared, group)


def check_gathered(group: Any, kind: str) -> None:
    """Predictions of everybody's examples, in the order of the ranks, on all processes."""
    case = mlp(n=7)
    single, shared = both(case, own_loader(case, group, "turns"), group)
    own = share(len(case.examples), group, kind)
    batch = case.batch(own) if own else None
    order = [i for part in everyone(own, group) for i in part]
    for arguments in ({}, {"outputs": 2}, {"outputs": torch.tensor([2, 0])}, {"differences": True}):
        found, expected = shared.predict(batch, gather=group, **arguments), single.predict(case.batch(), **arguments)
        assert relative(found.mean, expected.mean[order]) < EXACTLY
        assert relative(found.covariance, expected.covariance[order]) < EXACTLY
        if expected.indices is None:
            assert found.indices is None
        else:
            assert torch.equal(
                found.indices, expected.indices[order] if expected.indices.ndim == 2 else expected.indices
            )
    assert relative(found.probs(), single.predict(case.batch(), differences=True).probs()[order]) < 1e-9


def check_scores(group: Any) -> None:
    """Texts of other lengths on every process; the last has none."""
    case = llama((5, 3, 6, 4), classes=None, layers=1)
    laplace = blk.LaplaceLoRA(case.model, fisher="empirical", rank=None).fit(case.loader(2), progress=False)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parts = [[*range(4)]] if size == 1 else [[0, 1], *[[2, 3]] * (size == 3), []][:size]
    batch = case.batch(parts[rank]) if parts[rank] else {"input_ids": torch.zeros(0, 3, dtype=torch.long)}
    found = laplace.score(batch, 8, torch.Generator().manual_seed(3), gather=group)
    texts = [i for part in parts for i in part]
    assert found.mask.dtype == torch.bool
    for row, i in enumerate(texts):
        alone = laplace.score(case.batch([i]), 8, torch.Generator().manual_seed(3))
        length = len(case.examples[i])
        for name, value in found._asdict().items():
            assert relative(value[row, :length], getattr(alone, name)[0]) < 1e-8, name
            assert not value[row, length:].any()


def check_calibration(group: Any, kind: str) -> None:
    case, held_out = mlp(n=9), mlp(n=11)
    with torch.no_grad():
        held_out.labels = held_out.model(torch.stack(held_out.examples)).argmax(dim=1)
    held_out.labels[:4] = torch.tensor([0, 1, 2, 0])
    single, shared = both(case, own_loader(case, group, "turns"), group)
    single.calibrate(held_out.loader(4), progress=False)
    shared.calibrate(own_loader(held_out, group, kind), progress=False, group=group)
    assert single.calibration is not None
    assert shared.calibration is not None
    assert shared.calibration.n_labels == single.calibration.n_labels == 11
    for name, weights in single.calibration.weights.items():
        assert relative(shared.calibration.weights[name], weights) < 1e-9
        assert len(set(everyone(shared.calibration.weights[name].numpy().tobytes(), group))) == 1
    precisions = []  # inside of the grid
    for laplace, loader, own in (
        (single, held_out.loader(4), None),
        (shared, own_loader(held_out, group, kind), group),
    ):
        laplace.optimize_prior_precision("nll", val_loader=loader, group=own)
        precisions.append(float(laplace.prior_precision))
    assert 1e-3 < precisions[0] < 1e3
    assert precisions[1] == pytest.approx(precisions[0], rel=1e-9)
    assert len(set(everyone(precisions[1], group))) == 1


def check_wrapped(group: Any, kind: str) -> None:
    """DistributedDataParallel with buffers, which it sends to all processes in forward: with shares of any length."""
    case = mlp(n=9)
    case.model.register_buffer("unused", torch.ones(3, dtype=torch.float64))
    single, _ = both(case, [*case.loader(9)] if dist.get_rank(group) == 0 else [], group)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(case.model))
    shared = blk.LaplaceLoRA(wrapped, fisher="exact", rank=None, prior_precision=0.7)
    shared.fit(own_loader(case, group, kind), progress=False, group=group)
    for name, one in single.factors.items():
        assert relative(shared.factors[f"module.{name}"].a, one.a) < EXACTLY
        assert relative(shared.factors[f"module.{name}"].s, one.s) < EXACTLY
    own = share(9, group, kind)
    if own:
        expected = single.predict(case.batch(own))
        assert relative(shared.predict(case.batch(own)).covariance, expected.covariance) < EXACTLY
    check_same_bits(shared, group)


def check_subgroup(group: Any) -> None:
    """Some of the processes, the last first; and its own timeout."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    members = [*range(size - 1, 0, -1)] or [0]
    part = dist.new_group(members, timeout=timedelta(seconds=42), use_local_synchronization=False)
    case = mlp(n=7)
    if rank not in members:
        with pytest.raises(ValueError, match="group: this process is not in it"):
            blk.LaplaceLoRA(case.model).fit(case.loader(2), progress=False, group=part)
        return
    assert Processes(part)._timeout == 42
    single, shared = both(case, own_loader(case, part, "uneven"), part)
    check_factors(single, shared)
    check_equal(single, shared, case, part)


def check_progress(group: Any) -> None:
    """One bar for all processes."""
    case, shown, bar = mlp(n=6), [], passes.tqdm
    passes.tqdm = lambda loader, **settings: shown.append(not settings["disable"]) or loader
    try:
        blk.LaplaceLoRA(case.model).fit(own_loader(case, group, "turns"), group=group)
    finally:
        passes.tqdm = bar
    assert shown == [dist.get_rank(group) == 0]
