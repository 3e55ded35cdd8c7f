"""What is remembered of lists of tensors is their layouts, and nothing that a layout does not tell."""

from __future__ import annotations

import pytest
import torch

from bayesian_lora_kernels.ops import layouts
from bayesian_lora_kernels.ops.layouts import addresses, device_table, per_layout

X = torch.randn(6, 8)
OTHERS = {
    "dtype": X.half(),
    "shape": torch.randn(5, 8),
    "stride": torch.randn(8, 6).T,
    "device": X.to("meta"),
    "alignment": torch.randn(49)[1:].view(6, 8),
    "none": None,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_called_once_for_each_combination_of_layouts(other):
    calls = []

    @per_layout
    def count(xs, outs, accumulate):
        calls.append(xs[0])
        return len(calls)

    asked = [X], [torch.randn(6, 8)], [other], [other], [X]
    assert [count(xs, None, False) for xs in asked] == [1, 1, 2, 2, 1]
    assert calls[1] is other
    assert [count([X], [True], False), count([X], None, True), count((X,), None, False)] == [3, 4, 1]


def test_few_are_remembered_and_no_error(monkeypatch):
    monkeypatch.setattr(layouts, "REMEMBERED", 2)
    calls = []

    @per_layout
    def shape(xs):
        calls.append(xs[0].shape[0])
        if xs[0].shape[0] == 0:
            raise ValueError("empty")

    for _ in range(2):
        with pytest.raises(ValueError, match="empty"):
            shape([X[:0]])
    for rows in (1, 2, 1, 2, 3, 1):
        shape([X[:rows]])
    assert calls == [0, 0, 1, 2, 3, 1]


def test_a_table_has_one_row_per_module_in_the_order_asked_for():
    tensors = [torch.randn(3), None, torch.randn(2)]
    fixed, order = torch.tensor([[7, 8], [9, 10], [11, 12]]), torch.tensor([2, 0, 1])
    with torch.device("meta"):
        table = device_table([addresses(tensors), [1, 2, -3]], fixed, order, torch.device("cpu"))
    assert table.tolist() == [[tensors[2].data_ptr(), -3, 7, 8], [tensors[0].data_ptr(), 1, 9, 10], [0, 2, 11, 12]]
