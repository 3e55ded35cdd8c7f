"""Which examples another number of processes had counted: told by digests of each, however it is padded."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from models import pad
from torch import Tensor

from bayesian_lora_kernels.curvature.factors import KroneckerSums
from bayesian_lora_kernels.curvature.takeover import counter, elements, example_digests, own_part, uncounted
from bayesian_lora_kernels.curvature.totals import Totals
from bayesian_lora_kernels.model.batches import Batch


def texts(lengths: tuple[int, ...] = (5, 3, 6, 2)) -> list[Tensor]:
    return [torch.arange(1, n + 1) for n in lengths]


def digests(batch: Any) -> list[bytes]:
    found = example_digests(batch)
    assert found is not None
    return [bytes(row.tolist()) for row in found]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(side):
    labels = torch.tensor([0, 1, 0, 1])
    alone = [digests(pad([ids], label[None]))[0] for ids, label in zip(texts(), labels, strict=True)]
    assert len(set(alone)) == 4
    assert digests(pad(texts(), labels, side, extra=3)) == alone
    assert digests((pad(texts(), labels, side), labels)) != alone  # another kind of batch


def test_labels_of_tokens():
    def batch(labels: list[int], extra: int) -> dict[str, Tensor]:
        ids = torch.tensor([[7, 7, 7, 7] + [0] * extra])
        return {
            "input_ids": ids,
            "attention_mask": (ids > 0).long(),
            "labels": torch.tensor([labels + [-100] * extra]),
        }

    same = [digests(batch([-100, 7, 7, -100], extra)) for extra in (0, 1, 5)]
    assert same[0] == same[1] == same[2]
    others = [[-100, 7, 7, 7], [-100, -100, 7, 7], [-100, 7, 8, -100], [7, 7, -100, -100], [-100] * 4]
    assert len({same[0][0], *(digests(batch(labels, 1))[0] for labels in others)}) == 1 + len(others)


def test_every_number_counts():
    ids, labels = torch.arange(1, 9).reshape(2, 4), torch.tensor([0, 1])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "weight": torch.rand(2, 3)}
    first = digests(batch)
    for key in ("input_ids", "labels", "weight"):
        changed = {name: value.clone() for name, value in batch.items()}
        changed[key][1] += 1
        assert [a == b for a, b in zip(digests(changed), first, strict=True)] == [True, False], key


def test_what_cannot_be_told_apart():
    assert example_digests({"inputs": torch.rand(2, 3), "labels": torch.zeros(2).long(), "all": torch.rand(7)}) is None
    assert example_digests((object(), torch.zeros(2).long())) is None


class Group:
    """The shares of other processes."""

    def __init__(self, rank: int, shares: list[Tensor]):
        self.rank, self.shares = rank, shares

    def gather(self, own: Tensor) -> list[Tensor]:
        assert torch.equal(own, self.shares[self.rank])
        return self.shares


def test_examples_that_are_there_several_times_are_skipped_as_often_as_they_were_counted():
    loaders = [[torch.tensor([[1.0], [1.0], [2.0]])], [torch.tensor([[1.0]]), torch.tensor([[3.0], [2.0]])]]
    shares = [torch.cat([example_digests(batch) for batch in loader]) for loader in loaders]
    one, two, three = (counter(example_digests(torch.tensor([[x]]))) for x in (1.0, 2.0, 3.0))
    for counted in (one, one + one, one + one + one + two, two + two + three, Counter()):
        parts = [own_part(counted, loaders[rank], Group(rank, shares)) for rank in (0, 1)]
        assert parts[0] + parts[1] == counted
        left: Counter[bytes] = Counter()
        for loader, part in zip(loaders, parts, strict=True):
            for batch in loader:
                for rest, found in uncounted(batch, example_digests(batch), part):
                    assert torch.equal(found, example_digests(rest))
                    left += counter(found)
            assert part.total() == 0
        assert left + counted == counter(torch.cat(shares))
    assert own_part(two + two + two, loaders[0], Group(0, shares)) is None
    assert torch.equal(elements(Counter()), torch.empty(0, 16, dtype=torch.uint8))
    assert counter(elements(one + one + two)) == one + one + two


def test_what_is_left_of_a_batch():
    batch = pad(texts(), torch.tensor([0, 1, 0, 1]))
    found = example_digests(batch)
    parts = list(uncounted(batch, found, counter(found[[0, 2]])))
    assert [Batch.of(part).size for part, _ in parts] == [1, 1]
    assert torch.equal(parts[1][0]["input_ids"], batch["input_ids"][3:])
    assert list(uncounted(batch, found, counter(found))) == []
    ((whole, _),) = uncounted(batch, found, Counter())
    assert whole is batch


def test_totals_of_two_processes_are_those_of_one():
    shares = [
        Totals(3, 5, torch.tensor(-2.0), True, [1, 4]),
        Totals(2, 2, torch.tensor(-0.5), False, [2]),
        Totals(1, 1, None, True, []),
    ]
    found = Totals()
    for share in shares:
        found.join(share.state())
    assert found == Totals(6, 8, torch.tensor(-2.5), False, [1, 2, 4])


@pytest.mark.parametrize("rank", [None, 1])
def test_sums_of_two_processes_are_those_of_one(rank):
    """Also where one of them lets layers share an input and the other does not, or did not call a layer."""
    from dense import relative

    from bayesian_lora_kernels import LaplaceConfig
    from bayesian_lora_kernels.model.capture import LayerInput

    torch.manual_seed(0)
    config = LaplaceConfig(rank=rank, rank_threshold=4)
    x, y, z = (torch.randn(40, 3, 20, dtype=torch.float64) for _ in range(3))

    def add(sums: KroneckerSums, inputs: dict[str, Tensor]) -> None:
        recorded = {name: LayerInput(value, None, (id(value),)) for name, value in inputs.items()}
        sums.add_inputs(recorded)
        sums.add_gradients({name: value[..., :7] * 2 for name, value in inputs.items()}, recorded)

    shares = [{"q": x, "k": x, "v": x}, {"q": y, "k": y, "v": z, "o": z}]
    both, first, second = (KroneckerSums(config) for _ in range(3))
    for share, own in zip(shares, (first, second), strict=True):
        add(both, share)
        add(own, share)
    first.join(second.state())
    assert first.input_rows == both.input_rows
    found, expected = first.factors(), both.factors()
    assert (found["q"].a is found["k"].a) == (expected["q"].a is expected["k"].a) is True
    assert found["q"].a is not found["v"].a
    for name, one in expected.items():
        for side in ("a", "s"):
            got, want = getattr(found[name], side), getattr(one, side)
            if rank is None:
                assert relative(got, want) < 1e-12
            else:
                truth = torch.cat([share[name] for share in shares if name in share]).reshape(-1, 20)
                truth = truth[:, : len(want)] * (1 if side == "a" else 2)
                best = torch.linalg.eigvalsh(truth.mT @ truth)[-1]
                assert float((got.mT @ got)[0, 0]) == pytest.approx(
                    float(best) / (len(truth) if side == "a" else 1), rel=0.1
                )
