"""The Triton kernels of the vocabulary operations against dense float64 mathematics, in the interpreter or on a GPU."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
from test_ops_vocabulary import (
    EPS,
    HEADS,
    NO_TOKEN,
    assert_within_budget,
    bias_of,
    layouts,
    logits_of,
    probs_of,
    rounding_of,
    statistics_of,
)

from bayesian_lora_kernels import ops

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.gpu if ON_GPU else pytest.mark.interpret
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
PAIRS = [(F32, F32), (F16, F16), (F16, F32), (F32, F16), (BF16, F32), (BF16, F16), (BF16, BF16)]
# Examples, samples, tokens, width. Tiles hold 128 or 64 tokens and 32 to 256 columns, a step 64 or 32 of the width; at
# widths that are no multiples of 16 there is one tile for all.
SHAPES = [
    (3, 5, 150, 37),
    (1, 1, 1, 1),
    (7, 1, 65, 16),  # few columns of each example
    (2, 70, 40, 48),  # an example in several tiles of columns, the last one ragged
    (5, 20, 130, 33),  # several tiles of columns
    (2, 33, 140, 64),  # a step divides the width
    (2, 20, 150, 80),  # it does not
]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """What a kernel fails to write, or should not read, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launch():
    from bayesian_lora_kernels.ops.vocabulary import kernel_launch

    return kernel_launch


@pytest.fixture
def small_parts(launch, monkeypatch):
    """As little memory as goes: a tile of tokens at a time."""
    monkeypatch.setattr(launch, "_LEAST_BYTES", 1)
    monkeypatch.setattr(launch, "_SHARING", 64)


@pytest.fixture
def launched(launch, monkeypatch):
    """The names of the kernels, in the order in which they are launched."""
    names = []

    class Noted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            names.append(self.kernel.fn.__name__)
            return self.kernel[grid]

    for module in (launch.kernel, launch.kernel_scratch):
        for name in [one for one in vars(module) if one.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Noted(getattr(module, name)))
    return names


def there(*tensors):
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


def data(examples, samples, vocabulary, width, weight_dtype=F32, hidden_dtype=F32):
    weight = (torch.randn(vocabulary, width) * width**-0.5).to(weight_dtype)
    return there(weight, (3 * torch.randn(examples, samples, width)).to(hidden_dtype))


def check_all(weight, hidden, bias=None, softcap=None, scratch_bytes=None, mirrored=False):
    """Log-sum-exps, probabilities and statistics, all within rounding of the truth."""
    head = {"bias": bias, "softcap": softcap, "mirrored": mirrored, "impl": "triton"}
    given = hidden
    hidden = torch.cat([hidden, -hidden], dim=1) if mirrored else hidden
    examples, vocabulary = hidden.shape[0], weight.shape[0]
    excluded = (torch.zeros(vocabulary, device=DEVICE) if bias is None else bias).expand(examples, -1) == NO_TOKEN
    allowed = (~excluded[0]).nonzero()[:, 0]
    targets = allowed[torch.linspace(0, len(allowed) - 1, examples).long().to(DEVICE)]
    logits = logits_of(weight, hidden, bias, softcap)
    rounding = rounding_of(weight, hidden, bias)

    lse = ops.vocabulary_logsumexp(weight, given, **head)
    assert lse.dtype == torch.float64
    assert ((lse - logits.logsumexp(-1)).abs() <= rounding.amax(-1) + 4 * EPS).all()

    probs = ops.vocabulary_probs(weight, given, scratch_bytes=scratch_bytes, **head)
    assert probs.shape == (examples, vocabulary)
    assert probs.dtype == F32
    assert_within_budget(probs, weight, hidden, bias, softcap)
    assert (probs[excluded] == 0).all()

    found = ops.vocabulary_statistics(weight, given, targets=targets, scratch_bytes=scratch_bytes, **head)
    mean = probs_of(weight, hidden, bias, softcap).mean(1)
    truth = (*statistics_of(weight, hidden, bias, softcap), mean[torch.arange(examples, device=DEVICE), targets].log())
    for value, true in zip(found, truth, strict=True):
        assert value.dtype == F32
        torch.testing.assert_close(value.double(), true, rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("scratch_bytes", [None, 0])
@pytest.mark.parametrize(("weight_dtype", "hidden_dtype"), PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64(shape, weight_dtype, hidden_dtype, scratch_bytes):
    if scratch_bytes == 0 and (weight_dtype, hidden_dtype) not in PAIRS[:3]:
        pytest.skip("the product is that of the first three")
    check_all(*data(*shape, weight_dtype, hidden_dtype), scratch_bytes=scratch_bytes)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], (9, 20, 150, 5)])
