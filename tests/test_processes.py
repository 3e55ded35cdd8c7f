"""Fits of several processes: some of what `make test-distributed` compares with one process, and what goes wrong."""

from __future__ import annotations

import itertools
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from models import mlp
from ranks import checks, faults
from ranks.start import run
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.curvature import shares
from bayesian_lora_kernels.curvature.reduction import TOGETHER, leading
from bayesian_lora_kernels.processes import Processes
from benchmarks import traffic

OTHER = "OtherProcessError: rank 1 of the group"


def some_checks(group):
    checks.check_mlp(group, "uneven", curvature="ekfac")
    checks.check_low_rank(group, "empty")
    checks.check_moods(group)
    checks.check_sampler(group)
    checks.check_labels(group)
    checks.check_samples(group)
    checks.check_gathered(group, "empty")
    checks.check_calibration(group, "uneven")
    return "equal"


def test_two_processes_are_as_one(tmp_path):
    assert run(some_checks, 2, tmp_path) == ["equal"] * 2


def test_a_process_that_rounds_otherwise_takes_the_numbers_of_the_first(tmp_path):
    assert run(faults.rounds_otherwise, 2, tmp_path) == ["nothing wrong"] * 2


def test_traffic_is_as_modelled_whatever_the_number_of_batches(tmp_path):
    held = traffic.Held.of(traffic.small_layers(traffic.Chain()), LaplaceConfig(**traffic.SMALL))
    for curvature in ("kfac", "ekfac"):
        found = [run(traffic.sent, 2, tmp_path, batches, curvature) for batches in (1, 5)]
        assert found[0] == found[1]
        assert found[0] == pytest.approx([held.sent(2, curvature)] * 2, rel=0.01)


def test_the_table_of_traffic_is_that_of_the_model():
    document = (Path(traffic.__file__).parents[1] / "docs" / "performance.md").read_text()
    for row in traffic.modelled():
        assert row in document


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_what_one_process_raises_all_of_them_raise_and_go_on(tmp_path):
    error = "ValueError: batch 1: labels: expected class indices from 0 to 2, got 8"
    found = run(faults.bad_label, 3, tmp_path)
    assert found[1] == [error, "nothing wrong"]
    assert found[0] == found[2] == [f"{OTHER} failed: {error}", "nothing wrong"]


def test_an_interrupt_on_one_process(tmp_path):
    assert run(faults.interrupted, 2, tmp_path) == [f"{OTHER} failed: KeyboardInterrupt: ", "KeyboardInterrupt"]


def test_a_killed_process_is_named_within_the_timeout(tmp_path):
    """Going on from its checkpoint: test_checkpoint_ranks.py."""
    found = run(faults.killed, 3, tmp_path, 1, timeout=8)
    assert found[1] is None
    for error in (found[0], found[2]):
        assert error.startswith(f"{OTHER} did not come within its timeout of 8 s: killed")


def test_the_process_that_keeps_the_store_is_killed(tmp_path):
    found = run(faults.killed, 2, tmp_path, 0, timeout=8)
    assert found[0] is None
    assert "the store of the group does not answer; the process that keeps it, as a rule rank 0, was killed" in found[1]


def test_a_failure_while_the_others_add_up(tmp_path):
    found = run(faults.in_a_reduction, 2, tmp_path, timeout=8)
    assert found == [f"{OTHER} failed: MemoryError: no more", "MemoryError: no more"]


def test_processes_that_differ(tmp_path):
    first, second = run(faults.other_settings, 2, tmp_path)
    assert first == second
    for error, part in zip(
        first,
        (
            "tokens is 'expand' on rank 0 and 'reduce' on rank 1",
            "layers is ['first', 'twice', 'last'] on rank 0 and ['first', 'last'] on rank 1",
            "SHA-256 of the posterior's weights is",
            "SHA-256 of the base model's is",
        ),
        strict=True,
    ):
        assert error.startswith(f"ValueError: group: expected the same on all processes, {part}")


