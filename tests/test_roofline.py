"""What an estimate is made of: the path of a thread, loops of machine code, and the arithmetic of what bounds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cases import all_cases
from benchmarks.roofline import estimate, gpus, program, ptx, sass, steps
from benchmarks.roofline.__main__ import MARKS, RESULTS, chosen, document, insert, target_us

ROOT = Path(__file__).parents[1]
# Rows of a table (pointer, length), a program each: loads 16 bytes a thread and step, of 4 * 32 elements.
KERNEL = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
.reqntid 32
{
	.reg .b64 	%rd<9>;
	.loc	1 30 0                          // kernel.py:30:0
	mov.u32 	%r1, %ctaid.x;
	mov.u32 	%r2, %tid.x;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r9, [kernel_param_1];
	mul.wide.u32 	%rd2, %r1, 16;
	add.s64 	%rd3, %rd1, %rd2;
	// begin inline asm
	mov.u64 %rd4, 0x0;
	ld.global.b64 { %rd4 }, [ %rd3 + 0 ];
	// end inline asm
	ld.global.b64 	%rd5, [%rd3+8];
	mad.wide.u32 	%rd4, %r2, 16, %rd4;
	cvt.u32.u64 	%r3, %rd5;
	mov.b32 	%r4, 0;
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
	setp.lt.s32 	%p1, %r4, %r3;
	@%p1 ld.global.v4.b32 { %r5, %r6, %r7, %r8 }, [ %rd4 + 0 ];
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2}, {%r5, %r6}, {%r7}, {%f1, %f2};
	add.s64 	%rd4, %rd4, 512;
	add.s32 	%r4, %r4, 128;
	setp.lt.s32 	%p2, %r4, %r9;
	@%p2 bra 	$L__BB0_1;
	setp.eq.b32 	%p3, %r5, 0;
	@%p3 bra 	$L__BB0_3;
	st.global.b32 	[%rd4+4], %r5;
$L__BB0_3:
	ret;
}
"""


def run(program_id, thread, words, most):
    special = {"%tid.x": thread, "%ctaid.x": program_id}
    return ptx.Thread(ptx.parse(KERNEL), [1000, most], special, words).run()


def test_a_thread_goes_where_the_table_and_the_arguments_send_it():
    words = {1000: 5000, 1008: 384, 1016: 90000, 1024: 100}
    first, second = run(0, 3, words, 512), run(1, 0, words, 512)
    of_table, also, loaded, stored = first.accesses
    assert (of_table.address, also.address) == (1000, 1008)
    assert (loaded.bytes, loaded.times, loaded.address, loaded.writes) == (16, 3, 5000 + 3 * 16, False)
    assert (stored.bytes, stored.times, stored.address, stored.writes) == (4, 1, 5000 + 48 + 4 * 512 + 4, True)
    assert second.accesses[2].address == 90000
    assert second.accesses[2].times == 1  # 100 elements: one step counts, the others are masked
    loop = next(i for i, block in enumerate(ptx.parse(KERNEL)) if block.name == "$L__BB0_1")
    assert first.blocks[loop] == second.blocks[loop] == 4
    assert run(0, 0, words, 1280).blocks[loop] == 10


def test_a_program_that_a_flag_in_memory_may_end_is_taken_to_end():
    flagged = KERNEL.replace(
        "$L__BB0_1:",
        "\tld.global.b32 %r10, [%rd3+4000];\n\tsetp.eq.b32 %p5, %r10, 0;\n\t@%p5 bra $L__BB0_3;\n$L__BB0_1:",
    )
    words = {1000: 5000, 1008: 384}
    assert len(run(0, 0, words, 512).accesses) == 4
    blocks = ptx.parse(flagged)
    special = {"%tid.x": 0, "%ctaid.x": 0}
    ended = ptx.Thread(blocks, [1000, 512], special, words).run()
    assert [one.address for one in ended.accesses] == [1000, 1008, 5000]
    # A word of the table is known, and says that there is something to do.
    told = ptx.Thread(blocks, [1000, 512], special, words | {5000: 1}).run()
    assert len(told.accesses) == 5


