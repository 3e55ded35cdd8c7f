"""The operations on a whole vocabulary against dense float64 mathematics."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops.vocabulary import pieces, reference

EPS = torch.finfo(torch.float32).eps
NO_TOKEN = -math.inf


def logits_of(weight, hidden, bias=None, softcap=None, dtype=torch.float64):
    """[N, S, V], all of them; the bias is [V] or [N, V]."""
    z = hidden.to(dtype) @ weight.to(dtype).T
    bias = None if bias is None else bias.expand(len(hidden), -1)[:, None]
    z = z if bias is None else z + bias.to(dtype)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z if bias is None else z.masked_fill(bias == NO_TOKEN, NO_TOKEN)


def probs_of(*arguments, dtype=torch.float64):
    return torch.softmax(logits_of(*arguments, dtype=dtype), dim=-1)


def statistics_of(*arguments):
    """Entropy of the mean, and that less the mean entropy, float64."""
    probs = probs_of(*arguments)
    mean = probs.mean(1)
    entropy = torch.special.entr(mean).sum(-1)
    return entropy, entropy - torch.special.entr(probs).sum(-1).mean(1)


def rounding_of(weight, hidden, bias=None, eps=EPS):
    """What rounding does to each logit, [N, S, V]: the terms of its sum come to this size."""
    size = hidden.double().abs() @ weight.double().abs().T
    added = 0 if bias is None else bias.double().abs().nan_to_num(posinf=0).expand(len(hidden), -1)[:, None]
    return (8 + 2 * size + added) * eps


def assert_within_budget(result, *arguments):
    """At most twice the error of materialised PyTorch in the dtype of the result, per element, plus its rounding."""
    weight, hidden, bias = (*arguments, None)[:3]
    probs = probs_of(*arguments)
    plain = probs_of(*arguments, dtype=result.dtype).mean(1)
    largest = rounding_of(weight, hidden, bias, torch.finfo(result.dtype).eps).amax(-1, keepdim=True)
    budget = 2 * (plain.double() - probs.mean(1)).abs() + (probs * largest).mean(1) + torch.finfo(result.dtype).tiny
    assert ((result.double() - probs.mean(1)).abs() <= budget).all()


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces so small that every test here has several, of rows and of tokens."""
    monkeypatch.setattr(pieces, "PIECE", 64)
    monkeypatch.setattr(reference, "PIECE", 64)
    monkeypatch.setattr(pieces, "_TOKENS", 4)
    monkeypatch.setattr(pieces, "_ROWS", 12)
    monkeypatch.setattr(pieces, "_CONVERTED", 30)
    monkeypatch.setattr(reference, "_LEAST_BYTES", 0)


def scratch_sizes(vocabulary, samples):
    """The default; two passes; strips that cut examples, that hold one, that hold two and a bit."""
    rows = (4, samples - 1, samples, 2 * samples + 1)
    return None, 0, *(4 * vocabulary * count for count in rows)


def layouts(weight, hidden):
    """The same kind of data in every layout that callers hand over."""
    yield weight, hidden
    yield weight.T.contiguous().T, hidden.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    yield torch.cat([weight, weight])[::2], torch.cat([hidden, hidden], dim=2)[..., : weight.shape[1]]
    yield weight[:1].expand_as(weight), hidden[:, :1].expand_as(hidden)
    yield weight, hidden[:1].expand_as(hidden)
    yield weight[:, :1].expand_as(weight), hidden[..., :1].expand_as(hidden)


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float64),
]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("weight_dtype", "hidden_dtype"), DTYPES)
@pytest.mark.parametrize(("examples", "samples", "vocabulary", "width"), [(3, 5, 37, 6), (1, 1, 1, 1), (7, 1, 50, 3)])
def test_probs_equal_float64_in_every_layout(examples, samples, vocabulary, width, weight_dtype, hidden_dtype):
    weight = torch.randn(vocabulary, width).to(weight_dtype)
    hidden = (2 * torch.randn(examples, samples, width)).to(hidden_dtype)
    for w, h in layouts(weight, hidden):
        for scratch_bytes in scratch_sizes(vocabulary, samples):
            result = ops.vocabulary_probs(w, h, scratch_bytes=scratch_bytes)
            assert result.shape == (examples, vocabulary)
            assert result.dtype == (torch.float64 if hidden_dtype == torch.float64 else torch.float32)
            assert_within_budget(result, w, h)


