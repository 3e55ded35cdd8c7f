"""`curvature="exact"` against the dense posterior of all weights of all modules together."""

from __future__ import annotations

import pytest
import torch
from dense import covariance, flat, ggn, jacobians, output_fisher, relative
from models import Case, bert, gpt2, llama, mlp, t5

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.curvature import exact
from bayesian_lora_kernels.curvature.rows import RowStore

MODELS = {
    "llama": (lambda: llama(targets=("q_proj", "v_proj", "lm_head"), hidden=8, r=2), {"side": "left", "extra": 2}),
    "gpt2": (lambda: gpt2(targets=("c_attn",)), {}),
    "bert": (bert, {"extra": 1}),
    "t5": (t5, {}),
    "mlp": (lambda: mlp(n=6, tokens=3), {}),
    "mlp, more rows than weights": (lambda: mlp(n=30, trainable=("last.weight", "last.bias")), {}),
    "mlp, one score": (lambda: mlp(n=6, classes=1), {}),
}
# Lists of rows longer than the number of weights, shorter, and the usual units of precision.
PRIORS = (0.05, 2.0, 300.0)


def fitted(case: Case, loader=None, **arguments) -> blk.LaplaceLoRA:
    settings = {**case.arguments, "fisher": "exact", "curvature": "exact", **arguments}
    return blk.LaplaceLoRA(case.model, **settings).fit(loader or case.loader(4), progress=False)


class Dense:
    """The truth: Jacobians and Gauss-Newton matrix of all weights, unused rows of a head left out."""

    def __init__(self, case: Case):
        self.logits, jacobian = jacobians(case)
        ids = case.arguments.get("class_token_ids")
        for name in jacobian:
            if "lm_head" in name and "lora_A" not in name:
                jacobian[name] = jacobian[name][:, :, ids]
        self.sizes = {name: j[0, 0].numel() for name, j in jacobian.items()}
        self.jacobian = flat(jacobian)
        likelihood = case.arguments.get("likelihood", "classification")
        self.curvature = ggn(self.jacobian, output_fisher(self.logits, likelihood))

    def precision(self, prior: float | dict[str, float]) -> torch.Tensor:
        each = [
            torch.full((size,), prior if isinstance(prior, float) else prior[name], dtype=torch.float64)
            for name, size in self.sizes.items()
        ]
        return self.curvature + torch.diag(torch.cat(each))


@pytest.mark.parametrize("per_module", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_covariance_is_the_dense_one(model, per_module):
    build, padding = MODELS[model]
    case = build()
    truth = Dense(case)
    laplace = fitted(case, case.loader(4, **padding))
    for base in PRIORS:
        prior = {name: base * (i + 1) for i, name in enumerate(truth.sizes)} if per_module else base
        laplace.prior_precision = prior
        predicted = laplace.predict(case.batch(**padding))
        assert relative(predicted.mean, truth.logits) < 1e-10
        expected = covariance(truth.jacobian, truth.precision(prior))
        assert relative(predicted.covariance, expected) < 1e-9
        if per_module:
            assert len(laplace.posterior.curvature.layer_grams) == len(prior)  # kept sums give the same
            laplace.prior_precision = prior
            assert relative(laplace.predict(case.batch()).covariance, expected) < 1e-9


@pytest.mark.parametrize("per_module", [False, True])
@pytest.mark.parametrize("model", ["llama", "mlp", "mlp, more rows than weights"])
def test_samples_have_the_dense_covariance(model, per_module, monkeypatch):
    """Sampling is linear in its white noise: on the identity as noise it is a square root of the covariance."""
    case = MODELS[model][0]()
    truth = Dense(case)
    laplace = fitted(case)
    total = sum(truth.sizes.values())
    offsets = dict(zip(truth.sizes, torch.tensor([0, *truth.sizes.values()]).cumsum(0).tolist(), strict=False))
    columns = iter(torch.eye(total)[:, o : o + truth.sizes[n]].double() for n, o in offsets.items())
    prior = {name: 0.2 * (1 + i * per_module) for i, name in enumerate(truth.sizes)}
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(columns))
    samples = blk.Posterior(laplace.posterior.curvature, blk.Prior(prior)).sample(total)
    monkeypatch.undo()
    root = torch.cat([samples[name].flatten(1) for name in truth.sizes], dim=1)
    assert relative(root.T @ root, torch.linalg.inv(truth.precision(prior))) < 1e-9


def test_samples_of_the_weights_have_the_dense_covariance():
    case = mlp(n=8, trainable=("twice.weight", "last.weight", "last.bias"))
    truth = Dense(case)
    n = 20_000
    samples = fitted(case, prior_precision=0.5).sample_weights(n, torch.Generator().manual_seed(2))
    model = dict(case.model.named_parameters())
    deviations = {name: (s - model[name]).detach() for name, s in samples.items()}
    last = torch.cat([deviations["last.weight"], deviations["last.bias"][:, :, None]], dim=2)
    root = torch.cat([deviations["twice.weight"].flatten(1), last.flatten(1)], dim=1)
    sigma = torch.linalg.inv(truth.precision(0.5))
    spread = (sigma.square() + sigma.diagonal()[:, None] * sigma.diagonal()).sqrt() / n**0.5
    assert ((root.T @ root / n - sigma) / spread).abs().max() < 6