def test_what_a_group_cannot_be_served(tmp_path):
    found = run(faults.refused, 2, tmp_path)
    assert found[0]["own kind"].startswith("ValueError: group: curvature='alone' measures the data of its own process")
    assert found[0]["no data"] == "ValueError: loader: expected at least one batch with at least one example, got none"
    assert "rank 1 of the group failed: ValueError: loader: expected share 1 of 2" in found[0]["same share"]
    assert "expected share 1 of 2, as this process is in the group" in found[1]["same share"]
    for name, part in (
        ("prior", "the prior precision of first is 1.0 on rank 0 and 2.0 on rank 1"),
        ("logits", "outputs: expected the same on all processes, got [1, 2] and [0, 1]"),
        ("count", "predict: expected as many logits on all processes, got [2] and [3]"),
        ("vocabulary", "gather: not of a vocabulary"),
        ("nobody", "predict: expected at least one example, no process has any"),
    ):
        assert found[0][name] == found[1][name]
        assert part in found[0][name]


def test_a_group_must_be_one():
    case = mlp()
    with pytest.raises(TypeError, match=r"group: expected a torch\.distributed process group, .* got str"):
        blk.LaplaceLoRA(case.model).fit(case.loader(2), progress=False, group="all")


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, TOGETHER, TOGETHER + 3])
def test_merged_columns_are_the_best_of_their_rank(count):
    decay = 0.5 ** torch.arange(8, dtype=torch.float64)
    estimates = [torch.randn(30, 8, dtype=torch.float64) * decay for _ in range(count)]
    merged = leading(estimates, 8)
    total = sum(b @ b.T for b in estimates)
    error = float(torch.linalg.matrix_norm(total - merged @ merged.T))
    best = float(torch.linalg.eigvalsh(total).flip(0)[8:].norm())
    assert error <= best * (1 + 1e-9) + 1e-9 if count <= TOGETHER else error < 1.05 * best


def test_random_streams_are_independent():
    first, other = Processes(), Processes()
    other.rank = 1
    assert first.seed(5) == 5
    assert len({other.seed(5), other.seed(6), other.seed(-1), 5}) == 4
    torch.Generator().manual_seed(other.seed(-1))


# ---- shares ----------------------------------------------------------------------------------------------------------


class Numbers(Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return torch.randn(4, dtype=torch.float64), index % 3


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Numbers(8)[i] for i in range(8))


class SizedStream(Stream):
    def __len__(self):
        return 8


def sharded(n, batch=2, even=True, drop=False, split=False):
    batches = BatchSampler(SequentialSampler(range(n)), batch, drop)
    return DataLoader(Numbers(n), batch_sampler=BatchSamplerShard(batches, 2, 1, split, even))


