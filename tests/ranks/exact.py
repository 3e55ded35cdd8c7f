"""The exact curvature of several processes against that of one, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dense import relative
from models import llama, mlp

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.curvature import exact, rows
from bayesian_lora_kernels.curvature.rows import RowStore
from bayesian_lora_kernels.processes import Processes

from .checks import EXACTLY, both, everyone, own_loader, share


def spread(group: Any, kind: str, model: str = "mlp", **settings: Any) -> Any:
    """A case, the fit of one process, and that of all of them."""
    case = mlp(n=9, tokens=3) if model == "mlp" else llama((5, 3, 6, 4, 7, 2, 5), targets=("q_proj", "v_proj"))
    return case, *both(case, own_loader(case, group, kind), group, curvature="exact", **settings)


def check_gram(group: Any, kind: str, model: str = "mlp", **settings: Any) -> None:
    """What is measured is the same but for the order of rows, and of it every process holds its part only."""
    case, single, shared = spread(group, kind, model, **settings)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    one, other = single.posterior.curvature, shared.posterior.curvature
    n, p = one.store.n_rows, one.store.n_columns
    assert shared.n_examples == single.n_examples == len(case.examples)
    assert shared.log_likelihood == pytest.approx(single.log_likelihood, rel=EXACTLY)
    assert (other.store.n_rows, other.store.n_columns, other.store.names) == (n, p, one.store.names)
    held = sum(block.shape[1] * len(block) for block in other.store._all_blocks())
    assert held == n * (p * (rank + 1) // size - p * rank // size)
    assert sum(everyone(held, group)) == n * p
    assert relative(other.eigenvalues, one.eigenvalues) < EXACTLY
    order = _order(other.gram.diagonal(), one.gram.diagonal())
    assert relative(other.gram[order][:, order], one.gram) < EXACTLY
    for name in one.store.names:
        found, truth = other.store.rows(name)[order], one.store.rows(name)
        assert relative(found @ found.T, truth @ truth.T) < EXACTLY
    for tensor in (other.gram, other.eigenvalues, other.eigenvectors):
        assert len(set(everyone(tensor.numpy().tobytes(), group))) == 1


def _order(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """By which numbers that are alike, if no two of the truth are, come to lie at the same places."""
    order = torch.empty(len(found), dtype=torch.long)
    order[truth.argsort()] = found.argsort()
    return order


def check_posteriors(group: Any, kind: str, model: str = "mlp") -> None:
    """Evidence with its gradient, predictions and samples' covariance, under one precision and under one for each."""
    case, single, shared = spread(group, kind, model)
    names = list(single.posterior.curvature.shapes)
    each = torch.arange(1.0, len(names) + 1, dtype=torch.float64)
    for prior in (0.3, dict(zip(names, each.tolist(), strict=True))):
        precisions, evidence = [], []
        for laplace in (single, shared):
            given = torch.ones(len(names), dtype=torch.float64).mul(0.3) if isinstance(prior, float) else each.clone()
            precisions.append(given.requires_grad_())
            by_name = given[0] if isinstance(prior, float) else dict(zip(names, given.unbind(), strict=True))
            evidence.append(laplace.log_marginal_likelihood(by_name))
            evidence[-1].backward()
            laplace.prior_precision = prior
        assert float(evidence[1].detach()) == pytest.approx(float(evidence[0].detach()), rel=EXACTLY)
        assert relative(precisions[1].grad, precisions[0].grad) < EXACTLY
        check_predictions(group, kind, case, single, shared)
    shared.optimize_prior_precision(per_module=True)
    assert len(set(everyone(repr(shared.prior), group))) == 1


def check_predictions(group: Any, kind: str, case: Any, single: Any, shared: Any) -> None:
    """As many examples and logits as each process likes, in pieces or not; or none."""
    rank = dist.get_rank(group)
    own = share(len(case.examples), group, kind)
    for outputs in (None, 2):
        found = shared.predict(case.batch(own) if own else None, outputs=outputs, gather=group)
        order = [i for part in everyone(own, group) for i in part]
        assert relative(found.covariance, single.predict(case.batch(), outputs=outputs).covariance[order]) < EXACTLY
    alone = case.batch([rank % len(case.examples)])
    outputs = None if rank == 0 else 2  # processes want different logits
    assert relative(shared.predict(alone, outputs).covariance, single.predict(alone, outputs).covariance) < EXACTLY
    shared._predictor = lambda fit: _Cut(type(shared)._predictor(shared, fit), 1 + rank)
    assert relative(shared.predict(case.batch()).covariance, single.predict(case.batch()).covariance) < EXACTLY
    del shared._predictor