def test_in_small_parts(shape, dtype):
    """First passes of few examples, statistics of few tokens at a time."""
    check_all(*data(*shape, dtype, dtype), bias_of("excluding", shape[2]).to(DEVICE), 4.0, scratch_bytes=0)


@pytest.mark.parametrize("scratch_bytes", [None, 0])
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(("kind", "softcap"), HEADS)
def test_bias_softcap_and_excluded_tokens(kind, softcap, dtype, scratch_bytes):
    bias = bias_of(kind, 150)
    if kind == "excluding":
        bias[:128] = NO_TOKEN  # a whole tile
    check_all(*data(3, 5, 150, 9, dtype, dtype), *there(bias), softcap, scratch_bytes)


@pytest.mark.parametrize("scratch_bytes", [None, 0])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_every_layout(dtype, scratch_bytes):
    for weight, hidden in layouts(*data(3, 5, 70, 6, dtype, dtype)):
        check_all(weight, hidden, scratch_bytes=scratch_bytes)
    weight, hidden = data(3, 5, 70, 6, dtype, dtype)
    bias = torch.randn(140, device=DEVICE)[::2]
    check_all(weight, hidden, bias, scratch_bytes=scratch_bytes)
    check_all(weight, hidden, bias[:1].to(F16).expand(70), scratch_bytes=scratch_bytes)


def test_many_tiles_of_tokens():
    """More than the merge takes at a time; the maximum of a column in the first, a middle or the last of them."""
    weight, _ = data(1, 3, 64 * 33 + 5, 3)
    weight[torch.tensor([1, 1300, -1])] = 9 * torch.eye(3, device=DEVICE)
    check_all(weight, 5 * torch.eye(3, device=DEVICE)[None])