HEADS = [
    (None, None),
    ("finite", None),
    ("excluding", None),
    (None, 3.0),
    ("finite", 3.0),
    ("excluding", 3.0),
]


def bias_of(kind, vocabulary, dtype=torch.float32):
    if kind is None:
        return None
    bias = torch.randn(vocabulary)
    if kind == "excluding":
        bias[::3] = NO_TOKEN
        bias[5:25] = NO_TOKEN  # whole pieces
    return bias.to(dtype)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("kind", "softcap"), HEADS)
def test_bias_softcap_and_excluded_tokens(kind, softcap):
    weight, hidden, bias = torch.randn(37, 6), 2 * torch.randn(3, 5, 6), bias_of(kind, 37)
    entropy, information = statistics_of(weight, hidden, bias, softcap)
    log_prob = probs_of(weight, hidden, bias, softcap).mean(1)[torch.arange(3), torch.tensor([4, 1, 35])].log()
    for scratch_bytes in scratch_sizes(37, 5):
        options = {"bias": bias, "softcap": softcap, "scratch_bytes": scratch_bytes}
        result = ops.vocabulary_probs(weight, hidden, **options)
        assert_within_budget(result, weight, hidden, bias, softcap)
        if kind == "excluding":
            assert (result[:, bias == NO_TOKEN] == 0).all()
        found = ops.vocabulary_statistics(weight, hidden, targets=torch.tensor([4, 1, 35]), **options)
        for value, truth in zip(found, (entropy, information, log_prob), strict=True):
            torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-6)
    lse = ops.vocabulary_logsumexp(weight, hidden, bias=bias, softcap=softcap)
    truth = torch.logsumexp(logits_of(weight, hidden, bias, softcap), dim=-1)
    assert lse.dtype == torch.float64
    torch.testing.assert_close(lse, truth, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("weight_dtype", "hidden_dtype"), DTYPES)