LOADERS = {
    "all": (DataLoader(Numbers(8), 2), None),
    "list": ([(torch.ones(1, 4), [0])], None),
    "alone": (DataLoader(Numbers(8), sampler=DistributedSampler(Numbers(8), 1, 0)), None),
    "sampler": (DataLoader(Numbers(8), 2, sampler=DistributedSampler(Numbers(8), 2, 1)), False),
    "sampler that repeats": (DataLoader(Numbers(7), 2, sampler=DistributedSampler(Numbers(7), 2, 1)), True),
    "sampler that drops": (
        DataLoader(Numbers(7), 2, sampler=DistributedSampler(Numbers(7), 2, 1, drop_last=True)),
        False,
    ),
    "in batches": (
        DataLoader(Numbers(8), batch_sampler=BatchSampler(DistributedSampler(Numbers(8), 2, 1), 2, False)),
        False,
    ),
    "shard": (sharded(8), False),
    "shard that repeats": (sharded(7), True),
    "shard of half a round": (sharded(6), True),
    "uneven shard": (sharded(7, even=False), False),
    "shard that drops": (sharded(7, drop=True), False),
    "split shard": (sharded(6, split=True), False),
    "split shard that repeats": (sharded(7, split=True), True),
    "stream": (DataLoader(IterableDatasetShard(Stream(), 2, False, 2, 1), 2), True),
    "sized stream": (DataLoader(IterableDatasetShard(SizedStream(), 2, False, 2, 1), 2), False),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_share_of_a_loader(name):
    loader, repeats = LOADERS[name]
    found = shares.share_of(loader)
    if repeats is None:
        assert found is None
    else:
        assert (found.size, found.rank, found.repeats) == (2, 1, repeats)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", ["sampler", "shard", "split shard"])
def test_the_shares_of_a_group_have_every_example_once(kind, size, monkeypatch):
    """The places in the data that all processes are given, for data and batches of every length."""
    monkeypatch.setattr(shares.Batch, "of", staticmethod(lambda batch: Rows(batch)))
    for n, batch, shuffle in itertools.product(range(1, 14), (1, 2, 3), (False, True)):
        if kind == "split shard":
            batch *= size
        seen = []
        for rank in range(size):
            loader = shard_of(kind, n, batch, rank, size, shuffle)
            group = SimpleNamespace(group=object(), rank=rank, size=size)
            for rows in shares.own_share(loader, group, "fit", Rows):
                seen += rows
        assert sorted(seen) == [*range(n)], (n, batch, shuffle)


class Rows:
    """A batch that is a list of places."""

    def __init__(self, given):
        self.given, self.size = given, len(given)

    def rows(self, start, stop):
        return Rows(self.given[start:stop])


def shard_of(kind, n, batch, rank, size, shuffle):
    if kind == "sampler":
        sampler = DistributedSampler(range(n), size, rank, shuffle=shuffle, seed=3)
        return DataLoader(range(n), batch, sampler=sampler, collate_fn=list)
    order = (
        RandomSampler(range(n), generator=torch.Generator().manual_seed(n)) if shuffle else SequentialSampler(range(n))
    )
    shard = BatchSamplerShard(BatchSampler(order, batch, False), size, rank, split_batches=kind == "split shard")
    return DataLoader(range(n), batch_sampler=shard, collate_fn=list)


def test_repeats_that_cannot_be_told_are_refused():
    group = SimpleNamespace(group=object(), rank=1, size=2)
    sampler = DistributedSampler(range(7), 2, 1)
    for loader in (
        LOADERS["stream"][0],
        DataLoader(range(7), batch_sampler=Odd(sampler, 2, False)),
    ):
        with pytest.raises(ValueError, match=r"repeats examples .* count twice\. DataLoader\(Subset\(dataset, range\("):
            shares.own_share(loader, group, "fit")
    loader = DataLoader(range(7), 2, sampler=sampler, collate_fn=lambda rows: torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"the examples that its sampler chose, .* a batch of 3 in place of 2"):
        [*shares.own_share(loader, group, "fit")]
    for what, share in (
        (r"expected share 1 of 2, .* gives share 0 of 2", (2, 0)),
        (r"share 1 of 2, .* 1 of 3", (3, 1)),
    ):
        loader = DataLoader(range(6), sampler=DistributedSampler(range(6), *share))
        with pytest.raises(ValueError, match=rf"{what}"):
            shares.own_share(loader, group, "fit")


class Odd(BatchSampler):
    """Nobody knows how it makes batches."""


def test_a_share_without_a_group_is_warned_of():
    laplace = blk.LaplaceLoRA(mlp().model)
    loader = LOADERS["sampler"][0]
    with pytest.warns(
        UserWarning, match=r"fit: the loader's DistributedSampler gives this process one of 2 shares"
    ) as seen:
        laplace.fit(loader, progress=False)
    assert seen[0].filename == __file__
    assert laplace.n_examples == 4
    with pytest.warns(UserWarning, match=r"calibrate: the loader's .* gives this process one of 2 shares"):
        laplace.calibrate(loader, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        laplace.fit(LOADERS["all"][0], progress=False)


def test_other_processes_are_told_of_once(monkeypatch, caplog):
    shares._say_alone.cache_clear()
    for name, value in (("is_initialized", True), ("get_world_size", 4)):
        monkeypatch.setattr(shares.dist, name, lambda value=value: value)
    laplace, loader = blk.LaplaceLoRA(mlp().model), mlp().loader(2)
    with caplog.at_level(logging.INFO, logger="bayesian_lora_kernels"):
        for _ in range(2):
            laplace.fit(loader, progress=False)
    shares._say_alone.cache_clear()
    said = [record.getMessage() for record in caplog.records if "group" in record.getMessage()]
    assert said == ["fit: by this process alone, of 4; group=torch.distributed.group.WORLD shares it among them"]
