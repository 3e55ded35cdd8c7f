"""Verification of the Triton kernels themselves, in the interpreter: what is right passes, planted faults do not."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch

pytest.importorskip("triton")

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops import dispatch
from bayesian_lora_kernels.ops.verify.judge import judge
from bayesian_lora_kernels.ops.verify.machine import Runtime
from bayesian_lora_kernels.ops.verify.process import Worker
from bayesian_lora_kernels.ops.verify.worker import attribute, catalogue

pytestmark = pytest.mark.interpret
CPU = torch.device("cpu")
VARIANT = "float32 BD=16 vectors masked accumulate"
FAULTS = {
    "a_tile_is_never_launched": ("float32 BD=64 vectors masked mirror", "an output holds NaN"),
    "a_module_is_never_launched": ("float32 BD=16 vectors mirror", "an output holds NaN"),
    "the_mask_is_ignored": ("float32 BD=16 vectors masked accumulate", "an output holds NaN"),
    "the_sum_is_not_added": ("float32 BD=16 vectors accumulate", r"error \d"),
    "crashes": ("float32 BD=16 vectors mirror", "signal SIGABRT"),
    "hangs": ("float32 BD=16 vectors mirror", "no result within 25 s"),
}


@pytest.fixture(scope="module")
def worker():
    one = Worker()
    yield one
    one.close()


def ask(worker, function, variant, seconds=300.0):
    claim = dispatch.claim_of("grouped_outer_product", "triton")
    request = {"device": "cpu", "suite": claim.evidence.suite, "variants": claim.evidence.variants, "variant": variant}
    return worker.ask({**request, "function": function, "reference": claim.reference}, seconds)


@pytest.mark.parametrize("variant", sorted({variant for variant, _ in FAULTS.values()}))
def test_the_kernel_passes(variant, worker):
    verdict = ask(worker, "planted_kernels:right", variant)
    assert verdict.passed, verdict
    assert verdict.problems >= 3


@pytest.mark.parametrize(("name", "expected"), FAULTS.items())
def test_a_planted_fault_does_not(name, expected, worker):
    variant, reason = expected
    verdict = ask(worker, f"planted_kernels:{name}", variant, seconds=25 if name == "hangs" else 300)
    assert verdict.state == "failed"
    assert re.search(reason, verdict.reason), verdict


CLAIMS = [claim for claim in dispatch.claims() if claim.name == "triton"]


@pytest.mark.parametrize("claim", CLAIMS, ids=[claim.operation for claim in CLAIMS])
def test_a_problem_of_each_operation_is_solved(claim):
    """The first of each suite, by the machinery that dispatch asks."""
    suite, variants = attribute(claim.evidence.suite), attribute(claim.evidence.variants)
    with torch.no_grad():
        problem, found = next(iter(catalogue(suite.problems(CPU), variants, Runtime(CPU))))
        assert found, problem.name
        verdict = judge([problem], suite, attribute(claim.function), attribute(claim.reference), Runtime(CPU))
    assert verdict.passed, verdict


def random_outer_product(draw):
    count, dtype = draw.randint(1, 5), draw.choice([torch.float32, torch.float16])
    xs = []
    for _ in range(count):
        rows, width = draw.choice([1, 50, 2048, 9000]), draw.choice([1, 4, 8, 12, 16, 31, 64, 100, 256, 1000])
        x = torch.empty(rows, 2 * width, dtype=dtype)[:, :: draw.choice([1, 2])][:, :width]
        xs.append(x)
    masks = [draw.choice([None, torch.ones(len(x), dtype=torch.bool)]) for x in xs]
    outs = [torch.empty(x.shape[1], x.shape[1]) for x in xs]
    accumulate = draw.random() < 0.5
    return outs, xs, masks, [1.0] * count, accumulate, accumulate and draw.random() < 0.5


def random_square_sum(draw):
    _, xs, masks, *_ = random_outer_product(draw)
    return torch.empty(len(xs), dtype=torch.float64), xs, masks


def random_incremental_svd(draw):
    count, dtype, columns = (
        draw.randint(1, 4),
        draw.choice([torch.float32, torch.float16]),
        draw.choice([14, 30, 64, 74]),
    )
    shapes = [(draw.choice([40, 300, 2000]), draw.choice([320, 1000, 2048])) for _ in range(count)]
    xs = [torch.empty(rows, 2 * width, dtype=dtype)[:, :: draw.choice([1, 2])][:, :width] for rows, width in shapes]
    masks = [draw.choice([None, torch.ones(len(x), dtype=torch.bool)]) for x in xs]
    outs = [torch.empty(x.shape[1], columns) for x in xs]
    bases = [torch.empty(x.shape[1], draw.choice([0, columns])) for x in xs]
    rows, signs = torch.empty(columns, 16, dtype=torch.int64), torch.empty(columns, 16)
    return outs, bases, xs, masks, [rows] * count, [signs] * count, 10


def random_weight_gradient(draw):
    dtype, tokens = draw.choice([torch.float32, torch.float16]), draw.choice([3, 256])
    sizes = [draw.choice([(8, 300), (300, 8), (8, 4096), (90, 90), (4096, 64)]) for _ in range(draw.randint(1, 4))]
    stride = draw.choice([1, 2])
    gs, inputs = (
        [torch.empty(2, tokens, stride * size[i], dtype=dtype)[..., ::stride] for size in sizes] for i in (0, 1)
    )
    masks = [draw.choice([None, torch.ones(2, tokens, dtype=torch.bool)]) for _ in sizes]
    return [torch.empty(2, *size) for size in sizes], gs, inputs, masks


def random_attention_jvp(draw):
    dtype, mask = draw.choice([torch.float32, torch.float16]), draw.choice([None, torch.bool, torch.float32])
    width, values = draw.choice([8, 20, 40, 64, 100, 128, 200, 256]), draw.choice([8, 64, 128])
    heads, queries, keys = draw.choice([1, 4]), draw.choice([1, 40, 300]), draw.choice([1, 40, 300])
    shapes = [(2, heads, queries, width), (2, 1, keys, width), (2, 1, keys, values)]
    primals = [torch.empty(shape, dtype=dtype) for shape in shapes]
    changes = [draw.choice([None, torch.empty(2, *shape, dtype=dtype)]) for shape in shapes]
    mask = None if mask is None else torch.empty(2, 1, queries, keys, dtype=mask).expand(2, heads, queries, keys)
    out = torch.empty(2, heads, queries, values, dtype=dtype)
    return out, torch.empty(2, *out.shape, dtype=dtype), *primals, *changes, mask, draw.random() < 0.5, 1.0


CALLS = {
    "grouped_outer_product": random_outer_product,
    "grouped_square_sum": random_square_sum,
    "grouped_incremental_svd": random_incremental_svd,
    "grouped_weight_gradient": random_weight_gradient,
}


@pytest.mark.parametrize(("operation", "make"), CALLS.items(), ids=CALLS)
def test_what_a_call_takes_is_in_the_catalogue(operation, make):
    """Else a unit would be inconclusive for ever, and the reference run."""
    claim = next(claim for claim in CLAIMS if claim.operation == operation)
    suite, variants = attribute(claim.evidence.suite), attribute(claim.evidence.variants)
    covered = set(
        itertools.chain.from_iterable(some for _, some in catalogue(suite.problems(CPU), variants, Runtime(CPU)))
    )
    draw = random.Random(0)
    for _ in range(200):
        taken = set(map(str, variants(*make(draw))))
        assert taken <= covered, sorted(taken - covered)


def test_every_triton_operation_is_verified():
    without = [
        operation
        for operation, offered in dispatch._registry.items()
        if "triton" in offered and offered["triton"].evidence is None
    ]
    assert not without
    assert {claim.operation for claim in CLAIMS} <= set(ops.__all__)


def random_jacobian(draw):
    dtype = draw.choice([torch.float32, torch.float16])
    wide, narrow = draw.choice([300, 1024]), draw.choice([2, 4, 8, 16, 24, 64])
    outputs, tokens, kept = draw.choice([1, 2, 3, 4, 8, 30]), draw.choice([8, 100, 256]), draw.choice([0, 10, 32, 50])
    d_in, d_out = (wide, narrow) if draw.random() < 0.5 else (narrow, wide)
    kept_narrow = narrow - draw.choice([0, 1])
    k_in, k_out = (min(kept, d_in), kept_narrow) if d_in > d_out else (kept_narrow, min(kept, d_out))
    stride = draw.choice([1, 1, 2])
    a = torch.empty(2, tokens, stride * d_in, dtype=dtype)[..., ::stride]
    g = torch.empty(2, outputs, tokens, stride * d_out, dtype=dtype)[..., ::stride]
    mask = draw.choice([None, torch.ones(2, tokens, dtype=torch.bool)])
    bases = torch.empty(d_out, k_out), torch.empty(d_in, k_in)
    blocks = [torch.ones(shape) for shape in ((k_out, k_in), (k_out,), (k_in,), ())]
    return torch.empty(2, outputs, outputs), *([one] for one in (a, g, *bases, *blocks, mask))


def random_vocabulary(draw):
    dtype, columns = draw.choice([torch.float32, torch.float16]), draw.choice([torch.float32, torch.float16])
    width, tokens, examples = draw.choice([30, 64, 576, 4096]), 500, draw.choice([1, 4, 30])
    hidden = torch.empty(examples, draw.choice([1, 10, 32, 64, 300]), width, dtype=columns)
    bias, softcap = draw.choice([None, torch.empty(tokens)]), draw.choice([None, 30.0])
    mirrored = draw.random() < 0.5
    known = draw.choice([None, torch.empty(examples, hidden.shape[1] * (1 + mirrored), dtype=torch.float64)])
    weight = torch.empty(tokens, width, dtype=dtype)
    return torch.empty(examples, tokens), weight, hidden, bias, softcap, mirrored, known, None


NEAR = {
    "attention_jvp": random_attention_jvp,
    "grouped_jacobian_covariance": random_jacobian,
    "vocabulary_probs": random_vocabulary,
}


@pytest.mark.parametrize(("operation", "make"), NEAR.items(), ids=NEAR)
def test_problems_near_a_variant_take_it(operation, make):
    """Of operations that have too many variants for a list."""
    claim = next(claim for claim in CLAIMS if claim.operation == operation)
    suite, variants = attribute(claim.evidence.suite), attribute(claim.evidence.variants)
    draw = random.Random(0)
    for _ in range(100):
        for taken in map(str, variants(*make(draw))):
            near = catalogue(suite.near(taken), variants, Runtime(CPU))
            assert next((problem for problem, some in near if taken in some), None) is not None, taken