@pytest.mark.parametrize(("kind", "softcap"), [*HEADS[:3], HEADS[-1]])
@pytest.mark.parametrize(("examples", "samples"), [(3, 5), (7, 1)])
def test_mirror_images_and_a_bias_for_each_example(examples, samples, kind, softcap, weight_dtype, hidden_dtype):
    """As if the images were samples; one example's bias is not another's."""
    weight, hidden = torch.randn(37, 6).to(weight_dtype), torch.randn(examples, samples, 6).to(hidden_dtype)
    bias = None if kind is None else torch.stack([3 * bias_of(kind, 37) for _ in range(examples)]).T.contiguous().T
    both = torch.cat([hidden, -hidden], dim=1)
    targets = torch.tensor([4, 1, 35, 2, 2, 26, 29])[:examples]
    lse = logits_of(weight, both, bias, softcap).logsumexp(-1)
    mean = probs_of(weight, both, bias, softcap).mean(1)
    truth = (*statistics_of(weight, both, bias, softcap), mean[torch.arange(examples), targets].log())
    for given, mirrored in ((hidden, True), (both, False)):
        head = {"bias": bias, "softcap": softcap, "mirrored": mirrored}
        found = ops.vocabulary_logsumexp(weight, given, **head)
        torch.testing.assert_close(found, lse, rtol=1e-6, atol=1e-6)
        for known in (None, found):
            for scratch_bytes in scratch_sizes(37, samples):
                options = {**head, "scratch_bytes": scratch_bytes, "logsumexp": known}
                assert_within_budget(ops.vocabulary_probs(weight, given, **options), weight, both, bias, softcap)
                values = ops.vocabulary_statistics(weight, given, targets=targets, **options)
                for value, true in zip(values, truth, strict=True):
                    torch.testing.assert_close(value.double(), true, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("scale", [1.0, 300.0, 1e4])
def test_huge_logits(scale):
    """Normalised to rounding, whatever their size, and as near the truth as materialised PyTorch."""
    weight, hidden = torch.randn(37, 6), torch.randn(3, 5, 6)
    weight *= scale / logits_of(weight, hidden).abs().max()
    targets = torch.tensor([0, 20, 36])
    for scratch_bytes in scratch_sizes(37, 5):
        result = ops.vocabulary_probs(weight, hidden, scratch_bytes=scratch_bytes)
        assert_within_budget(result, weight, hidden)
        torch.testing.assert_close(result.sum(1), torch.ones(3), rtol=0, atol=1e-6)
        found = ops.vocabulary_statistics(weight, hidden, targets=targets, scratch_bytes=scratch_bytes)
        for value, truth in zip(found, statistics_of(weight, hidden), strict=False):
            assert (value.double() - truth).abs().max() <= 1e-6 + 30 * scale * EPS
        log_probs = torch.log_softmax(logits_of(weight, hidden), dim=-1)[torch.arange(3), :, targets]
        truth = torch.logsumexp(log_probs, dim=1) - math.log(5)
        assert (found.target_log_prob.double() - truth).abs().max() <= 1e-6 + 4 * scale * EPS


@pytest.mark.parametrize("scratch_bytes", [None, 0])
@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_small_mutual_information_is_accurate(spread, scratch_bytes):
    weight = torch.randn(300, 8) / 8**0.5
    hidden = torch.randn(4, 1, 8) + spread * torch.randn(4, 6, 8)
    _, truth = statistics_of(weight, hidden)
    found = ops.vocabulary_statistics(weight, hidden, scratch_bytes=scratch_bytes)
    assert ((found.mutual_information.double() - truth).abs() <= 2e-6 / spread * truth).all()
    # What the textbook's difference gives from the same logits: nothing, once the information is small.
    probs = torch.softmax(hidden @ weight.T, dim=-1)
    mean = probs.mean(1)
    textbook = -(mean * mean.log()).sum(-1) + (probs * probs.log()).sum(-1).mean(1)
    if spread == 1e-4:
        assert ((textbook.double() - truth).abs() > 10 * truth).any()
    assert (found.mutual_information >= 0).all()


def test_samples_that_agree_have_no_mutual_information():
    weight, hidden = torch.randn(500, 16), torch.randn(3, 1, 16).expand(3, 40, 16)
    for scratch_bytes in (None, 0):
        found = ops.vocabulary_statistics(weight, hidden, scratch_bytes=scratch_bytes).mutual_information
        assert (found >= 0).all()
        assert (found <= 1e-11).all()
    two = torch.tensor([[[40.0], [-40.0]]])  # each sample is certain, of another token
    found = ops.vocabulary_statistics(torch.tensor([[1.0], [-1.0]]), two)
    torch.testing.assert_close(found.mutual_information, torch.tensor([math.log(2)]))
    torch.testing.assert_close(found.entropy, torch.tensor([math.log(2)]))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", [None, "excluding"])
@pytest.mark.parametrize("cut", [0, 1, 26, 37])
def test_a_vocabulary_in_two_parts(cut, kind):
    """Each part knows the whole's log-sum-exps: probabilities side by side, statistics added up."""
    weight, hidden, bias = 3 * torch.randn(37, 6), 2 * torch.randn(3, 5, 6), bias_of(kind, 37)
    targets = torch.tensor([0, 26, 36])
    heads = [
        {"weight": weight[part], "bias": None if bias is None else bias[part]} for part in (slice(cut), slice(cut, 37))
    ]
    lse = torch.logaddexp(*(ops.vocabulary_logsumexp(hidden=hidden, **head) for head in heads))
    whole = torch.logsumexp(logits_of(weight, hidden, bias), dim=-1)
    torch.testing.assert_close(lse, whole, rtol=1e-6, atol=1e-6)
    for merged in (lse, lse.float()):
        parts = [ops.vocabulary_probs(hidden=hidden, logsumexp=merged, **head) for head in heads]
        torch.testing.assert_close(
            torch.cat(parts, dim=1).double(), probs_of(weight, hidden, bias).mean(1), rtol=2e-5, atol=1e-9
        )
        found = [
            ops.vocabulary_statistics(hidden=hidden, logsumexp=merged, targets=targets - offset, **head)
            for offset, head in zip((0, cut), heads, strict=True)
        ]
        entropy, information = statistics_of(weight, hidden, bias)
        torch.testing.assert_close(sum(one.entropy for one in found).double(), entropy, rtol=2e-5, atol=1e-6)
        added = sum(one.mutual_information for one in found)
        torch.testing.assert_close(added.double(), information, rtol=2e-5, atol=1e-6)
        log_prob = torch.maximum(*(one.target_log_prob for one in found))
        truth = probs_of(weight, hidden, bias).mean(1)[torch.arange(3), targets].log()
        torch.testing.assert_close(log_prob.double(), truth, rtol=2e-5, atol=1e-5)


def test_log_prob_of_a_target_whose_probability_underflows():
    weight, hidden = torch.tensor([[0.0], [-1.0]]), torch.tensor([[[500.0], [510.0]], [[0.0], [1000.0]]])
    found = ops.vocabulary_statistics(weight, hidden, targets=torch.tensor([1, 1], dtype=torch.int32))
    assert (ops.vocabulary_probs(weight, hidden)[0, 1]) == 0
    truth = torch.tensor([-500 - math.log(2) + math.log1p(math.exp(-10)), math.log(0.25)])
    torch.testing.assert_close(found.target_log_prob, truth)
    certain = ops.vocabulary_statistics(weight[:1], hidden, targets=torch.tensor([0, 0]))
    assert (certain.target_log_prob == 0).all()
    assert (certain.entropy == 0).all()
    assert ops.vocabulary_statistics(weight, hidden).target_log_prob is None


@pytest.mark.parametrize("scratch_bytes", [None, 0])
def test_empty_and_hopeless(scratch_bytes):
    weight, hidden = torch.randn(7, 3), torch.randn(2, 4, 3)
    options = {"scratch_bytes": scratch_bytes}
    assert ops.vocabulary_probs(weight, hidden[:0], **options).shape == (0, 7)
    assert ops.vocabulary_logsumexp(weight, hidden[:0]).shape == (0, 4)
    found = ops.vocabulary_statistics(weight, hidden[:0], targets=torch.zeros(0, dtype=torch.int64), **options)
    assert [value.shape for value in found] == [(0,)] * 3
    assert ops.vocabulary_probs(weight[:0], hidden, **options).shape == (2, 0)
    assert (ops.vocabulary_logsumexp(weight[:0], hidden) == NO_TOKEN).all()
    torch.testing.assert_close(
        ops.vocabulary_probs(weight[:, :0], hidden[..., :0], **options), torch.full((2, 7), 1 / 7)
    )
    nothing = torch.full((7,), NO_TOKEN)
    assert ops.vocabulary_probs(weight, hidden, bias=nothing, **options).isnan().all()
    assert (ops.vocabulary_logsumexp(weight, hidden, bias=nothing) == NO_TOKEN).all()
    hidden[0, 1, 2] = math.nan  # of one example, and no other
    assert ops.vocabulary_probs(weight, hidden, **options).isnan().all(1).tolist() == [True, False]


@pytest.mark.parametrize(("weight_dtype", "factor_dtype"), DTYPES)
@pytest.mark.parametrize(
    ("examples", "vocabulary", "width", "columns"), [(5, 41, 7, 3), (1, 1, 1, 1), (3, 300, 20, 300)]
)
def test_variance_equals_float64(monkeypatch, examples, vocabulary, width, columns, weight_dtype, factor_dtype):
    monkeypatch.setattr(reference, "_PRODUCT", 1000)
    monkeypatch.setattr(reference, "_COLUMNS", 7)
    weight = torch.randn(vocabulary, width).to(weight_dtype)
    factor = torch.randn(examples, width, columns).to(factor_dtype)
    for w, f in (
        (weight, factor),
        (weight.T.contiguous().T, factor.mT.contiguous().mT),
        (weight[:1].expand_as(weight), factor[:1].expand_as(factor)),
        (torch.cat([weight, weight])[::2], torch.cat([factor, factor], dim=2)[..., ::2]),
    ):
        result = ops.vocabulary_variance(w, f)
        truth = (w.double() @ f.double()).square().sum(-1)
        size = (w.double().abs() @ f.double().abs()).square().sum(-1)
        assert result.shape == (examples, vocabulary)
        assert result.dtype == (torch.float64 if factor_dtype == torch.float64 else torch.float32)
        assert ((result.double() - truth).abs() <= 8 * torch.finfo(result.dtype).eps * size).all()
        assert (result >= 0).all()


def test_variance_of_nothing():
    assert ops.vocabulary_variance(torch.randn(4, 3), torch.randn(0, 3, 2)).shape == (0, 4)
    assert ops.vocabulary_variance(torch.randn(0, 3), torch.randn(2, 3, 2)).shape == (2, 0)
    assert (ops.vocabulary_variance(torch.randn(4, 3), torch.randn(2, 3, 0)) == torch.zeros(2, 4)).all()
    assert (ops.vocabulary_variance(torch.randn(4, 0), torch.randn(2, 0, 3)) == torch.zeros(2, 4)).all()


def test_records_no_gradient():
    weight, hidden = torch.randn(5, 3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    assert not ops.vocabulary_probs(weight, hidden).requires_grad
    assert not ops.vocabulary_logsumexp(weight, hidden).requires_grad
    assert not ops.vocabulary_statistics(weight, hidden).entropy.requires_grad
    assert not ops.vocabulary_variance(weight, hidden.mT).requires_grad


MEMORY = """
    import torch
    from benchmarks.peak_memory import peak_bytes
    from bayesian_lora_kernels import ops

    V, N, S = 128256, 16, 64
    weight, hidden = torch.randn(V, 32), torch.randn(N, S, 32)
    half, few = torch.randn(V, 512).bfloat16(), torch.randn(4, 16, 512)
    targets = torch.randint(V, (N,))
    calls = {
        "probs": lambda: ops.vocabulary_probs(weight, hidden),
        "probs in two passes": lambda: ops.vocabulary_probs(weight, hidden, scratch_bytes=0),
        "logsumexp": lambda: ops.vocabulary_logsumexp(weight, hidden),
        "statistics": lambda: ops.vocabulary_statistics(weight, hidden, targets=targets),
        "variance": lambda: ops.vocabulary_variance(weight, hidden.mT),
        "probs of a bfloat16 head": lambda: ops.vocabulary_probs(half, few, scratch_bytes=14 << 20),
    }
    for head in (weight, half):  # code that loads at first use is there, and the buffers of the matrix product
        ops.vocabulary_probs(head[:4000], torch.randn(4, 16, head.shape[1]))
        ops.vocabulary_statistics(head[:4000], torch.randn(4, 16, head.shape[1]))
    for name, call in calls.items():
        print(f"{name}: {peak_bytes(call)}")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark of memory is Linux's")
def test_peak_memory():
    """Measured in a process of its own: above the weight, at most three results of vocabulary_probs, never N S V."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = {name: int(peak) for name, peak in (line.split(": ") for line in done.stdout.splitlines())}
    result, materialised = 4 * 16 * 128256, 4 * 16 * 64 * 128256
    assert peaks["probs"] <= 3 * result
    assert peaks["probs in two passes"] <= 2 * result
    assert peaks["logsumexp"] <= result
    assert peaks["statistics"] <= materialised / 6
    assert peaks["variance"] <= 2 * result
    assert peaks["probs of a bfloat16 head"] <= 3 * result


def good():
    return {"weight": torch.randn(7, 3), "hidden": torch.randn(2, 4, 3)}


BAD = [
    ({"weight": [1.0]}, TypeError, r"weight: expected a tensor \[V, d\], got list"),
    ({"weight": torch.ones(7, 3).long()}, TypeError, r"weight: expected dtype float16.*got int64\[7, 3\]"),
    ({"weight": torch.ones(7)}, ValueError, r"weight: expected shape \[V, d\], got float32\[7\]"),
    ({"hidden": torch.ones(4, 3)}, ValueError, r"hidden: expected shape \[N, S, 3\], got float32\[4, 3\]"),
    ({"hidden": torch.ones(2, 4, 5)}, ValueError, r"hidden: expected shape \[N, S, 3\], got float32\[2, 4, 5\]"),
    ({"hidden": torch.ones(2, 0, 3)}, ValueError, r"hidden: expected at least one sample, got float32\[2, 0, 3\]"),
    ({"hidden": torch.ones(2, 4, 3, device="meta")}, ValueError, r"hidden: expected a tensor on cpu, got .* on meta"),
    ({"bias": torch.ones(6)}, ValueError, r"bias: expected shape \[7\], got float32\[6\]"),
    ({"bias": torch.ones(7).bool()}, TypeError, r"bias: expected dtype float16.*got bool"),
    ({"softcap": 0.0}, ValueError, r"softcap: expected a positive finite number, got 0.0"),
    ({"softcap": math.inf}, ValueError, r"softcap: expected a positive finite number, got inf"),
    ({"softcap": math.nan}, ValueError, r"softcap: expected a positive finite number, got nan"),
    ({"softcap": "30"}, TypeError, r"softcap: expected a number or None, got str"),
    ({"bias": torch.ones(3, 7)}, ValueError, r"bias: expected shape \[2, 7\], got float32\[3, 7\]"),
    ({"mirrored": 1}, TypeError, r"mirrored: expected True or False, got int"),
    ({"impl": "cuda"}, ValueError, r"expected impl to be one of .*got 'cuda'"),
]
BAD_PROBS = [
    ({"logsumexp": torch.ones(4, 2)}, ValueError, r"logsumexp: expected shape \[2, 4\], got float32\[4, 2\]"),
    ({"logsumexp": torch.ones(2, 4).half()}, TypeError, r"logsumexp: expected dtype float64, float32, got float16"),
    ({"scratch_bytes": -1}, ValueError, r"scratch_bytes: expected at least 0, got -1"),
    ({"scratch_bytes": 1e6}, TypeError, r"scratch_bytes: expected an integer or None, got float"),
]
BAD_STATISTICS = [
    ({"targets": torch.ones(2)}, TypeError, r"targets: expected dtype int64, int32, got float32\[2\]"),
    ({"targets": torch.ones(3).long()}, ValueError, r"targets: expected shape \[2\], got int64\[3\]"),
    ({"targets": torch.tensor([0, 7])}, ValueError, r"targets: expected tokens in \[0, 7\), got 7 \(1 of 2 out"),
    ({"targets": torch.tensor([-1, 6])}, ValueError, r"targets: expected tokens in \[0, 7\), got -1 \(1 of 2 out"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
@pytest.mark.parametrize("name", ["vocabulary_logsumexp", "vocabulary_probs", "vocabulary_statistics"])
def test_bad_arguments_are_named(name, change, error, message):
    with pytest.raises(error, match=f"{name}: {message}"):
        getattr(ops, name)(**good() | change)


@pytest.mark.parametrize(("change", "error", "message"), BAD_PROBS)
@pytest.mark.parametrize("name", ["vocabulary_probs", "vocabulary_statistics"])
def test_bad_arguments_of_a_part_are_named(name, change, error, message):
    with pytest.raises(error, match=f"{name}: {message}"):
        getattr(ops, name)(**good() | change)


@pytest.mark.parametrize(("change", "error", "message"), BAD_STATISTICS)
def test_bad_targets_are_named(change, error, message):
    with pytest.raises(error, match=f"vocabulary_statistics: {message}"):
        ops.vocabulary_statistics(**good() | change)


@pytest.mark.parametrize(
    ("weight", "factor", "error", "message"),
    [
        (torch.ones(3), torch.ones(1, 3, 1), ValueError, r"weight: expected shape \[V, d\], got float32\[3\]"),
        (torch.ones(5, 3), torch.ones(3, 1), ValueError, r"factor: expected shape \[N, 3, m\], got float32\[3, 1\]"),
        (torch.ones(5, 3), torch.ones(1, 4, 1), ValueError, r"factor: expected shape \[N, 3, m\], got float32\[1, 4"),
        (torch.ones(5, 3), torch.ones(1, 3, 1).int(), TypeError, r"factor: expected dtype float16.*got int32"),
        (torch.ones(5, 3), torch.ones(1, 3, 1, device="meta"), ValueError, r"factor: expected a tensor on cpu"),
    ],
)
def test_bad_arguments_of_the_variance_are_named(weight, factor, error, message):
    with pytest.raises(error, match=f"vocabulary_variance: {message}"):
        ops.vocabulary_variance(weight, factor)