@pytest.mark.parametrize(
    ("text", "values", "result"),
    [
        ("add.s32 %r9, %r1, %r2", (2**32 - 1, 3), 2),
        ("sub.s64 %rd9, %rd1, %rd2", (1, 3), 2**64 - 2),
        ("mad.lo.s32 %r9, %r1, %r2, %r3", (3, 2**32 - 1, 5), 2),
        ("mad.wide.s32 %rd9, %r1, %r2, %rd3", (2**32 - 2, 8, 1 << 40), (1 << 40) - 16),
        ("mul.hi.u32 %r9, %r1, %r2", (2**31, 6), 3),
        ("shr.s32 %r9, %r1, 31", (2**31,), 2**32 - 1),
        ("shr.u32 %r9, %r1, 31", (2**31,), 1),
        ("div.s32 %r9, %r1, %r2", (2**32 - 7, 2), 2**32 - 3),
        ("rem.s32 %r9, %r1, %r2", (2**32 - 7, 2), 2**32 - 1),
        ("bfe.u32 %r9, %r1, 4, 3", (0b1011010000,), 0b101),
        ("cvt.s64.s32 %rd9, %r1", (2**32 - 1,), 2**64 - 1),
        ("cvt.u64.u32 %rd9, %r1", (2**32 - 1,), 2**32 - 1),
        ("selp.b32 %r9, %r1, %r2, %p3", (4, 5, 1), 4),
        ("min.s32 %r9, %r1, %r2", (2**32 - 1, 5), 2**32 - 1),
        ("min.u32 %r9, %r1, %r2", (2**32 - 1, 5), 5),
        ("setp.lt.s32 %p9, %r1, %r2", (2**32 - 1, 0), 1),
        ("setp.lt.u32 %p9, %r1, %r2", (2**32 - 1, 0), 0),
        ("and.pred %p9, %p1, %p2", (None, 0), 0),
        ("or.pred %p9, %p1, %p2", (None, 0), None),
        ("add.s32 %r9, %r1, %r2", (None, 0), None),
    ],
)
def test_integer_arithmetic_is_that_of_ptx(text, values, result):
    one = ptx._instruction(text)
    thread = ptx.Thread([], [], {}, {})
    kinds = [operand for operand in one.operands[1:] if operand.startswith("%")]
    thread.registers = dict(zip(kinds, values, strict=True))
    thread._compute(one)
    assert thread.registers[one.written[0]] == result


def test_tile_numbers_of_a_triangle_come_from_float32_roots():
    """As in `tiles.lower_tile`: the row of the p-th tile, which integers correct by one at most."""
    for p in (0, 1, 2, 527, 65535):
        thread = ptx.Thread([], [], {}, {})
        for text in (
            f"cvt.rn.f32.u32 %r1, {p}",
            "mul.rn.f32 %r2, %r1, 0f41000000",
            "add.rn.f32 %r3, %r2, 0f3F800000",
            "sqrt.approx.ftz.f32 %r4, %r3",
            "add.rn.f32 %r5, %r4, 0fBF800000",
            "mul.rn.f32 %r6, %r5, 0f3F000000",
            "cvt.rzi.s32.f32 %r7, %r6",
        ):
            thread._compute(ptx._instruction(text))
        i = thread.registers["%r7"]
        assert i is not None
        assert (i - 1) * i // 2 <= p < (i + 2) * (i + 3) // 2


