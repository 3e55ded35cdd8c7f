"""Attention with tangents: the reference here, the kernel in the interpreter, both against dense float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops.attention import reference

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
LOWEST = torch.finfo(F32).min  # what models put where a key is masked
IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.interpret)]
# Examples, heads, heads of keys, queries, keys, width, width of values, tangents.
SHAPES = {
    "ragged": (1, 2, 2, 37, 37, 20, 20, 3),
    "grouped": (2, 2, 1, 20, 40, 32, 32, 2),
    "one group, wide values": (1, 3, 1, 70, 5, 16, 48, 1),
    "one query": (1, 2, 2, 1, 40, 48, 48, 2),
    "one of each": (1, 1, 1, 1, 1, 1, 1, 1),
    "a wide head": (1, 1, 1, 40, 33, 130, 130, 2),
}
NOTHING = [(0, 2, 1, 3, 4, 8, 8, 2), (2, 0, 1, 3, 4, 8, 8, 2), (1, 2, 1, 0, 4, 8, 8, 2), (1, 2, 1, 3, 4, 8, 0, 2)]
MASKS = ("none", "causal", "padding", "window", "added", "lowest", "of each head", "rows without a key")


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """What is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(reference, "_ELEMENTS", {"cpu": 150})


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v and their tangents, as projections lay them out: heads beside each other in a row."""
    n, heads, kv_heads, queries, keys, width, values, tangents = shape
    state = torch.Generator().manual_seed(seed)

    def normal(*lead: int, heads: int, tokens: int, width: int) -> Tensor:
        return torch.randn(*lead, n, tokens, heads, width, generator=state, dtype=F64).to(dtype).transpose(-3, -2)

    sizes = ((heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, values))
    return [normal(*lead, heads=h, tokens=t, width=w) for lead in ((), (tangents,)) for h, t, w in sizes]


def mask_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    n, heads, _, queries, keys, *_ = shape
    state = torch.Generator().manual_seed(1)
    padding = torch.arange(keys) >= torch.arange(n)[:, None] % keys  # on the left
    seen = padding[:, None, None] & torch.ones(queries, 1, dtype=torch.bool)
    near = (torch.arange(queries)[:, None] - torch.arange(keys)).abs() < 6
    near[:, 0] = True
    return {
        "none": None,
        "causal": None,
        "padding": seen,
        "window": near,
        "added": torch.randn(n, 1, queries, keys, generator=state).to(dtype),
        "lowest": torch.where(near & (torch.arange(queries) > 0)[:, None], 0.0, LOWEST),
        "of each head": torch.randn(heads, 1, keys, generator=state),
        "rows without a key": seen & (torch.arange(queries) % 3 > 0)[:, None],
    }[kind]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """The definition; all keys of a row are excluded or none is, so that zero can stand for what is undefined."""
    k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], dim=1) for one in (k, v))
    scores = scale * torch.einsum("nhid,nhjd->nhij", q, k)
    allowed = torch.ones(scores.shape, dtype=torch.bool)
    if causal:
        allowed &= torch.arange(q.shape[2])[:, None] >= torch.arange(k.shape[2])
    if mask is not None and mask.dtype == torch.bool:
        allowed &= mask
    elif mask is not None:
        scores = scores + mask.double()
    odds = torch.where(allowed, (scores - scores.detach().amax(-1, keepdim=True)).exp(), 0.0)
    total = odds.sum(-1, keepdim=True)
    return torch.einsum("nhij,nhjd->nhid", odds / torch.where(total == 0, 1.0, total), v)


def truth(inputs: list[Tensor | None], mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Value and derivative along each tangent, by forward mode through the definition in float64."""
    primals = tuple(one.double() for one in inputs[:3])
    count = next(len(one) for one in inputs[3:] if one is not None)
    zeros = [torch.zeros(count, *one.shape, dtype=F64) for one in primals]
    tangents = [zero if one is None else one.double() for one, zero in zip(inputs[3:], zeros, strict=True)]

    def along(*tangent: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda *x: dense(*x, mask, causal, scale), primals, tangent)

    pairs = [along(*(one[s] for one in tangents)) for s in range(count)]
    return pairs[0][0], torch.stack([changed for _, changed in pairs])


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Within rounding of sums and of the result; in half precision weights are rounded before they are multiplied."""
    tolerance = {F64: 1e-13, F32: 1e-5, F16: 4e-3, BF16: 1e-2}[dtype]
    for one, true in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert one.shape == true.shape
        size = true.abs().amax() if true.numel() else 1.0
        assert (one.double() - true).abs().max() <= tolerance * size, (one.double() - true).abs().max() / size


# Every mask at one shape, and two at the others.
CALLS = [("grouped", kind) for kind in MASKS]
CALLS += [(name, kind) for name in SHAPES if name != "grouped" for kind in ("causal", "padding")]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "kind"), CALLS)
def test_against_the_derivative_of_the_definition(name, kind, impl):
    shape = SHAPES[name]
    for dtype in (F32, F16) if impl == "triton" else (F64,):
        inputs, mask, causal = drawn(shape, dtype), mask_of(kind, shape, dtype), kind == "causal"
        found = ops.attention_jvp(*inputs, mask=mask, causal=causal, scale=0.3, impl=impl)
        assert_close(found, truth(inputs, mask, causal, 0.3), dtype)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
def test_in_small_tiles(kind, dtype):
    shape = (2, 4, 2, 37, 29, 20, 12, 2)
    inputs, mask = drawn(shape, dtype), mask_of(kind, shape, dtype)
    found = ops.attention_jvp(*inputs, mask=mask, causal=kind == "causal")
    expected = truth(inputs, mask, kind == "causal", 20**-0.5)
    assert_close(found, expected, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("given", ["q", "k", "v", "qk", "kv"])
def test_tangents_that_are_zero(given, impl):
    inputs = drawn(SHAPES["grouped"], F32)
    for i, name in enumerate("qkv"):
        if name not in given:
            inputs[3 + i] = None
    found = ops.attention_jvp(*inputs, causal=True, impl=impl)
    assert_close(found, truth(inputs, None, True, 32**-0.5), F32)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_layout(impl):
    """Columns apart, off 16 bytes, every head or every token the same."""
    inputs = drawn((2, 2, 2, 9, 11, 16, 16, 2), F32)
    expected = truth(inputs, None, False, 0.25)
    apart = [torch.stack([one, one], dim=-1)[..., 0] for one in inputs]
    off = [torch.cat([one.flatten()[:1], one.flatten()])[1:].view(one.shape) for one in inputs]
    for laid_out in (apart, off, [one.mT.contiguous().mT for one in inputs]):
        assert_close(ops.attention_jvp(*laid_out, impl=impl), expected, F32)
    same = [one[..., :1, :, :].expand(one.shape) for one in inputs[:3]] + [
        one[..., :1, :].expand(one.shape) for one in inputs[3:]
    ]
    assert_close(ops.attention_jvp(*same, impl=impl), truth(same, None, False, 0.25), F32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", NOTHING)
def test_nothing(shape, impl):
    out, dout = ops.attention_jvp(*drawn(shape, F32), impl=impl)
    assert out.shape == (shape[0], shape[1], shape[3], shape[6])
    assert dout.shape == (2, *out.shape)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["lowest", "rows without a key"])
def test_the_value_is_pytorchs(kind, impl):
    inputs, mask = drawn(SHAPES["grouped"], F32), mask_of(kind, SHAPES["grouped"], F32)
    expected = scaled_dot_product_attention(*inputs[:3], mask, enable_gqa=True)
    torch.testing.assert_close(ops.attention_jvp(*inputs, mask=mask, impl=impl)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores(impl):
    """Weights of 1 and 0, and scores that differ by more than float32 can add up."""
    inputs = drawn(SHAPES["grouped"], F32)
    inputs[0] *= 300.0
    found = ops.attention_jvp(*inputs, impl=impl)
    expected = truth(inputs, None, False, 32**-0.5)
    for one, true in zip(found, expected, strict=True):
        assert (one.double() - true).abs().max() <= 2e-3 * true.abs().max()


def test_vmap_over_tangents_is_one_call():
    q, k, v, dq, dk, dv = drawn((2, 4, 2, 5, 7, 8, 6, 4), F64)
    expected = ops.attention_jvp(q, k, v, dq, dk, dv, causal=True)[1]

    def one(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention_jvp(q, k, v, a[None], dk[:1], b[None], causal=True)

    found, several = torch.func.vmap(one, in_dims=(0, 1), out_dims=(None, 0))(dq, dv.movedim(0, 1))
    assert found.shape == (*q.shape[:3], 6)
    assert torch.equal(several[:1, 0], expected[:1])
    with pytest.raises(NotImplementedError, match="vmap over tangents alone"):
        torch.func.vmap(lambda one: ops.attention_jvp(one, k, v, dq, dk, dv))(torch.stack([q, q]))


def test_bad_calls():
    q, k, v, dq, dk, dv = drawn((2, 4, 2, 5, 7, 8, 6, 3), F32)
    where = "attention_jvp: "
    for error, message, arguments, options in (
        (ValueError, "expected at least one tangent of the query, the key or the value", (q, k, v), {}),
        (ValueError, "expected at least one tangent", (q, k, v, dq[:0]), {}),
        (ValueError, r"query: expected shape \[N, H, T, d\], got float32\[4, 5, 8\]", (q[0], k, v, dq), {}),
        (ValueError, r"key: expected shape \[2, H_kv, T_k, 8\]", (q, k[..., :3], v, dq), {}),
        (ValueError, r"value: expected shape \[2, 2, 7, d_v\]", (q, k, v[:, :1], dq), {}),
        (
            ValueError,
            "key: expected at least one key, and heads that divide the 4",
            (q, k[:, :, :0], v[:, :, :0], dq),
            {},
        ),
        (ValueError, "heads that divide the 3 of the query", (q[:, :3], k, v, dq[:, :, :3]), {}),
        (ValueError, r"dkey: expected shape \[3, 2, 2, 7, 8\], got float32\[1,", (q, k, v, dq, dk[:1]), {}),
        (TypeError, "value: expected dtype float32, got float64", (q, k, v.double(), dq), {}),
        (TypeError, "dvalue: expected dtype float32, got float16", (q, k, v, None, None, dv.half()), {}),
        (TypeError, "query: expected dtype", (q.long(), k, v, dq), {}),
        (TypeError, "mask: expected a tensor, bool or float, got int64", (q, k, v, dq), {"mask": torch.ones(7).long()}),
        (
            ValueError,
            r"mask: expected a shape that broadcasts to \[2, 4, 5, 7\]",
            (q, k, v, dq),
            {"mask": torch.ones(5)},
        ),
        (
            ValueError,
            "mask: expected a tensor on cpu, got float32",
            (q, k, v, dq),
            {"mask": torch.ones(7, device="meta")},
        ),
        (TypeError, "causal: expected True or False, got int", (q, k, v, dq), {"causal": 1}),
        (TypeError, "scale: expected a number or None, got str", (q, k, v, dq), {"scale": "1"}),
        (ValueError, "scale: expected a finite number, got inf", (q, k, v, dq), {"scale": math.inf}),
        (ValueError, "expected impl to be one of", (q, k, v, dq), {"impl": "cuda"}),
        (RuntimeError, "impl='native' cannot run", (q, k, v, dq), {"impl": "native"}),
    ):
        with pytest.raises(error, match=where + ".*" + message):
            ops.attention_jvp(*arguments, **options)
