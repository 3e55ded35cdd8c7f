"""The truth, dense and in float64: nothing here uses the package's own mathematics.

Examples run one at a time and without padding. Weights are flattened row-major, a bias is a last input column, so that
the curvature `A (x) S` of a weight `[d_out, d_in]` is `kron(S, A)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from models import Case
from torch import Tensor, nn


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation over the largest expected entry."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} is not {list(expected.shape)}"
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def by_module(parameters: Mapping[str, Tensor], lead: int = 0) -> dict[str, Tensor]:
    """`{parameter name: [lead..., *shape]}` as `{module name: [lead..., d_out, d_in]}`, biases appended."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, value in parameters.items():
        module, _, leaf = name.rpartition(".")
        grouped.setdefault(module, {})[leaf] = value
    result = {}
    for module, parts in grouped.items():
        columns = [parts["weight"]] if "weight" in parts else []
        columns += [parts["bias"].unsqueeze(-1)] if "bias" in parts else []
        result[module] = torch.cat(columns, dim=-1)
        assert result[module].ndim == 2 + lead
    return result


def jacobians(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits `[N, C]` and `{module: [N, C, d_out, d_in]}`, by autograd, one example at a time."""
    model = case.evaluated()
    parameters = trainable(model)
    logits, rows = [], []
    for example in case.examples:
        f = case.logits(model, example)
        logits.append(f.detach())
        rows.append(rows_of(f, list(parameters.values())))
    stacked = {name: torch.stack(parts) for name, *parts in zip(parameters, *rows, strict=True)}
    return torch.stack(logits), by_module(stacked, lead=2)


def rows_of(f: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Jacobians `[C, *shape]` of `f: [C]`."""
    eye = torch.eye(len(f), dtype=f.dtype)
    grads = torch.autograd.grad(f, inputs, eye, is_grads_batched=True, retain_graph=True, allow_unused=True)
    return [x.new_zeros(len(f), *x.shape) if g is None else g for x, g in zip(inputs, grads, strict=True)]


def flat(jacobian: Mapping[str, Tensor], names: Sequence[str] | None = None) -> Tensor:
    """`[N, C, P]`, modules side by side."""
    return torch.cat([jacobian[name].flatten(2) for name in names or jacobian], dim=2)


def softmax_fisher(logits: Tensor) -> Tensor:
    """`diag(p) - p p^T`, `[..., C, C]`."""
    p = logits.softmax(dim=-1)
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


def output_fisher(logits: Tensor, likelihood: str = "classification") -> Tensor:
    if likelihood == "classification":
        return softmax_fisher(logits)
    return torch.eye(logits.shape[-1], dtype=logits.dtype).expand(*logits.shape, -1)


def ggn(jacobian: Tensor, fisher: Tensor) -> Tensor:
    """`sum_n J_n^T H_n J_n`, `[P, P]`, from `[N, C, P]` and `[N, C, C]`."""
    return torch.einsum("ncp,ncd,ndq->pq", jacobian, fisher, jacobian)


def block_ggn(jacobian: Mapping[str, Tensor], fisher: Tensor) -> dict[str, Tensor]:
    return {name: ggn(j.flatten(2), fisher) for name, j in jacobian.items()}


def covariance(jacobian: Tensor, precision: Tensor) -> Tensor:
    """`J_n precision^-1 J_n^T`, `[N, C, C]`."""
    return jacobian @ torch.linalg.solve(precision, jacobian.flatten(0, 1).mT).T.unflatten(
        0, jacobian.shape[:2]
    ).transpose(1, 2)


def evidence(log_likelihood: float, theta: Tensor, curvature: Tensor, prior: Tensor) -> Tensor:
    """Laplace's log marginal likelihood; `prior: [P]` is the precision of every weight."""
    logdet = torch.linalg.slogdet(curvature + torch.diag(prior))[1]
    return log_likelihood - 0.5 * (prior * theta.square()).sum() + 0.5 * prior.log().sum() - 0.5 * logdet


def dense_factor(factor: Tensor, tail: Tensor) -> Tensor:
    """`[d, d]`: a full factor as it is; `B B^T` and the tail on everything that B does not span."""
    factor = factor.double()
    d = factor.shape[0]
    if factor.shape[1] == d:
        return factor
    basis = torch.linalg.svd(factor, full_matrices=False)
    spanned = basis.U[:, (basis.S / basis.S.max()) > 1e-7]
    return factor @ factor.T + float(tail) * (torch.eye(d, dtype=torch.float64) - spanned @ spanned.T)


class Tokens:
    """One example's inputs and output gradients at every module, by plain hooks: `a [T, d_in]`, `g [C, T, d_out]`."""

    def __init__(self, model: nn.Module, names: Sequence[str], run: Callable[[], Tensor]):
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
        modules, handles = dict(model.named_modules()), []

        def keep(name: str, a: Tensor, output: Tensor) -> Tensor:
            calls[name].append((a.detach().clone(), output))
            return output.clone()  # what comes next may work in place

        for name in names:
            handles.append(modules[name].register_forward_hook(lambda _m, args, y, name=name: keep(name, args[0], y)))
        self.logits = run()
        for handle in handles:
            handle.remove()
        bias = {n: modules[n].bias is not None and modules[n].bias.requires_grad for n in names}
        self.a, self.g = {}, {}
        for name in names:
            a = torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in calls[name]])
            self.a[name] = torch.cat([a, torch.ones_like(a[:, :1])], dim=1) if bias[name] else a
        outputs = [(name, y) for name in names for _, y in calls[name]]
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        grads = rows_of(self.logits.reshape(-1), [y for _, y in outputs])
        for (name, y), grad in zip(outputs, grads, strict=True):
            parts[name].append(grad.reshape(len(grad), -1, y.shape[-1]))
        self.g = {name: torch.cat(g, dim=1) for name, g in parts.items()}

    def pulled_back(self, name: str, cotangent: Tensor) -> Tensor:
        """`g [T, d_out]` for a cotangent of the shape of the logits."""
        return torch.einsum("c,ctd->td", cotangent.detach().reshape(-1), self.g[name])


def record(case: Case, names: Sequence[str]) -> list[Tokens]:
    model = case.evaluated()
    return [Tokens(model, names, lambda x=x: case.logits(model, x)) for x in case.examples]


def fisher_columns(logits: Tensor) -> Tensor:
    """The C columns of `diag(sqrt p) - p sqrt(p)^T`, as rows `[C, C]`."""
    p = logits.softmax(dim=-1)
    return (torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())).T


def kfac_factors(
    examples: Sequence[Tokens], names: Sequence[str], tokens: str, columns: Callable[[Tokens], Sequence[Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """`{module: (A, S)}`, docs/method.md's table in naive loops."""
    result = {}
    for name in names:
        inputs: list[Tensor] = []
        d_out = examples[0].g[name].shape[-1]
        s = torch.zeros(d_out, d_out, dtype=torch.float64)
        for example in examples:
            a = example.a[name]
            kept = {"expand": list(a), "reduce": [a.mean(dim=0)], "last": [a[-1]]}[tokens]
            inputs += kept
            for column in columns(example):
                g = example.pulled_back(name, column)
                for row in {"expand": list(g), "reduce": [g.sum(dim=0)], "last": [g[-1]]}[tokens]:
                    s += torch.outer(row, row)
        result[name] = (sum(torch.outer(x, x) for x in inputs) / len(inputs), s)
    return result