@pytest.mark.parametrize("columns", [1, 7, 40, 10**6])  # less than a layer, some layers, all of them
def test_slices_change_nothing(columns, monkeypatch):
    widths = {"wide": 24, "one": 8, "other": 12, "same": 8, "again": 8}
    store, n = RowStore(widths, 2**20), 6
    rows = {name: torch.randn(n, width, dtype=torch.float64) for name, width in widths.items()}
    for part in range(0, n, 2):
        store.append({name: matrix[part : part + 2] for name, matrix in rows.items()})
    monkeypatch.setattr(exact, "CPU_SLICE_BYTES", 8 * n * columns)
    shapes = {name: (width // 4, 4) for name, width in widths.items()}
    curvature = exact.FunctionSpaceCurvature(store, shapes, torch.device("cpu"))
    assert relative(curvature.gram, sum(matrix @ matrix.T for matrix in rows.values())) < 1e-14
    for name, gram in zip(store.names, curvature.layer_grams, strict=True):
        assert relative(gram, rows[name] @ rows[name].T) < 1e-14
    prior = blk.Prior({name: 1.0 + i for i, name in enumerate(widths)})
    del curvature.layer_grams
    before = curvature.prepare(prior)
    assert len(curvature.layer_grams) == len(widths)
    assert relative(before.values, curvature.prepare(prior).values) < 1e-12
    root = torch.cat([rows[name] / float(prior[name]) ** 0.5 for name in widths], dim=1)
    assert relative(before.values, torch.linalg.eigvalsh(root @ root.T)) < 1e-12


@pytest.mark.parametrize("model", ["llama", "mlp"])
def test_rows_in_files_change_nothing(model):
    case = MODELS[model][0]()
    loader = case.loader(3)
    held = fitted(case, loader)
    rows = held.posterior.curvature.store
    half = sum(rows.rows(name).numel() * 8 for name in rows.names) // 2
    for budget in (half, 1):  # half-way through the data, and from the first row on
        spilled = fitted(case, loader, memory_budget=budget)
        assert spilled.posterior.curvature.store.place == "file"
        for prior in PRIORS:
            one, other = held.log_marginal_likelihood(prior), spilled.log_marginal_likelihood(prior)
            assert float(one) == pytest.approx(float(other), rel=1e-12)
        assert relative(spilled.predict(case.batch()).covariance, held.predict(case.batch()).covariance) < 1e-10
        seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
        drawn = [laplace.sample_weights(2, g) for laplace, g in zip((held, spilled), seeds, strict=True)]
        for name in drawn[0]:
            assert relative(drawn[1][name], drawn[0][name]) < 1e-10


@pytest.mark.parametrize("budget", [1000, 100, 1])  # in memory, in a file half-way, in a file at once
def test_rows_can_be_read_between_additions(budget):
    store, whole = RowStore({"one": 5, "two": 3}, budget), torch.randn(8, 5)
    for i in range(0, 8, 2):
        store.append({"one": whole[i : i + 2], "two": 2 * whole[i : i + 2, :3]})
        assert torch.equal(store.rows("one"), whole[: i + 2])
        assert torch.equal(store.rows("two", slice(1, 3)), 2 * whole[: i + 2, 1:3])


def test_the_folder_of_the_rows_disappears_with_them():
    case = mlp(n=6)
    laplace = fitted(case, memory_budget=1)
    store = laplace.posterior.curvature.store
    folder = store._path().parent
    assert store._path().stat().st_size == 8 * store.n_rows * store.n_columns
    del store, laplace
    import gc

    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize("model", ["llama", "bert", "mlp"])
def test_rows_in_bf16(model):
    """Each stored number is off by up to 2^-9 of itself; the posterior moves by no more than the data allow."""
    case = MODELS[model][0]()
    wide, narrow = fitted(case), fitted(case, row_dtype=torch.bfloat16)
    store = narrow.posterior.curvature.store
    assert store.rows(store.names[0]).dtype == torch.bfloat16
    # where the prior outweighs the data the deviation is below 1e-4; elsewhere it is of the order of the rounding
    largest = float(wide.posterior.curvature.eigenvalues.max())
    for prior, tolerance in ((100 * largest, 1e-4), (largest, 5e-3), (1e-2 * largest, 5e-2)):
        wide.prior_precision = narrow.prior_precision = prior
        covariances = [laplace.predict(case.batch()).covariance for laplace in (wide, narrow)]
        assert relative(covariances[1], covariances[0]) < tolerance, prior
        one, other = (float(laplace.log_marginal_likelihood()) for laplace in (wide, narrow))
        assert other == pytest.approx(one, rel=tolerance), prior


def test_rows_in_float32_of_a_float64_model():
    case = MODELS["llama"][0]()
    wide, narrow = fitted(case), fitted(case, row_dtype=torch.float32)
    assert relative(narrow.predict(case.batch()).covariance, wide.predict(case.batch()).covariance) < 1e-5


def test_float32_model():
    case, wide = llama(dtype=torch.float32), llama()
    wide.model.load_state_dict(case.model.state_dict())
    laplace = fitted(case, prior_precision=20.0)
    truth = Dense(wide)
    predicted = laplace.predict(case.batch())
    assert predicted.covariance.dtype == torch.float32
    assert relative(predicted.covariance, covariance(truth.jacobian, truth.precision(20.0))) < 1e-5


def test_a_layerwise_posterior_is_not_offered():
    laplace = fitted(mlp(n=4))
    with pytest.raises(RuntimeError, match="no Gaussian for each module"):
        list(laplace.posterior)
    with pytest.raises(RuntimeError, match="no Kronecker factors"):
        _ = laplace.factors
