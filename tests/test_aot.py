"""What `python -m benchmarks.aot` accepts and refuses, and what it writes: without Triton."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from benchmarks import aot
from benchmarks.recorder import ARCHITECTURES, Launch

GOOD = aot.Compiled(registers=128, stack=0, shared=49152, ptx={"mma": 32, "fma": 4})


def refusal(architecture="sm_90", compiled=GOOD, **expected):
    return aot.problem(architecture, aot.Expected(**expected), compiled)


def test_a_spill_needs_a_reason_for_its_architecture():
    spilled = dataclasses.replace(GOOD, stack=8)
    assert refusal() == ""
    assert refusal(compiled=spilled) == "8 bytes of stack"
    assert refusal(compiled=spilled, stack={"sm_80": "why"}) == "8 bytes of stack"
    assert refusal(compiled=spilled, stack={"sm_90": "why"}) == ""
    assert refusal(compiled=spilled, stack={"all": "why"}) == ""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_memory_within_what_a_block_gets(architecture):
    limit = aot.CAPABILITIES[architecture][1]
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


def launch(kernel, **constants):
    function = SimpleNamespace(fn=SimpleNamespace(__name__=f"{kernel}_kernel", __module__="ops.operation.kernel"))
    return Launch(function, {"x_ptr": "*bf16"}, constants, (), 4, 3, False, None)


def test_what_is_expected_of_a_kernel():
    assert aot.expected(launch("outer_product", BD=64)).matrix == "best"
    assert aot.expected(launch("outer_product", BD=32)).matrix == "mma"
    assert aot.expected(launch("wide_input", C_=4, O_=16)).matrix == "best"
    assert aot.expected(launch("wide_input", C_=4, O_=8)).matrix == "mma"
    assert aot.expected(launch("product", BV=128, PRECISION="ieee")).matrix == "best"
    assert aot.expected(launch("product", BV=64, PRECISION="tf32x3")).matrix == "mma"
    assert aot.expected(launch("narrow_rows", C_=2, O_=8)).matrix == "mma"
    assert aot.expected(launch("merge")) == aot.expected(launch("orthonormalise", BL=64)) == aot.Expected()
    assert list(aot.expected(launch("orthonormalise", BL=128)).stack) == ["all"]


def test_a_name_says_everything_but_the_alignment():
    one = launch("outer_product", stride_o1=1, HAS_MASK=True, SPLIT=False, PRECISION="ieee", BD=64)
    assert one.name == "operation outer_product bf16 stride_o1=1 HAS_MASK ieee BD=64 w4 s3"
    assert dataclasses.replace(one, max_registers=128).name == f"{one.name} r128"


def test_a_kernel_is_one_row_of_the_table():
    rows = [aot.Row(aot.Task(name, "product"), aot.Expected(), GOOD) for name in ("sm_80", "sm_90")]
    spilled = dataclasses.replace(GOOD, stack=8)
    rows.append(aot.Row(aot.Task("sm_90", "other"), aot.Expected(stack={"sm_90": "a reason"}), spilled))
    assert aot.table(rows).splitlines()[2:] == [
        "| product | 128 / 0 / 49152 / 32 mma 4 fma | 128 / 0 / 49152 / 32 mma 4 fma |",
        "| other |  | 128 / 8 / 49152 / 32 mma 4 fma |",
    ]
    text = aot.document(rows, "3.9.0")
    assert "- other, sm_90: a reason" in text
    assert "make aot" in text
