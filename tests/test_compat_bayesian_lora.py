"""compat.bayesian_lora: against bayesian_lora 0.0.6 where that is right or reproduced, else against mathematics."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import models
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshot import untouched
from torch import Tensor, nn

import bayesian_lora_kernels as blk
import bayesian_lora_kernels.compat.bayesian_lora as ours
from bayesian_lora_kernels.compat.lazy_jacobian import LazyJacobian

PEER = "the peer, bayesian_lora 0.0.6, is not installed"
CLASSES = (2, 5, 7)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return pytest.importorskip("bayesian_lora.main", reason=PEER)


@pytest.fixture(scope="module")
def their_kfac() -> Any:
    return pytest.importorskip("bayesian_lora.kfac", reason=PEER)


def small_llama(**changes: Any) -> Any:
    return models.llama(dtype=torch.float32, **changes).model


def token_batch(n: int, t: int, seed: int = 3) -> transformers.BatchEncoding:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, models.VOCABULARY, (n, t), generator=generator)
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def last(output: Any) -> Tensor:
    return output.logits[:, -1, list(CLASSES)]


def forward_call(model: nn.Module, batch: Any) -> Tensor:
    return last(model(**batch))


def random_factors(model: nn.Module, rank: int, kept: int, seed: int = 0) -> ours.KFAC_t:
    """Roots of factors for every LoRA module, as cholesky_decompose_small_factors leaves them."""
    generator = torch.Generator().manual_seed(seed)

    def small() -> Tensor:
        return torch.linalg.qr(torch.randn(rank, rank, generator=generator))[1].mT.contiguous()

    factors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lora" in name:
            wide = torch.randn(max(module.weight.shape), kept, generator=generator)
            factors[name] = (wide, small()) if "lora_A" in name else (small(), wide)
    return factors


def assert_close(value: Tensor, truth: Tensor, tolerance: float) -> None:
    assert value.shape == truth.shape
    scale = truth.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
    assert (value.double() - truth.double()).norm() <= tolerance * scale


@settings(max_examples=8, deadline=None)
@given(
    n=st.integers(2, 4),
    t=st.integers(1, 7),
    classes=st.integers(2, 4),
    rank=st.integers(1, 4),
    kept=st.integers(1, 6),
    s2=st.floats(0.01, 10.0),
)
def test_variance_and_jacobian_work_with_theirs_in_both_directions(theirs, n, t, classes, rank, kept, s2):
    model = small_llama(r=rank).eval()
    batch, ids = token_batch(n, t), list(range(1, 1 + classes))
    factors = random_factors(model, rank, kept)

    def callback(output: Any) -> Tensor:
        return output.logits[:, -1, ids]

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)
        their_jacobian, their_mean = theirs.jacobian_mean(model, batch, output_callback=callback)
    our_jacobian, our_mean = ours.jacobian_mean(model, batch, torch.tensor(ids))
    assert isinstance(our_jacobian, LazyJacobian)
    arguments = (factors, torch.tensor(s2), classes, rank, kept, "cpu")
    fused = ours.variance(batch, our_jacobian, *arguments)
    dense = ours.variance(batch, their_jacobian, *arguments)
    if rank > 1:  # .squeeze() takes a rank of 1 for something else
        truth = theirs.variance(batch, their_jacobian, *arguments)
        assert_close(fused, truth, 1e-5)
        assert_close(dense, truth, 1e-5)
        assert_close(theirs.variance(batch, our_jacobian, *arguments), truth, 1e-5)
    assert_close(fused, dense, 1e-5)
    assert_close(our_mean, their_mean, 1e-5)
    assert our_jacobian.keys() == their_jacobian.keys()
    for name, value in our_jacobian.items():
        assert_close(value, their_jacobian[name], 1e-4)


def test_the_lazy_jacobian_is_a_mapping_that_may_be_changed():
    model = small_llama().eval()
    batch, factors = token_batch(3, 5), random_factors(model, 3, 4)
    jacobian, _ = ours.jacobian_mean(model, batch, torch.tensor(CLASSES))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(jacobian) == names == set(jacobian.keys())
    assert len(jacobian) == len(names)
    name = next(iter(names))
    assert jacobian[name] is jacobian[name]
    assert jacobian.get("nothing") is None
    arguments = (factors, torch.tensor(0.5), len(CLASSES), 3, 4, "cpu")
    before = ours.variance(batch, jacobian, *arguments)
    jacobian[name] = 2 * jacobian[name]
    changed = ours.variance(batch, jacobian, *arguments)
    assert_close(changed, ours.variance(batch, dict(jacobian), *arguments), 1e-5)
    assert (changed - before).norm() > 1e-3 * before.norm()
    del jacobian[name]
    with pytest.raises(ValueError, match=r"no parameter could belong to this factor"):
        ours.variance(batch, jacobian, *arguments)


def test_variance_records_a_gradient_of_the_prior_variance():
    model = small_llama().eval()
    batch, factors = token_batch(2, 4), random_factors(model, 3, 4)
    jacobian, _ = ours.jacobian_mean(model, batch, torch.tensor(CLASSES))

    def trace(s2: Tensor) -> Tensor:
        return ours.variance(batch, jacobian, factors, s2, 3, 3, 4, "cpu").diagonal(dim1=1, dim2=2).sum()

    s2 = torch.tensor(0.7, requires_grad=True)
    (gradient,) = torch.autograd.grad(trace(s2), s2)
    with torch.no_grad():
        numeric = (trace(s2 + 1e-2) - trace(s2 - 1e-2)) / 2e-2
    assert gradient == pytest.approx(float(numeric), rel=1e-2)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("count", [1, 3])
def test_variance_of_one_example_and_one_logit_is_that_of_the_dense_posterior(n, count):
    case = models.llama()
    model, ids = case.model, torch.tensor(CLASSES[:count])
    factors = {k: (a.double(), s.double()) for k, (a, s) in random_factors(model, 3, 4).items()}
    batch = token_batch(n, 5)
    jacobian, mean = ours.jacobian_mean(model, batch, ids)
    covariance = ours.variance(batch, jacobian, factors, torch.tensor(0.3), count, 3, 4, "cpu")
    truth = torch.zeros(n, count, count, dtype=torch.float64)
    for key, (a, s) in factors.items():
        precision = torch.kron(s @ s.mT, a @ a.mT) + torch.eye(s.shape[0] * a.shape[0]) / 0.3
        flat = jacobian[f"{key}.weight"].flatten(2)
        truth += flat @ torch.linalg.solve(precision, flat.mT)
    assert_close(covariance, truth, 1e-6)  # 0.3 is a float32
    with torch.no_grad():
        assert_close(mean, model(**batch).logits[:, -1, ids], 1e-10)


def autograd_jacobian(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [torch.autograd.grad(value, list(named.values()), retain_graph=True) for value in logits.flatten()]
    stacked = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return {name: part.reshape(*logits.shape, *part.shape[1:]) for name, part in zip(named, stacked, strict=True)}


@pytest.mark.parametrize("build", [models.llama, models.gpt2, models.bert], ids=["llama", "gpt2", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_jacobian_of_padded_batches_is_autograd_s_of_each_example_alone(build, side):
    case = build()
    model = case.model.train()
    if side == "left" and build is models.bert:
        pytest.skip("BERT counts positions from the first column: its padding is on the right")
    batch = case.batch(side=side)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    ids = case.arguments.get("class_token_ids")
    with untouched(model):
        jacobian, mean = ours.jacobian_mean(model, inputs, None if ids is None else torch.tensor(ids))
    truth = case.evaluated()
    for i, example in enumerate(case.examples):
        logits = case.logits(truth, example)
        assert_close(mean[i], logits.detach(), 1e-9)
        for name, value in autograd_jacobian(truth, logits).items():
            torch.testing.assert_close(jacobian[name][i], value, rtol=1e-8, atol=1e-10)


def test_jacobian_with_a_trained_output_head_keeps_the_head_s_whole_shape():
    model = models.llama(targets=("q_proj", "lm_head")).model
    batch = token_batch(2, 4)
    jacobian, _ = ours.jacobian_mean(model, batch, torch.tensor(CLASSES))
    model.eval()
    for name, value in autograd_jacobian(model, last(model(**batch))).items():
        torch.testing.assert_close(jacobian[name], value, rtol=1e-8, atol=1e-10)


@settings(max_examples=6, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    t=st.integers(1, 6),
    rank=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_full_rank_factors_are_theirs_under_the_same_sampled_targets(their_kfac, sizes, t, rank, seed):
    model = small_llama(r=rank).double()  # in float32 a target that is almost sure leaves few digits
    loader = [token_batch(n, t, seed + i) for i, n in enumerate(sizes)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        truth = their_kfac.calculate_kronecker_factors(
            copy.deepcopy(model), forward_call, loader, target_module_keywords=["lora"]
        )
    torch.manual_seed(seed)
    factors = ours.calculate_kronecker_factors(model, forward_call, loader, target_module_keywords=["lora"])
    assert factors.keys() == truth.keys()
    for name, (a, s) in factors.items():
        assert_close(a, truth[name][0], 1e-5)
        assert_close(s, truth[name][1], 1e-5)


def test_factors_of_biases_are_theirs(their_kfac):
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh())

    torch.manual_seed(0)
    model, loader = Tokens(), [torch.randn(4, 3, 6) for _ in range(3)]

    def call(m: nn.Module, x: Tensor) -> Tensor:
        return m(x)[:, -1]

    for exclude in (False, True):
        torch.manual_seed(1)
        truth = their_kfac.calculate_kronecker_factors(copy.deepcopy(model), call, loader, exclude_bias=exclude)
        torch.manual_seed(1)
        factors = ours.calculate_kronecker_factors(model, call, loader, exclude_bias=exclude)
        assert factors["first"][0].shape == ((6, 6) if exclude else (7, 7))
        for name, pair in factors.items():
            assert_close(pair[0], truth[name][0], 1e-5)
            assert_close(pair[1], truth[name][1], 1e-5)


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 100), kept=st.integers(2, 8), batches=st.integers(1, 12))
def test_low_rank_factors_are_at_least_as_close_to_the_best_as_theirs(their_kfac, seed, kept, batches):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(48, 4, bias=False), nn.Tanh(), nn.Linear(4, 40, bias=False))
    spread = torch.linspace(1, 0.1, 48)
    loader = [spread * torch.randn(7, 2, 48) for _ in range(batches)]

    def call(m: nn.Module, x: Tensor) -> Tensor:
        return m(x)[:, -1]

    arguments = (model, call, loader)
    results = {}
    for name, function in (("theirs", their_kfac.calculate_kronecker_factors), ("ours", calculate)):
        torch.manual_seed(seed)
        results[name] = function(*arguments, n_kfac=kept, lr_threshold=32)
    torch.manual_seed(seed)
    full = calculate(*arguments)
    for key, which in (("0", 0), ("2", 1)):
        # The low-rank ones are divided by nothing; full factors are means over batches.
        truth = full[key][which].double() * batches
        best = torch.linalg.eigvalsh(truth)[:-kept].norm()
        errors = {name: (truth - r[key][which] @ r[key][which].mT).norm() for name, r in results.items()}
        assert results["ours"][key][which].shape == results["theirs"][key][which].shape
        assert results["ours"][key][which].dtype == results["theirs"][key][which].dtype
        assert errors["ours"] <= 1.005 * errors["theirs"] + 1e-5 * truth.norm()
        assert errors["ours"] <= 1.1 * best + 1e-5 * truth.norm()


calculate = ours.calculate_kronecker_factors


def test_a_low_rank_factor_narrower_than_its_rank_is_a_root_of_the_full_one():
    torch.manual_seed(0)
    model, loader = nn.Linear(6, 4), [torch.randn(5, 2, 6) for _ in range(2)]

    def call(m: nn.Module, x: Tensor) -> Tensor:
        return m(x)[:, -1]

    torch.manual_seed(1)
    full = calculate(model, call, loader)[""]
    torch.manual_seed(1)
    roots = calculate(model, call, loader, n_kfac=16, lr_threshold=4)[""]
    for root, factor in zip(roots, full, strict=True):
        assert_close(root @ root.mT, 2 * factor, 1e-5)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_correct_scale_is_that_of_the_engine_whatever_the_batches_and_the_padding(size):
    case = models.llama()
    reference = blk.LaplaceLoRA(case.model, class_token_ids=CLASSES, fisher="exact", rank=None)
    reference.fit(case.loader(4), progress=False)
    texts = [example.tolist() for example in case.examples]

    def call(m: nn.Module, batch: list[list[int]]) -> Tensor:  # strings and lists are batches too
        padded = models.pad([torch.tensor(ids) for ids in batch], torch.zeros(len(batch)), side="right", extra=2)
        mask = padded["attention_mask"]
        logits = m(input_ids=padded["input_ids"], attention_mask=mask).logits
        return logits[torch.arange(len(batch)), mask.sum(dim=1) - 1][:, list(CLASSES)]

    loader = [texts[i : i + size] for i in range(0, len(texts), size)]
    with untouched(case.model):
        factors = calculate(case.model, call, loader, target_module_keywords=["lora"], scale="correct")
    assert factors.keys() == reference.factors.keys()
    for name, (a, s) in factors.items():
        assert_close(a, reference.factors[name].a, 1e-9)
        assert_close(s, reference.factors[name].s, 1e-9)


def test_two_adapters_are_not_confused():
    model = small_llama()
    model.add_adapter("default_2", model.peft_config["default"])
    models.randomise(model, seed=11)
    model.set_adapter("default_2")
    batch = token_batch(3, 4)
    factors = calculate(model, forward_call, [batch], target_module_keywords=["lora"])
    assert factors
    assert all("default_2" in name for name in factors)
    jacobian = {f"{name}.weight": torch.zeros(3, 3, *shape) for name, shape in _shapes(model)}
    roots = random_factors(model, 3, 4)
    for name in jacobian:
        if "default_2" in name:
            jacobian[name] = torch.randn_like(jacobian[name])
    one = {name: pair for name, pair in roots.items() if name.endswith("default")}
    assert ours.variance(batch, jacobian, one, torch.tensor(1.0), 3, 3, 4, "cpu").abs().max() == 0
    two = {name: pair for name, pair in roots.items() if name.endswith("default_2")}
    assert ours.variance(batch, jacobian, two, torch.tensor(1.0), 3, 3, 4, "cpu").abs().max() > 0


def _shapes(model: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(n, m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lora" in n]


def test_encoders_and_conv1d_bases_have_factors():
    for case, keywords in ((models.bert(), ["lora", "classifier.modules_to_save"]), (models.gpt2(), ["lora"])):

        def call(m: nn.Module, batch: Any) -> Tensor:
            logits = m(**{key: value for key, value in batch.items() if key != "labels"}).logits
            return logits if logits.ndim == 2 else logits[:, -1, [1, 4]]

        loader = case.loader(2, side="right")
        factors = calculate(case.model, call, loader, target_module_keywords=keywords)
        trainable = {n.removesuffix(".weight") for n, p in case.model.named_parameters() if p.requires_grad}
        assert set(factors) == {name for name in trainable if not name.endswith("bias")}
        assert all(a.isfinite().all() and s.isfinite().all() for a, s in factors.values())


def evidence_case(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, ours.KFAC_t]:
    model = models.llama(dtype=dtype).model
    return model, {k: (a.to(dtype), s.to(dtype)) for k, (a, s) in random_factors(model, 3, 4).items()}


def test_model_evidence_is_the_laplace_evidence():
    model, factors = evidence_case()
    s2 = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    evidence = ours.model_evidence(model, torch.tensor(-3.0), factors, 3, 4, s2)
    truth = torch.tensor(-3.0, dtype=torch.float64)
    for key, (a, s) in factors.items():
        weight = dict(model.named_parameters())[f"{key}.weight"].detach()
        identity = torch.eye(weight.numel(), dtype=torch.float64)
        curvature = torch.kron(s @ s.mT, a @ a.mT)
        truth = truth - 0.5 * weight.square().sum() / s2 - 0.5 * torch.logdet(identity + s2 * curvature)
    assert float(evidence.detach()) == pytest.approx(float(truth.detach()), rel=1e-10)
    (ours_gradient,), (true_gradient,) = (torch.autograd.grad(value, s2) for value in (evidence, truth))
    assert float(ours_gradient) == pytest.approx(float(true_gradient), rel=1e-9)


def test_published_model_evidence_is_theirs(theirs):
    model, factors = evidence_case(torch.float32)
    s2 = torch.tensor(0.4)
    truth = theirs.model_evidence(model, torch.tensor(-3.0), factors, 3, 4, s2)
    published = ours.model_evidence(model, torch.tensor(-3.0), factors, 3, 4, s2, published=True)
    assert float(published) == pytest.approx(float(truth), rel=1e-5)
    assert float(ours.model_evidence(model, torch.tensor(-3.0), factors, 3, 4, s2)) != pytest.approx(float(truth))


def test_small_functions_are_theirs(theirs, their_kfac):
    torch.manual_seed(0)
    old, rows = torch.randn(30, 4), torch.randn(9, 30)
    for kept in (None, 2, 7):
        update, truth = ours.incremental_svd(old, rows, n_kfac=kept), their_kfac.incremental_svd(old, rows, n_kfac=kept)
        assert update.shape == truth.shape
        assert update.dtype == truth.dtype
        assert_close(update @ update.mT, truth @ truth.mT, 1e-6)
    indefinite = torch.rand(10, 10) + 0.1 * torch.eye(10)
    indefinite = indefinite + indefinite.mT
    for matrix in (indefinite, torch.zeros(3, 3), torch.eye(4).expand(2, 4, 4)):
        assert torch.equal(ours.stable_cholesky(matrix), their_kfac.stable_cholesky(matrix))
    factors = {"one": (torch.eye(3) * 4, torch.randn(20, 3)), "two": (torch.randn(20, 3), torch.eye(3))}
    copies = {name: (a.clone(), s.clone()) for name, (a, s) in factors.items()}
    decomposed = ours.cholesky_decompose_small_factors(factors, 10, "cpu", torch.float32)
    assert decomposed is factors
    truth = theirs.cholesky_decompose_small_factors(copies, 10, "cpu", torch.float32)
    for name in truth:
        assert all(torch.equal(mine, other) for mine, other in zip(decomposed[name], truth[name], strict=True))
    small, wide, s2 = torch.randn(3, 3), torch.randn(20, 5), torch.tensor(0.3)
    for pair in ((small, wide), (wide, small)):
        assert torch.allclose(ours.calc_M(*pair, 3, 5, s2), theirs.calc_M(*pair, 3, 5, s2))


def test_bad_calls_say_what_was_expected():
    model = small_llama()
    batch = token_batch(2, 3)
    for change, message in (
        ({"scale": "other"}, "scale: expected one of published, correct"),
        ({"target_module_keywords": ["nothing"]}, r"no nn.Linear of the model contains any of \['nothing'\]"),
        ({"loader": []}, "expected at least one batch"),
        ({"forward_call": lambda m, b: m(**b).logits}, r"expected logits \[N, C\], got \[2, 3, 13\]"),
    ):
        arguments = {"forward_call": forward_call, "loader": [batch], **change}
        with pytest.raises(ValueError, match=message):
            calculate(model, **arguments)
    jacobian, _ = ours.jacobian_mean(model, batch, torch.tensor(CLASSES))
    factors = random_factors(model, 4, 4)
    with pytest.raises(ValueError, match=r"expected a Jacobian \[N, 3, 4, 16\] to match its factors"):
        ours.variance(batch, jacobian, factors, torch.tensor(1.0), 3, 4, 4, "cpu")
    with pytest.raises(ValueError, match="expected at least one layer"):
        ours.variance(batch, jacobian, {}, torch.tensor(1.0), 3, 4, 4, "cpu")
    with pytest.raises(ValueError, match=r"expected matrices \[\.\.\., d, d\]"):
        ours.stable_cholesky(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="no jitter"):
        ours.stable_cholesky(-torch.eye(3), max_tries=3)
    with pytest.raises(ValueError, match="expected factors"):
        ours.calc_M(torch.zeros(3, 3), torch.zeros(9, 2), 4, 2, torch.tensor(1.0))
