"""Flags that are looked at a batch later: what is raised, when, and of which batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bayesian_lora_kernels.model import deferred
from bayesian_lora_kernels.model.deferred import AT_ONCE, Deferred
from bayesian_lora_kernels.model.host import both, on_host, to_device

META = torch.device("meta")


@pytest.fixture
def numbers(monkeypatch):
    """What the flags of the meta device say when they arrive, one list for each batch that ends."""
    queue: list[list[bool]] = []
    monkeypatch.setattr(deferred, "_to_host", lambda flags: (torch.tensor(queue.pop(0)), None))
    return queue


def flags(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.bool, device=META)


def named(name: str):
    return lambda i: ValueError(f"{name}[{i}]")


def test_on_the_cpu_at_once():
    for checks in (AT_ONCE, Deferred()):
        checks.add(torch.tensor([False, False]), named("fine"))
        with pytest.raises(ValueError, match=r"^bad\[1\]$"):
            checks.add(torch.tensor([False, True, True]), named("bad"))
        checks.add(torch.tensor([True]), lambda _: None)  # no error after all


def test_on_a_device_one_batch_later(numbers):
    checks = Deferred()
    numbers += [[False, False, True, True], [False]]
    checks.prefix = "batch 0: "
    checks.add(flags(1), named("logits"))
    checks.prefix = ""
    checks.add(flags(3), named("inputs"))
    checks.end_batch()
    checks.prefix = "batch 1: "
    checks.add(flags(1), named("logits"))
    with pytest.raises(ValueError, match=r"^inputs\[1\]$"):  # the first that was added, of the batch before
        checks.end_batch()


def test_the_prefix_is_that_of_the_batch_of_the_flag(numbers):
    checks = Deferred()
    numbers += [[False], [True]]
    for batch in (0, 1):
        checks.prefix = f"batch {batch}: "
        checks.add(flags(1), named("logits"))
        checks.end_batch()
    checks.prefix = "batch 2: "
    with pytest.raises(ValueError, match=r"^batch 1: logits\[0\]$"):
        checks.end()


def test_the_last_batch_is_looked_at_in_the_end(numbers):
    checks = Deferred()
    numbers += [[True]]
    checks.add(flags(1), named("last"))
    with pytest.raises(ValueError, match=r"^last\[0\]$"):
        checks.end()


def test_numbers_of_a_device_that_the_host_knows():
    host = torch.tensor([[1, 1, 0], [1, 0, 0]])
    moved = to_device(host, META)
    assert on_host(moved).equal(host)
    assert on_host(moved[1:, :2]).equal(host[1:, :2])
    valid = both(lambda mask: mask != 0, moved)
    assert valid.device == META
    assert on_host(valid).equal(host != 0)
    moved[0] = 0  # what is known is out of date
    assert on_host(moved) is moved
    assert on_host(both(torch.logical_not, moved)).device == META