class _Cut:
    """A predictor that takes so many examples at a time."""

    def __init__(self, predictor: Any, step: int):
        predictor.examples_at_once = lambda *_: step
        self.predict = predictor.predict


def check_samples(group: Any, kind: str) -> None:
    """The same on all processes, whatever each would draw by itself, and of the right covariance."""
    _, single, shared = spread(group, kind)
    prior = blk.Prior({name: 0.5 + i for i, name in enumerate(single.posterior.curvature.shapes)})
    posterior, n = blk.Posterior(shared.posterior.curvature, prior), 4000
    generator = torch.Generator().manual_seed(7 + dist.get_rank(group))
    samples = posterior.sample(n, generator)
    bits = everyone([sample.numpy().tobytes() for sample in samples.values()], group)
    assert all(other == bits[0] for other in bits)
    flat = torch.cat([sample.flatten(1) for sample in samples.values()], dim=1)
    truth = _covariance(single, prior)
    errors = (truth.square() + truth.diagonal()[:, None] * truth.diagonal()).sqrt() / n**0.5
    assert ((flat.T @ flat / n - truth) / errors).abs().max() < 6
    assert not torch.equal(next(iter(posterior.sample(n, generator).values())), next(iter(samples.values())))


def _covariance(single: Any, prior: blk.Prior) -> torch.Tensor:
    """Of the weights, from the rows of one process."""
    curvature = single.posterior.curvature
    jacobian = torch.cat([curvature.store.rows(name) for name in curvature.shapes], dim=1)
    widths = [prior[name].expand(p) for name, p in curvature.n_parameters.items()]
    return torch.linalg.inv(jacobian.T @ jacobian + torch.diag(torch.cat(widths)))


def check_files(group: Any, folder: Path) -> None:
    """Saved by all, and loaded by one; of rows that lie in files, in bfloat16."""
    case, single, shared = spread(group, "empty", memory_budget=1, row_dtype=torch.bfloat16)
    assert shared.posterior.curvature.store.place == "file"
    shared.save_pretrained(folder)
    assert [path.suffix for path in sorted(folder.iterdir())] == [".safetensors", ".json"]
    again = blk.LaplaceLoRA.from_pretrained(case.model, folder)
    assert again.posterior.curvature.store.read(slice(0, 1)).dtype == torch.bfloat16
    for other in (shared, again):
        assert relative(other.predict(case.batch()).covariance, single.predict(case.batch()).covariance) < EXACTLY


def check_slices(group: Any) -> None:
    """Rounds of few rows and slices of few columns, that begin and end within layers."""
    before = exact.CPU_SLICE_BYTES, rows.EXCHANGED_BYTES
    try:
        exact.CPU_SLICE_BYTES, rows.EXCHANGED_BYTES = 8 * 27 * 7, 2000
        check_gram(group, "uneven")
        check_posteriors(group, "uneven")
    finally:
        exact.CPU_SLICE_BYTES, rows.EXCHANGED_BYTES = before


def check_wrong_use(group: Any) -> None:
    """Processes that ask for different things are told so, and fewer columns than processes are refused."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    case, _, shared = spread(group, "turns")
    if size > 1:
        with pytest.raises(RuntimeError, match="must ask for it at once; they ask for covariance and sample"):
            shared.predict(case.batch()) if rank == 0 else shared.sample_weights(2)
        with pytest.raises(ValueError, match="sample: expected as many samples on all processes"):
            shared.posterior.sample(2 + rank)
        with pytest.raises(ValueError, match=f"expected a column for each of {size} processes, got 1"):
            RowStore({"one": 1}, 10**6).spread(Processes(group), torch.device("cpu"))


def check_failure(group: Any) -> None:
    """What one process raises in a prediction, all of them raise; and go on."""
    rank = dist.get_rank(group)
    case, single, shared = spread(group, "turns")
    batch = case.batch()
    if rank == 0:
        batch = (batch[0] * float("nan"), batch[1])
    error = "the logits are not finite" if rank == 0 else "rank 0 of the group failed: ValueError: .*not finite"
    with pytest.raises(ValueError if rank == 0 else RuntimeError, match=error):
        shared.predict(batch)
    assert relative(shared.predict(case.batch()).covariance, single.predict(case.batch()).covariance) < EXACTLY
