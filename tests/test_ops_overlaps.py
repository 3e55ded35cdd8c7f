"""Which matrices share memory, against the sets of the addresses of their elements."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops.overlaps import check_apart, overlaps_itself, spans


def bytes_of(matrix):
    """The address of every byte of every element, one by one."""
    size, (down, right) = matrix.element_size(), matrix.stride()
    indices = itertools.product(range(matrix.shape[0]), range(matrix.shape[1]))
    return [matrix.data_ptr() + size * (i * down + j * right) + k for i, j in indices for k in range(size)]


STRIDES = st.tuples(st.integers(0, 7), st.integers(0, 7))
SHAPES = st.tuples(st.integers(0, 4), st.integers(0, 4))
MATRICES = st.lists(st.tuples(SHAPES, STRIDES, st.integers(0, 60), st.booleans()), min_size=1, max_size=4)


def matrix_of(memory, shape, stride, offset, half):
    return (memory.view(torch.float16) if half else memory).as_strided(shape, stride, offset)


@settings(max_examples=100, deadline=None)
@given(MATRICES, MATRICES)
def test_found_exactly_where_bytes_are_shared(outs, xs):
    memory = torch.zeros(120)
    outs = [matrix_of(memory, *one) for one in outs]
    xs = [matrix_of(memory, *one) for one in xs]
    for one in (*outs, *xs):
        addresses = bytes_of(one)
        assert overlaps_itself(one) == (len(set(addresses)) < len(addresses))
    outs = [one for one in outs if not overlaps_itself(one)]
    sets = [set(bytes_of(one)) for one in (*outs, *xs)]
    shared = {(i, j) for i, j in itertools.combinations(range(len(sets)), 2) if i < len(outs) and sets[i] & sets[j]}
    if not shared:
        check_apart("here", outs, xs, spans([*outs, *xs]))
        return
    names = [f"out of entry {i}" for i in range(len(outs))] + [f"x of entry {i}" for i in range(len(xs))]
    messages = [f"here: .* got {names[i]} overlapping {names[j]}$" for i, j in shared]
    with pytest.raises(ValueError, match="|".join(messages)):
        check_apart("here", outs, xs, spans([*outs, *xs]))


def test_operations_refuse_outputs_that_overlap_and_leave_them_alone():
    x, memory = torch.randn(6, 4), torch.zeros(8, 8)
    apart = [memory[:4, :4], memory[:4, 4:], memory[4:, ::2], memory[4:, 1::2]]
    ops.grouped_outer_product([x] * 4, outs=apart)
    for out in apart:
        torch.testing.assert_close(out.double(), x.double().T @ x.double(), rtol=1e-6, atol=1e-6)
    memory.zero_()
    for outs in ([apart[0], memory[3:7, 3:7]], [apart[0], apart[0]]):
        with pytest.raises(ValueError, match=r"grouped_outer_product: .*got out of entry 0 overlapping out of entry 1"):
            ops.grouped_outer_product([x, x], outs=outs)
    with pytest.raises(ValueError, match="got out of entry 1 overlapping x of entry 0"):
        ops.grouped_outer_product([memory[2:6, :4], x], outs=[apart[1], apart[0]])
    with pytest.raises(ValueError, match=r"^outer_product: .*got out of entry 0 overlapping x of entry 0"):
        ops.outer_product(memory[:4], out=memory)
    assert not memory.any()
