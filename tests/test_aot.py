"""What `python -m benchmarks.aot` accepts and refuses, and what it writes: without Triton."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest

from bayesian_lora_kernels.ops.shipped import ARCHITECTURES, Shipped
from benchmarks import aot

SHIPPED = Shipped("product bf16 64x64", None, {}, {}, num_warps=4, num_stages=3)
GOOD = aot.Compiled(registers=128, stack=0, shared=49152, ptx={"mma": 32, "fma": 4})


def refusal(architecture="sm_90", compiled=GOOD, **changes):
    return aot.problem(architecture, dataclasses.replace(SHIPPED, **changes), compiled)


def test_a_spill_needs_a_reason_for_its_architecture():
    spilled = dataclasses.replace(GOOD, stack=8)
    assert refusal() == ""
    assert refusal(compiled=spilled) == "8 bytes of stack"
    assert refusal(compiled=spilled, stack={"sm_80": "why"}) == "8 bytes of stack"
    assert refusal(compiled=spilled, stack={"sm_90": "why"}) == ""
    assert refusal(compiled=spilled, stack={"all": "why"}) == ""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_memory_within_what_a_block_gets(architecture):
    limit = ARCHITECTURES[architecture][1]
    assert refusal(architecture, dataclasses.replace(GOOD, shared=limit)) == ""
    assert "shared memory" in refusal(architecture, dataclasses.replace(GOOD, shared=limit + 1))


def test_matrix_instructions_as_meant():
    plain, warp = dataclasses.replace(GOOD, ptx={"fma": 64}), GOOD
    group = dataclasses.replace(GOOD, ptx={"wgmma": 4})
    assert refusal(compiled=plain) == ""
    assert refusal(compiled=plain, matrix="mma") == "no matrix instruction"
    assert refusal(compiled=warp, matrix="mma") == refusal(compiled=group, matrix="mma") == ""
    assert refusal(compiled=warp, matrix="best") == "no wgmma"
    assert refusal(compiled=group, matrix="best") == ""
    assert refusal("sm_80", warp, matrix="best") == ""
    assert refusal("sm_100", group, matrix="best") == "no tcgen05"
    assert refusal(compiled=plain, matrix="fma") == ""
    assert "mma" in refusal(compiled=warp, matrix="fma")


def test_every_problem_is_named():
    bad = aot.Compiled(registers=255, stack=16, shared=1 << 20, ptx={})
    assert refusal(compiled=bad, matrix="best").count(";") == 2
    assert refusal(compiled=aot.Compiled(error="PTXASError: no")) == "does not compile: PTXASError: no"


def test_instructions_are_counted():
    ptx = """
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2;
    wgmma.wait_group.sync.aligned 0;
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}, {%r1};
    @%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p2;
    tcgen05.ld.sync.aligned.32x32b.x64.b32 {%r1}, [%r2];
    fma.rn.f32 %f1, %f2, %f3, %f4;
    fma.rn.f32x2 %rd1, %rd2, %rd3, %rd4;
    fma.rn.f64 %fd1, %fd2, %fd3, %fd4;
    fma.rn.bf16 %rs1, %rs2, %rs3, %rs4;
    """
    assert aot.count_instructions(ptx) == {"wgmma": 1, "tcgen05": 1, "mma": 1, "fma": 3}
    assert aot.count_instructions("ret;") == {}


def test_two_configurations_of_one_name_are_an_error(monkeypatch):
    module = SimpleNamespace(shipped=lambda architecture: [SHIPPED, SHIPPED])
    monkeypatch.setitem(sys.modules, "shipped_twice", module)
    with pytest.raises(ValueError, match="same name"):
        aot.shipped_by("shipped_twice", "sm_90")


def test_a_kernel_is_one_row_of_the_table():
    rows = [aot.Row(aot.Task("", name, SHIPPED.name), SHIPPED, GOOD) for name in ("sm_80", "sm_90")]
    other = dataclasses.replace(SHIPPED, name="other", stack={"sm_90": "a reason"})
    spilled = dataclasses.replace(GOOD, stack=8)
    rows.append(aot.Row(aot.Task("", "sm_90", "other"), other, spilled))
    assert aot.table(rows).splitlines()[2:] == [
        "| product bf16 64x64 | 4 | 3 | 128 / 0 / 49152 / 32 mma 4 fma | 128 / 0 / 49152 / 32 mma 4 fma |",
        "| other | 4 | 3 |  | 128 / 8 / 49152 / 32 mma 4 fma |",
    ]
    text = aot.document(rows, "3.9.0")
    assert "- other, sm_90: a reason" in text
    assert "make aot" in text
