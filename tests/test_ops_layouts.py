"""What is remembered of lists of tensors is their layouts, and nothing that a layout does not tell."""

from __future__ import annotations

import pytest
import torch

from bayesian_lora_kernels.ops import layouts as module
from bayesian_lora_kernels.ops.layouts import addresses, device_table, layouts, once_per_layout

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
def test_validates_once_for_each_combination_of_layouts(monkeypatch, other):
    monkeypatch.setattr(module, "REMEMBERED", 1)
    seen = []
    check = once_per_layout(lambda xs, outs: seen.append(xs))
    for xs in ([X], [torch.randn(6, 8)], [other], [other], [X]):  # the last one is forgotten by then
        check(xs, None)
    assert [xs[0] is other for xs in seen] == [False, True, False]
    assert layouts([other]) != layouts([X])


def test_what_is_not_valid_is_not_remembered():
    def refuse(xs):
        raise ValueError("never")

    check = once_per_layout(refuse)
    for _ in range(2):
        with pytest.raises(ValueError, match="never"):
            check([X])


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (X, True),
        (X.half(), True),
        (X[:, :4], True),
        (X.half()[:, :4], False),  # 8 bytes
        (X[:, 1:5], False),
        (X[:, ::2], False),
        (torch.randn(6, 9)[:, :8], False),
        (X[:0], True),
    ],
)
def test_rows_of_aligned_vectors(x, expected):
    assert layouts([x])[0].in_vectors is expected
    starts = [row.data_ptr() % 16 for row in x]
    assert not expected or not any(starts)


def test_a_table_has_one_row_per_module_in_the_order_asked_for():
    tensors = [torch.randn(3), None, torch.randn(2)]
    fixed, order = torch.tensor([[7, 8], [9, 10], [11, 12]]), torch.tensor([2, 0, 1])
    with torch.device("meta"):
        table = device_table([addresses(tensors), [1, 2, -3]], fixed, order, torch.device("cpu"))
    assert table.tolist() == [[tensors[2].data_ptr(), -3, 7, 8], [tensors[0].data_ptr(), 1, 9, 10], [0, 2, 11, 12]]