@pytest.mark.parametrize("dtype", [F32, F16])
def test_how_often_products_are_computed(launch, launched, monkeypatch, dtype):
    """Once, some examples at a time, as long as the products of enough columns fit into scratch; else twice."""
    weight, hidden = data(9, 20, 100, 64, dtype, dtype)
    rows, columns = (128, 256) if dtype == F16 else (128, 64)
    strip = 4 * rows * columns
    one = ["product_kernel", "sums_kernel", "merge_kernel", "means_kernel"]
    ranges = 1 if dtype == F16 else 2
    two = ranges * one[:2] + one[2:3] + (one[3:] if ranges == 1 else ranges * ["product_kernel", "means_kernel"])
    parts = math.ceil(9 / (columns // 32))
    monkeypatch.setattr(launch, "_LEAST_BYTES", strip // 2)  # of one tile of tokens
    for least, scratch_bytes, expected in (
        (256, None, one),
        (1, strip, parts * one),
        (1, strip - 1, two),
        (256, strip, parts * one if dtype == F16 else two),
        (256, 0, two),
    ):
        monkeypatch.setattr(launch, "_STRIP_COLUMNS", least)
        launched.clear()
        result = ops.vocabulary_probs(weight, hidden, scratch_bytes=scratch_bytes, impl="triton")
        assert launched == expected
        assert_within_budget(result, weight, hidden)
    launched.clear()
    ops.vocabulary_variance(weight, hidden.mT, impl="triton")
    assert launched == ["squares_kernel"]


@pytest.mark.parametrize("scratch_bytes", [None, 0])
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(("kind", "softcap"), [(None, None), ("finite", None), ("excluding", 3.0)])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[5]])
def test_mirror_images_and_a_bias_for_each_example(shape, kind, softcap, dtype, scratch_bytes):
    examples, _, vocabulary, _ = shape
    bias = None if kind is None else torch.stack([bias_of(kind, vocabulary) for _ in range(examples)])
    check_all(*data(*shape, dtype, dtype), *there(bias), softcap, scratch_bytes, mirrored=True)
    if bias is not None:
        wide = there(torch.cat([bias, bias], dim=1)[:, ::2].to(dtype))
        check_all(*data(*shape, dtype, dtype), *wide, softcap, scratch_bytes)


@pytest.mark.parametrize("scratch_bytes", [None, 0])
@pytest.mark.parametrize("scale", [300.0, 1e4])
def test_huge_logits(scale, scratch_bytes):
    weight, hidden = data(3, 5, 70, 6)
    weight *= scale / logits_of(weight, hidden).abs().max()
    result = ops.vocabulary_probs(weight, hidden, scratch_bytes=scratch_bytes, impl="triton")
    assert_within_budget(result, weight, hidden)
    torch.testing.assert_close(result.sum(1), torch.ones(3, device=DEVICE), rtol=0, atol=2e-6)
    found = ops.vocabulary_statistics(weight, hidden, scratch_bytes=scratch_bytes, impl="triton")
    for value, truth in zip(found, statistics_of(weight, hidden), strict=False):
        assert (value.double() - truth).abs().max() <= 2e-6 + 30 * scale * EPS


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("scratch_bytes", [None, 0])
@pytest.mark.parametrize("spread", [1e-2, 1e-4])
def test_small_mutual_information_is_accurate(spread, scratch_bytes):
    weight = torch.randn(150, 8) / 8**0.5
    weight, hidden = there(weight, torch.randn(4, 1, 8) + spread * torch.randn(4, 6, 8))
    _, truth = statistics_of(weight, hidden)
    found = ops.vocabulary_statistics(weight, hidden, scratch_bytes=scratch_bytes, impl="triton").mutual_information
    assert ((found.double() - truth).abs() <= 2e-6 / spread * truth).all()
    assert (found >= 0).all()
    agreeing = ops.vocabulary_statistics(
        weight, hidden[:, :1].expand(4, 40, 8), scratch_bytes=scratch_bytes, impl="triton"
    )
    assert (agreeing.mutual_information <= 1e-11).all()
    assert (agreeing.mutual_information >= 0).all()


@pytest.mark.parametrize("spread", [0.01, 0.03, 0.1])
def test_mutual_information_of_a_skewed_sample(spread):
    """Ratios to the mean on one side and the other of where the series of its terms ends, and odd powers that count."""
    weight = torch.randn(150, 8) / 8**0.5
    skewed = torch.tensor([2.0, -1.0, -1.0])[:, None] * torch.randn(1, 8)
    weight, hidden = there(weight, torch.randn(4, 1, 8) + spread * skewed)
    _, truth = statistics_of(weight, hidden)
    found = ops.vocabulary_statistics(weight, hidden, impl="triton").mutual_information
    torch.testing.assert_close(found.double(), truth, rtol=1e-6 / spread, atol=0)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("cut", [0, 1, 131])
@pytest.mark.parametrize("kind", [None, "excluding"])
def test_a_vocabulary_in_two_unequal_parts(kind, cut, dtype):
    """Each part knows the whole's log-sum-exps: probabilities side by side, statistics added up."""
    weight, hidden = data(3, 5, 150, 9, dtype, dtype)
    (bias,) = there(bias_of(kind, 150))
    targets = torch.tensor([1, 131, 149], device=DEVICE)
    heads = [
        {"weight": weight[part], "bias": None if bias is None else bias[part], "impl": "triton"}
        for part in (slice(cut), slice(cut, 150))
    ]
    lse = torch.logaddexp(*(ops.vocabulary_logsumexp(hidden=hidden, **head) for head in heads))
    torch.testing.assert_close(lse, logits_of(weight, hidden, bias).logsumexp(-1), rtol=1e-6, atol=1e-6)
    mean = probs_of(weight, hidden, bias).mean(1)
    entropy, information = statistics_of(weight, hidden, bias)
    for merged in (lse, lse.float()):
        probs = torch.cat([ops.vocabulary_probs(hidden=hidden, logsumexp=merged, **head) for head in heads], dim=1)
        torch.testing.assert_close(probs.double(), mean, rtol=2e-5, atol=1e-9)
        found = [
            ops.vocabulary_statistics(
                hidden=hidden, logsumexp=merged, targets=targets - offset, scratch_bytes=0, **head
            )
            for offset, head in zip((0, cut), heads, strict=True)
        ]
        torch.testing.assert_close(sum(one.entropy for one in found).double(), entropy, rtol=2e-5, atol=1e-6)
        added = sum(one.mutual_information for one in found).double()
        torch.testing.assert_close(added, information, rtol=2e-5, atol=1e-6)
        log_prob = torch.maximum(*(one.target_log_prob for one in found)).double()
        truth = mean[torch.arange(3, device=DEVICE), targets].log()
        torch.testing.assert_close(log_prob, truth, rtol=2e-5, atol=1e-5)


def test_targets():
    weight, hidden = there(torch.tensor([[0.0], [-1.0]]), torch.tensor([[[500.0], [510.0]], [[0.0], [1000.0]]]))
    targets = torch.tensor([1, 1], dtype=torch.int32, device=DEVICE)
    for scratch_bytes in (None, 0):
        options = {"scratch_bytes": scratch_bytes, "impl": "triton"}
        found = ops.vocabulary_statistics(weight, hidden, targets=targets, **options)
        assert ops.vocabulary_probs(weight, hidden, **options)[0, 1] == 0
        truth = torch.tensor([-500 - math.log(2) + math.log1p(math.exp(-10)), math.log(0.25)], device=DEVICE)
        torch.testing.assert_close(found.target_log_prob, truth)
        certain = ops.vocabulary_statistics(weight[:1], hidden, targets=targets - 1, **options)
        assert (certain.target_log_prob == 0).all()
        assert (certain.entropy == 0).all()
        assert ops.vocabulary_statistics(weight, hidden, **options).target_log_prob is None
        outside = targets + torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
        if ON_GPU:  # looking would be a synchronisation
            found = ops.vocabulary_statistics(weight, hidden, targets=outside, **options)
            assert found.target_log_prob.isnan().tolist() == [False, True]
        else:
            with pytest.raises(ValueError, match=r"expected tokens in \[0, 2\), got 2"):
                ops.vocabulary_statistics(weight, hidden, targets=outside, **options)


@pytest.mark.parametrize("scratch_bytes", [None, 0])
def test_empty_and_hopeless(scratch_bytes):
    weight, hidden = data(2, 4, 7, 3)
    options = {"scratch_bytes": scratch_bytes, "impl": "triton"}
    assert ops.vocabulary_probs(weight, hidden[:0], **options).shape == (0, 7)
    assert ops.vocabulary_logsumexp(weight, hidden[:0], impl="triton").shape == (0, 4)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    found = ops.vocabulary_statistics(weight, hidden[:0], targets=none, **options)
    assert [value.shape for value in found] == [(0,)] * 3
    assert ops.vocabulary_probs(weight[:0], hidden, **options).shape == (2, 0)
    assert (ops.vocabulary_logsumexp(weight[:0], hidden, impl="triton") == NO_TOKEN).all()
    of_nothing = ops.vocabulary_probs(weight[:, :0], hidden[..., :0], **options)
    torch.testing.assert_close(of_nothing, torch.full((2, 7), 1 / 7, device=DEVICE))
    excluded = torch.full((7,), NO_TOKEN, device=DEVICE)
    assert ops.vocabulary_probs(weight, hidden, bias=excluded, **options).isnan().all()
    assert (ops.vocabulary_logsumexp(weight, hidden, bias=excluded, impl="triton") == NO_TOKEN).all()
    hidden[0, 1, 2] = math.nan  # of one example, and no other
    assert ops.vocabulary_probs(weight, hidden, **options).isnan().all(1).tolist() == [True, False]


@pytest.mark.parametrize(("weight_dtype", "factor_dtype"), PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_variance_equals_float64(shape, weight_dtype, factor_dtype):
    weight, hidden = data(*shape, weight_dtype, factor_dtype)
    factor = hidden.mT.contiguous()
    for w, f in (
        (weight, factor),
        (weight.T.contiguous().T, hidden.mT),
        (weight[:1].expand_as(weight), factor[:1].expand_as(factor)),
        (torch.cat([weight, weight])[::2], torch.cat([factor, factor], dim=2)[..., ::2]),
    ):
        result = ops.vocabulary_variance(w, f, impl="triton")
        truth = (w.double() @ f.double()).square().sum(-1)
        size = (w.double().abs() @ f.double().abs()).square().sum(-1)
        assert result.dtype == F32
        assert ((result.double() - truth).abs() <= 8 * EPS * size).all()
        assert (result >= 0).all()


def test_variance_of_nothing():
    weight, factor = there(torch.randn(4, 3), torch.randn(2, 3, 5))
    assert ops.vocabulary_variance(weight, factor[:0], impl="triton").shape == (0, 4)
    assert ops.vocabulary_variance(weight[:0], factor, impl="triton").shape == (2, 0)
    for w, f in ((weight, factor[..., :0]), (weight[:, :0], factor[:, :0])):
        assert (ops.vocabulary_variance(w, f, impl="triton") == torch.zeros(2, 4, device=DEVICE)).all()


def test_columns_as_a_sum_of_three(launch):
    """What stands for float32 columns beside a bfloat16 weight is exact, and the kernels add it up."""
    x = torch.cat([torch.randn(1000), torch.randn(1000) * 1e30, torch.randn(1000) * 1e-20, torch.zeros(1)])
    planes = launch.split_planes(x)
    assert planes.dtype == BF16
    assert torch.equal(planes.double().sum(0), x.double())
    weight, hidden = data(3, 5, 150, 37)
    out = torch.empty(3, 5, dtype=torch.float64, device=DEVICE)
    (variant,) = launch.vocabulary_logsumexp_variants(out, weight, hidden, None, None, False)
    problem = launch._problem(variant, weight, hidden, None, None)
    of_three = replace(problem, variant=replace(variant, planes=3), columns=launch.split_planes(hidden).float())
    launch._through_scratch(of_three, out, None, None)
    truth = logits_of(weight, hidden).logsumexp(-1)
    assert ((out - truth).abs() <= rounding_of(weight, hidden).amax(-1) + 4 * EPS).all()


def test_float64_is_refused():
    for call in (
        lambda weight, hidden: ops.vocabulary_probs(weight, hidden, impl="triton"),
        lambda weight, hidden: ops.vocabulary_statistics(weight, hidden, impl="triton"),
        lambda weight, hidden: ops.vocabulary_logsumexp(weight, hidden, impl="triton"),
        lambda weight, hidden: ops.vocabulary_variance(weight, hidden.mT, impl="triton"),
    ):
        for weight, hidden in (data(1, 2, 3, 4, torch.float64), data(1, 2, 3, 4, F32, torch.float64)):
            with pytest.raises(RuntimeError, match="float64"):
                call(weight, hidden)