def test_matrix_instructions_are_counted_for_a_warp():
    block = ptx.parse(KERNEL)[1]
    assert ptx.matrix_work(block) == {"mma bf16": 2 * 16 * 8 * 16}
    for name, kind, work in (
        ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "wgmma bf16", 2 * 64 * 128 * 16 // 4),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "mma tf32", 2 * 16 * 8 * 8),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64", "mma f64", 2 * 8 * 8 * 4),
    ):
        assert ptx.matrix_work(ptx.Block("", [ptx.Instruction(name, [])])) == {kind: work}


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR4][R8.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R12, R4, R6, R12 ;
        /*0040*/                   LDG.E.128 R4, desc[UR4][R8.64+0x200] ;
        /*0050*/                   HMMA.16816.F32.BF16 R12, R4, R6, R12 ;
        /*0060*/                   LDSM.16.M88.4 R16, [R20] ;
        /*0070*/               @P1 BRA 0x20 ;
        /*0080*/                   STS.128 [R20], R4 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
        /*00b0*/                   NOP;
"""


def test_machine_code_repeats_as_often_as_the_ptx_and_an_unrolled_loop_half_as_often():
    instructions = sass.parse(SASS)
    assert [name.split(".")[0] for name, _ in instructions][-2:] == ["STS", "EXIT"]
    (loop,) = sass.loops(sass.jumps(instructions))
    assert (loop.first, loop.last) == (2, 7)
    code = program.Binary(ptx.parse(KERNEL), instructions, 32, 0)
    labels = {block.name: i for i, block in enumerate(code.blocks)}
    runs = dict.fromkeys(range(len(code.blocks)), 1.0) | {labels["$L__BB0_1"]: 10.0}
    weights = program.weights(code, runs)
    assert weights[2:8] == [5.0] * 6  # two loads and two products for one of each in the PTX
    assert weights[0] == weights[9] == 1.0


def test_loops_nest_as_their_jumps_do():
    found = sass.loops([(9, 1), (4, 2), (7, 6), (7, 6), (12, 11), (3, 20)])
    assert [(one.first, one.last) for one in found] == [(1, 9), (11, 12)]
    assert [(one.first, one.last) for one in found[0].inner] == [(2, 4), (6, 7)]
    assert program.own_parts(found, 14) == [[0, 10, 13], [1, 5, 8, 9], [2, 3, 4], [6, 7], [11, 12]]


def test_what_instructions_occupy():
    found = sass.count(sass.parse(SASS))
    assert found == {"issue": 10, "shared": 32 * 16 + 32 * 16}


def whole(counts=(), traffic=(), rounds=0.0, barriers=0.0):
    return program.Work(dict(counts), rounds, barriers, traffic)


def test_a_gemm_takes_its_operations_over_the_measured_rate():
    """8192^3 in tiles of 128 x 256, a whole number of waves: the same as without tiles, less what no kernel reaches."""
    tiles, gpu = 132 * 16, gpus.H100
    operations = 2 * 8192**3 / tiles
    bounds = estimate.kernel_bounds(gpu, whole({"wgmma bf16": operations}), tiles, 1, 8, 0.0)
    assert max(bounds, key=bounds.__getitem__) == "tensor"
    assert bounds["tensor"] == pytest.approx(2 * 8192**3 / 798e12 / gpus.SHARE)
    by_mma = estimate.kernel_bounds(gpu, whole({"mma tf32": operations}), tiles, 1, 8, 0.0)
    assert by_mma["tensor"] == pytest.approx(2 * bounds["tensor"] / gpu.mma)
    one_more = estimate.kernel_bounds(gpu, whole({"wgmma bf16": operations}), tiles + 1, 1, 8, 0.0)
    assert one_more["tensor"] == pytest.approx(bounds["tensor"] * 17 / 16)  # a wave for one tile


def test_a_copy_takes_its_bytes_over_the_bandwidth():
    size = 1 << 30
    traffic = (program.Traffic(1, size, False, size), program.Traffic(2, size, True, size))
    moved = estimate.device_bytes(traffic, estimate.Cache(1e7))
    bounds = estimate.kernel_bounds(gpus.A100, whole(traffic=traffic), 10**6, 8, 4, moved)
    assert max(bounds, key=bounds.__getitem__) == "memory"
    assert bounds["memory"] == pytest.approx(2 * size / gpus.A100.bandwidth)


def test_a_float64_instruction_occupies_the_lanes_that_there_are():
    """One warp instruction on each multiprocessor: 32 lanes' worth."""
    for gpu in gpus.ALL:
        bounds = estimate.kernel_bounds(gpu, whole({"float64": 100, "issue": 100}), gpu.multiprocessors, 1, 4, 0.0)
        assert bounds["float64"] == pytest.approx(100 * 32 / gpu.float64 / (gpus.SHARE * gpu.clock))
        assert bounds["issue"] == pytest.approx(100 / 4 / (gpus.SHARE * gpu.clock))


def test_few_warps_wait_for_themselves():
    work = whole({"issue": 4000}, rounds=10, barriers=2)
    alone = (1000 * gpus.STALL + 10 * gpus.LATENCY + 2 * gpus.BARRIER) / gpus.H100.clock
    for programs, resident, waves in ((132, 1, 1), (264, 2, 1), (264, 1, 2), (1000, 4, 2)):
        bounds = estimate.kernel_bounds(gpus.H100, work, programs, resident, 4, 0.0)
        assert bounds["latency"] == pytest.approx(waves * alone)


def test_programs_that_a_multiprocessor_holds():
    assert estimate.resident(gpus.H100, warps=8, registers=128, shared=98304) == 2  # both limits
    assert estimate.resident(gpus.H100, warps=8, registers=129, shared=98304) == 1
    assert estimate.resident(gpus.H100, warps=8, registers=64, shared=115 << 10) == 1
    assert estimate.resident(gpus.RTX_4090, warps=4, registers=32, shared=0) == 12
    assert estimate.resident(gpus.RTX_4090, warps=1, registers=32, shared=0) == 24


def test_what_an_earlier_kernel_touched_is_in_the_cache_as_far_as_it_fits():
    cache = estimate.Cache(100)
    assert not cache.touch(1, 60)
    assert cache.touch(1, 60)
    assert not cache.touch(2, 50)
    assert not cache.touch(1, 60)  # 50 came between
    small = program.Traffic(1, 60, False, 600.0)
    assert estimate.device_bytes([small], cache) == 0
    assert estimate.cache_bytes([small]) == 60 + 540 / 2


@pytest.mark.interpret
def test_the_calls_of_pytorch_are_counted_with_their_bytes():
    pytest.importorskip("triton")
    with steps.watching("sm_90", 132) as (found, _):
        x = torch.empty(1000, 200, dtype=torch.bfloat16, device="meta")
        y = x[:, ::2].float().sum(0)
        y.add_(1.0)
        x.view(-1)[:5].zero_()
        x.T @ x
        x.new_ones(3)
    assert [one.name for one in found] == ["_to_copy", "sum", "add_", "zero_", "mm", "new_ones"]
    convert, total, _, zero, product, ones = found
    assert [size for _, size in convert.read] == [200_000]
    assert [size for _, size in convert.written] == [400_000]
    assert convert.written[0][0] == total.read[0][0]
    assert (zero.read, [size for _, size in zero.written]) == ((), [10])
    assert product.operations == 2 * 200 * 1000 * 200
    assert (ones.read, [size for _, size in ones.written]) == ((), [6])


@pytest.mark.interpret
def test_a_table_that_comes_from_the_host_is_known_by_address():
    pytest.importorskip("triton")
    with steps.watching("sm_90", 132) as (_, memory):
        x = torch.empty(64, 8, device="meta")
        made = torch.tensor([[x.data_ptr(), 64], [x[3:].data_ptr(), 61]]).to("meta")
        assert memory.words[made[1:].data_ptr()] == memory.address(x) + 3 * 8 * 4
        assert memory.words[made[1, 1:].data_ptr()] == 61
        assert memory.find(made.data_ptr()) == (memory.start(made), 32)
        assert memory.find(x[63:].data_ptr()) == (memory.start(x), 64 * 8 * 4)
        assert memory.find(memory.start(x) - 1) is None


def test_targets_are_those_of_the_cases():
    cases = {case.name: case for case in chosen(all_cases(), "")}
    wide = next(case for name, case in cases.items() if name.startswith("outer_product 8192x4096"))
    assert target_us(wide, gpus.H100) == pytest.approx(2 * 8192 * 4096**2 / 798e6 / 1.5)
    grouped = next(case for name, case in cases.items() if "256 of 8192x8" in name)
    assert target_us(grouped, gpus.H100) == 18


def test_the_table_of_the_document_is_that_of_the_results():
    text = (ROOT / "docs" / "performance.md").read_text()
    content = json.loads(RESULTS.read_text())
    assert insert(text, document(content)) == text
    assert text.count(MARKS[0]) == 1
    assert list(content["cases"]) == [case.name for case in chosen(all_cases(), "")]


@pytest.mark.interpret
def test_the_wide_outer_product_multiplies_its_triangle_of_tiles_and_reads_x_once():
    """The compiled kernel, followed: 528 tiles of 128 x 128, counted here from the shape. In a process where kernels
    compile, which they do not where they are interpreted.
    """
    pytest.importorskip("triton")
    code = """if True:
        import json, sys
        from benchmarks.cases import all_cases
        from benchmarks.roofline.__main__ import estimate
        from benchmarks.roofline.gpus import H100
        case = next(case for case in all_cases() if case.name == "outer_product 8192x4096 bf16")
        steps = estimate(case, "triton", H100)
        (step,) = [step for step in steps if step.name == "outer_product"]
        json.dump([step.bounds, step.device_bytes, step.programs], sys.stdout)"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    bounds, device_bytes, programs = json.loads(done.stdout)
    tiles = 32 * 33 // 2
    assert programs == tiles
    operations = tiles * 2 * 128 * 128 * 8192
    assert 1e6 * bounds["tensor"] == pytest.approx(1e6 * operations / 798e12 / gpus.SHARE, rel=1e-3)
    assert 2 * 8192 * 4096 < device_bytes <= 2 * 8192 * 4096 + 2 * 4 * 4096**2 * 1.01
