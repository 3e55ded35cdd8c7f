"""Situations that a model can be in, and the truth about them by plain autograd, one example at a time.

The rule for every situation: our numbers are the truth's, or a ValueError, TypeError or NotImplementedError says what
to do. Nothing here uses the package's own mathematics. Only `laplace.posterior[name].to_dense()`, the precision itself,
is taken from it, and EKFAC, exact and the factors check that precision in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import peft
import torch
from dense import output_fisher, relative
from torch import Tensor, nn

import bayesian_lora_kernels as blk

# A tiny Llama, and three of its tokens.
IDS = [11, 12, 13]
LLAMA = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    initializer_range=0.3,
    pad_token_id=0,
)
REFUSALS = (ValueError, TypeError, NotImplementedError)
TOLERANCE = 1e-6
CURVATURES = ("kfac", "ekfac", "exact")
# Columns that shrink with an example's padding; anything else keeps its shape, however long it happens to be.
TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


def without_labels(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in ("labels", "label")}
    return (batch[0], None)


def rows_of_batch(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else [batch[0]]
    return next(len(v) for v in values if isinstance(v, Tensor) and v.ndim)


def padded_row(batch: Any, i: int) -> Any:
    """Example i alone, with all the padding that its batch gave it."""
    if not isinstance(batch, Mapping):
        return (batch[0][i : i + 1], None)
    n = rows_of_batch(batch)
    cut = {k: v[i : i + 1] if isinstance(v, Tensor) and v.ndim and len(v) == n else v for k, v in batch.items()}
    return without_labels(cut)


def unpadded_row(batch: Any, i: int) -> Any:
    """Example i alone, without the positions that the batch's mask excludes."""
    row = padded_row(batch, i)
    mask = row.get("attention_mask") if isinstance(row, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return row
    valid = mask[0].bool()
    return {k: v[:, valid] if k in TOKEN_COLUMNS and v.shape[1] == len(valid) else v for k, v in row.items()}


def run_plain(model: nn.Module, batch: Any) -> Tensor:
    """What the user's own call gives."""
    output = model(**batch) if isinstance(batch, Mapping) else model(batch[0])
    return output if isinstance(output, Tensor) else output.logits


def run_last(ids: Sequence[int] | None) -> Callable[[nn.Module, Any], Tensor]:
    """The last position of a causal LM; the example comes unpadded."""

    def run(model: nn.Module, batch: Any) -> Tensor:
        logits = run_plain(model, batch)[:, -1]
        return logits if ids is None else logits[:, list(ids)]

    return run


@dataclass
class Scene:
    """A model, its data, and how one example runs by itself.

    Attributes:
        model: what LaplaceLoRA gets.
        batches: with labels.
        run: `(model, one example) -> [1, C]`.
        single: `(batch, i) -> one example`.
        arguments: of LaplaceLoRA.
        plain: a module with the same parameters for the truth, where `model` itself should not run it.
        words: one of them stands in a refusal; none: it must be served.
        served: False if no number would be right, so that it must be refused.
        factors: whether the K-FAC factors are defined by the layers' own calls.
        around: a context for the package's calls.
    """

    model: nn.Module
    batches: list[Any]
    run: Callable[[nn.Module, Any], Tensor] = run_plain
    single: Callable[[Any, int], Any] = unpadded_row
    arguments: dict[str, Any] = field(default_factory=dict)
    plain: nn.Module | None = None
    words: tuple[str, ...] = ()
    served: bool = True
    factors: bool = True
    tolerance: float = TOLERANCE
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def likelihood(self) -> str:
        return self.arguments.get("likelihood", "classification")


# The truth


def layer_parameters(model: nn.Module, name: str) -> list[Tensor]:
    return [p for p in model.get_submodule(name).parameters(recurse=False) if p.requires_grad]


def trainable_layers(model: nn.Module) -> list[str]:
    """Names of the modules that own a trainable weight or bias, each module once."""
    names = [name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad]
    return list(dict.fromkeys(names))


def jacobian(model: nn.Module, names: Iterable[str], logits: Tensor) -> dict[str, Tensor]:
    """`{module: [C, d_out, d_in]}` of `logits: [C]`, a bias as the last column, by plain autograd."""
    names = list(names)
    groups = {name: layer_parameters(model, name) for name in names}
    flat = [p for name in names for p in groups[name]]
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for one in logits:
        grads = iter(torch.autograd.grad(one, flat, retain_graph=True, allow_unused=True))
        for name in names:
            parts = [
                (torch.zeros_like(p) if g is None else g).reshape(len(p), -1).double()
                for p, g in zip(groups[name], (next(grads) for _ in groups[name]), strict=True)
            ]
            rows[name].append(torch.cat(parts, dim=1))
    return {name: torch.stack(parts) for name, parts in rows.items()}


@dataclass
class Example:
    """One example run alone: logits `[C]`, Jacobians, and every layer's inputs and output gradients."""

    logits: Tensor
    jacobian: dict[str, Tensor]
    a: dict[str, Tensor]  # [T, d_in]
    g: dict[str, Tensor]  # [C, T, d_out]


def record(model: nn.Module, names: Sequence[str], modules: Mapping[str, nn.Module], run: Callable[[], Tensor]) -> Any:
    """Logits, inputs and output gradients by plain hooks: `(logits [C], {name: a}, {name: g})`."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def keep(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        calls[name].append(((args[0] if args else kwargs["input"]).detach().clone(), output))
        return output.clone()  # what comes next may work in place

    handles = [
        modules[name].register_forward_hook(
            lambda _m, args, kwargs, y, name=name: keep(name, args, kwargs, y), with_kwargs=True, prepend=True
        )
        for name in names
    ]
    try:
        logits = run()
    finally:
        for handle in handles:
            handle.remove()
    flat = logits.reshape(-1)
    inputs, gradients = {}, {}
    for name in names:
        bias, weight = modules[name].bias, modules[name].weight
        outputs = [y for _, y in calls[name] if y.requires_grad]
        found: dict[int, list[Tensor | None]] = {id(y): [] for y in outputs}
        for one in flat if outputs else ():
            grads = torch.autograd.grad(one, outputs, retain_graph=True, allow_unused=True)
            for y, g in zip(outputs, grads, strict=True):
                found[id(y)].append(g)
        # Of several calls those count that a logit depends on: DoRA's of an identity matrix do not.
        used = [(x, y) for x, y in calls[name] if any(g is not None for g in found.get(id(y), []))] or calls[name]
        a = [x.reshape(-1, x.shape[-1]).double() for x, _ in used] or [torch.zeros(0, weight.shape[1]).double()]
        tokens = torch.cat(a)
        columns = [tokens] if weight.requires_grad else []
        columns += [torch.ones_like(tokens[:, :1])] if bias is not None and bias.requires_grad else []
        inputs[name] = torch.cat(columns, dim=1)
        rows = []
        for i in range(len(flat)):
            parts = []
            for _, y in used:
                g = found[id(y)][i] if id(y) in found else None
                parts.append((torch.zeros_like(y) if g is None else g).reshape(-1, y.shape[-1]).double())
            rows.append(torch.cat(parts) if parts else torch.zeros(0, weight.shape[0]).double())
        gradients[name] = torch.stack(rows)
    return logits, inputs, gradients


def truth(scene: Scene, names: Sequence[str] | None = None) -> list[list[Example]]:
    """Every example of every batch alone."""
    model = scene.model if scene.plain is None else scene.plain
    names = trainable_layers(scene.model) if names is None else list(names)
    modules = {name: scene.model.get_submodule(name) for name in names}
    result = []
    for batch in scene.batches:
        rows = []
        for i in range(rows_of_batch(batch)):
            row = scene.single(batch, i)
            with torch.enable_grad():
                if scene.factors:
                    logits, a, g = record(model, names, modules, lambda row=row: scene.run(model, row)[0])
                else:
                    logits, a, g = scene.run(model, row)[0], {}, {}
                rows.append(Example(logits.detach(), jacobian(scene.model, names, logits), a, g))
        result.append(rows)
    return result


def dense_covariance(
    posterior: Mapping[str, Any], jacobians: Sequence[Mapping[str, Tensor]], rows: Sequence[int] | None = None
) -> Tensor:
    """`J Sigma J^T`, `[N, C, C]`, with Sigma the inverse of the posterior's dense precision."""
    total: Any = 0
    for name, gaussian in posterior.items():
        precision = gaussian.to_dense().double()
        j = torch.stack([one[name] for one in jacobians])
        if j[0, 0].numel() != len(precision):  # an output head of which only the classes' rows are measured
            assert rows is not None, f"{name}: a precision of {len(precision)} weights, it has {j[0, 0].numel()}"
            j = j[:, :, list(rows)]
        flat = j.flatten(2)
        total = total + flat @ torch.linalg.solve(precision, flat.mT)
    return total


def exact_covariance(
    train: Sequence[Example], test: Sequence[Example], prior: float = 1.0, likelihood: str = "classification"
) -> Tensor:
    """The same under the full Gauss-Newton matrix of the training examples."""
    stacked = [torch.cat([j.flatten(1) for j in x.jacobian.values()], dim=1) for x in train]
    fisher = [output_fisher(x.logits.double(), likelihood) for x in train]
    wanted = torch.stack([torch.cat([j.flatten(1) for j in x.jacobian.values()], dim=1) for x in test])
    precision = prior * torch.eye(wanted.shape[-1], dtype=torch.float64)
    for j, h in zip(stacked, fisher, strict=True):
        precision = precision + j.T @ h @ j
    return wanted @ torch.linalg.solve(precision, wanted.mT)


def ggn_traces(train: Sequence[Example], likelihood: str = "classification") -> dict[str, float]:
    """`{module: trace of its block of the Gauss-Newton matrix}`, which EKFAC keeps exactly."""
    totals: dict[str, float] = {}
    for x in train:
        fisher = output_fisher(x.logits.double(), likelihood)
        for name, j in x.jacobian.items():
            flat = j.flatten(1)
            totals[name] = totals.get(name, 0.0) + float((fisher * (flat @ flat.T)).sum())
    return totals


def posterior_traces(laplace: blk.LaplaceLoRA) -> dict[str, float]:
    """`{module: trace of its curvature}`: of the precision, less the prior's."""
    result = {}
    for name, gaussian in laplace.posterior.items():
        dense = gaussian.to_dense().double()
        prior = laplace.prior_precision
        result[name] = float(dense.trace()) - len(dense) * float(prior[name] if isinstance(prior, dict) else prior)
    return result


def kfac_truth(train: Sequence[Example], likelihood: str = "classification") -> dict[str, tuple[Tensor | None, Tensor]]:
    """`{module: (A, S)}`: the mean over all tokens of `a a^T`, the sum of `g g^T` under the exact Fisher."""
    result = {}
    for name in train[0].a:
        a = torch.cat([x.a[name] for x in train])
        s = torch.zeros(train[0].g[name].shape[-1], train[0].g[name].shape[-1], dtype=torch.float64)
        for x in train:
            s = s + torch.einsum("cti,cd,dtj->ij", x.g[name], output_fisher(x.logits.double(), likelihood), x.g[name])
        result[name] = (a.T @ a / len(a) if len(a) else None, s)
    return result


# Ours


def fit(scene: Scene, **arguments: Any) -> blk.LaplaceLoRA:
    settings = {"fisher": "exact", "rank": None, **scene.arguments, **arguments}
    return blk.LaplaceLoRA(scene.model, **settings).fit(scene.batches, progress=False)


@dataclass
class Ours:
    laplace: blk.LaplaceLoRA
    predictions: list[Any]


def ours(scene: Scene, curvature: str) -> Ours:
    """All that the package says of a scene."""
    with scene.around():
        laplace = fit(scene, curvature=curvature)
        return Ours(laplace, [laplace.predict(without_labels(batch)) for batch in scene.batches])


def deviations(
    scene: Scene, found: Ours, curvature: str, examples: Sequence[Sequence[Example]] | None = None
) -> dict[str, float]:
    """What is off, and by how much: means, covariances, and the fit itself. `examples`: the truth, if it is there."""
    laplace = found.laplace
    if examples is None:
        names = list(laplace.posterior) if curvature != "exact" else scene.arguments.get("modules")
        examples = truth(scene, names)
    train = [x for batch in examples for x in batch]
    rows = scene.arguments.get("class_token_ids")
    off = {}
    for b, (pred, batch) in enumerate(zip(found.predictions, examples, strict=True)):
        off[f"mean of batch {b}"] = relative(pred.mean, torch.stack([x.logits for x in batch]))
        if curvature == "exact":
            expected = exact_covariance(train, batch, likelihood=scene.likelihood)
        else:
            expected = dense_covariance(laplace.posterior, [x.jacobian for x in batch], rows)
        off[f"covariance of batch {b}"] = relative(pred.covariance, expected)
    if curvature == "ekfac":
        traces, whole = ggn_traces(train, scene.likelihood), posterior_traces(laplace)
        scale = sum(traces.values())
        off |= {f"trace of {name}": abs(whole[name] - traces[name]) / scale for name in traces}
    if curvature == "kfac" and scene.factors:
        for name, (a, s) in kfac_truth(train, scene.likelihood).items():
            if a is not None:
                off[f"A of {name}"] = relative(laplace.factors[name].a, a)
            if laplace.factors[name].s.shape == s.shape and float(s.abs().max()) > 0:
                off[f"S of {name}"] = relative(laplace.factors[name].s, s)
    return off


def attempt(run: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What `run` gives, or the refusal that it raises; anything else that it raises gets out."""
    try:
        return run(), None
    except REFUSALS as refusal:
        return None, refusal


def judge(
    run: Callable[[], Any],
    words: Sequence[str] = (),
    compare: Callable[[Any], Any] = lambda found: found,
    tolerance: float = TOLERANCE,
    served: bool = True,
) -> str:
    """`run` calls the package, `compare` gives relative errors; asserts right, or refused with one of the words.

    Returns:
        "right" or "refused".
    """
    found, refusal = attempt(run)
    if refusal is not None:
        text = f"{type(refusal).__name__}: {refusal}"
        assert words, f"refused what must be served: {text}"
        assert any(word.lower() in str(refusal).lower() for word in words), f"unclear, none of {words} in {text}"
        return "refused"
    assert served, "served what has no right answer: expected a refusal"
    off = compare(found)
    off = dict(off) if isinstance(off, Mapping) else {"result": float(off)}
    wrong = {what: f"{error:.1e}" for what, error in off.items() if not error <= tolerance}
    assert off, "nothing was compared"
    assert not wrong, f"silently wrong: {wrong}"
    return "right"


def judge_scene(scene: Scene, curvature: str) -> str:
    scene.model.eval()
    if scene.plain is not None:
        scene.plain.eval()
    return judge(
        lambda: ours(scene, curvature),
        scene.words,
        lambda found: deviations(scene, found, curvature),
        scene.tolerance,
        scene.served,
    )


# Models and data


def adapted(
    model: nn.Module, targets: Sequence[str] | str, scale: float = 0.3, double: bool = True, **config: Any
) -> Any:
    """LoRA of which no part is zero, in float64, in eval mode."""
    targets = targets if isinstance(targets, str) else list(targets)
    mixed = {"mixed": config.pop("mixed")} if "mixed" in config else {}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **config), **mixed)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or ("modules_to_save" in name and name.endswith("bias")):
                p.copy_(scale * torch.randn(p.shape, generator=noise))
    return (model.double() if double else model).eval()


def padded(
    lengths: Sequence[int], vocabulary: int, pad: int = 0, side: str = "right", extra: int = 0, seed: int = 2
) -> dict[str, Tensor]:
    """Random ids (3 and more) and their mask; the ids do not depend on side and extra."""
    noise = torch.Generator().manual_seed(seed)
    width = max(lengths) + extra
    ids = torch.full((len(lengths), width), pad)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        where = slice(0, n) if side == "right" else slice(width - n, width)
        ids[row, where], mask[row, where] = torch.randint(3, vocabulary, (n,), generator=noise), 1
    return {"input_ids": ids, "attention_mask": mask}


def labelled(batch: Mapping[str, Any], classes: int = 3) -> dict[str, Any]:
    n = rows_of_batch(batch)
    return {**batch, "labels": torch.arange(n) % classes}


def floats(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(*shapes: Sequence[int], classes: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Batches `(x, labels)` of the given shapes."""
    return [(floats(*s, seed=3 + i), torch.arange(s[0]) % classes) for i, s in enumerate(shapes)]


def plain_module(build: Callable[[], nn.Module]) -> nn.Module:
    """A small module with seeded weights in float64; a trainable bias is not zero."""
    torch.manual_seed(0)
    return build().double().eval()


def output(logits: Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits=logits)
