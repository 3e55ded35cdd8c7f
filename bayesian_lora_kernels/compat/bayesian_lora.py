"""The functions of bayesian_lora 0.0.6: `import bayesian_lora_kernels.compat.bayesian_lora as bayesian_lora`.

Signatures, tensor layouts and dictionary keys are that package's. What differs in numbers, and why, is in
`docs/migrating.md`; every function that could differ says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.compat.lazy_jacobian import LazyJacobian
from bayesian_lora_kernels.compat.untouched import BoxedForward, boxed
from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.curvature.factors import KroneckerSums
from bayesian_lora_kernels.curvature.likelihood import Classification
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.forward import Forward, model_device
from bayesian_lora_kernels.model.layers import LinearLayer, find_layers, linear_layer
from bayesian_lora_kernels.model.masks import last_valid
from bayesian_lora_kernels.model.measuring import measuring
from bayesian_lora_kernels.model.pieces import capture
from bayesian_lora_kernels.model.reading import MASK_KEYS
from bayesian_lora_kernels.ops.checks import accumulate_dtype
from bayesian_lora_kernels.posterior.kronecker import KroneckerFactors, KroneckerPosterior
from bayesian_lora_kernels.predictive.logits import choose_logits

activation_t = Tensor
outgrad_t = Tensor
KFAC_t = dict[str, tuple[Tensor, Tensor]]

SCALES = ("published", "correct")

__all__ = [
    "KFAC_t",
    "activation_t",
    "calc_M",
    "calculate_kronecker_factors",
    "cholesky_decompose_small_factors",
    "incremental_svd",
    "jacobian_mean",
    "model_evidence",
    "outgrad_t",
    "stable_cholesky",
    "variance",
]


def stable_cholesky(K: Tensor, mult_eps: float = 1e-8, abs_eps: float = 1e-8, max_tries: int = 1000) -> Tensor:
    """Lower Cholesky factors `[..., d, d]` of matrices with the smallest jitter of a ladder that suffices.

    Step i multiplies the diagonal by `1 + mult_eps 1.1^i` and adds `abs_eps 1.1^i`, from i = 0 on.

    Raises:
        ValueError: if a matrix is not square, or no step suffices.
    """
    if K.ndim < 2 or K.shape[-1] != K.shape[-2]:
        raise ValueError(f"stable_cholesky: expected matrices [..., d, d], got {list(K.shape)}")
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    for i in range(max_tries):
        factor, info = torch.linalg.cholesky_ex(K * (1.0 + mult_eps * 1.1**i * eye) + abs_eps * 1.1**i * eye)
        if not info.any():
            return factor
    raise ValueError(f"stable_cholesky: no jitter of the {max_tries} tried makes {list(K.shape)} positive definite")


def incremental_svd(A: Tensor, a: Tensor, dtype: torch.dtype = torch.float64, n_kfac: int | None = None) -> Tensor:
    """The best rank-`n_kfac` update `B [d, n_kfac]` of `A [d, r]` by rows `a [batch, d]`: `B B^T ~ A A^T + a^T a`.

    Columns are orthogonal by descending norm, each up to its sign. The truncation is exact, as there; the streams of
    `calculate_kronecker_factors` keep more columns while they run and so lose less.

    Args:
        A: the estimate so far.
        a: new rows.
        dtype: of the arithmetic and the result.
        n_kfac: columns of the result, at most `r + batch`; None: as many as A.
    """
    columns = A.shape[1] if n_kfac is None else n_kfac
    everything = max(columns, A.shape[1] + a.shape[0])  # the operation's direct route, which only loses the rest
    updated = ops.incremental_svd(A.to(dtype), a.to(dtype), columns=everything)
    return updated[:, : min(columns, A.shape[0], A.shape[1] + a.shape[0])].to(dtype)


def calculate_kronecker_factors(
    model: nn.Module,
    forward_call: Callable[[nn.Module, Any], Tensor],
    loader: Iterable[Any],
    n_kfac: int | None = None,
    lr_threshold: int = 512,
    target_module_keywords: Sequence[str] = ("",),
    exclude_bias: bool = False,
    use_tqdm: bool = False,
    *,
    scale: str = "published",
) -> KFAC_t:
    """Kronecker factors of the Fisher of every `nn.Linear` whose name contains a keyword, frozen or not.

    The model is measured in eval mode and comes back as it was: mode, `.grad`, hooks.

    Args:
        model: any module.
        forward_call: `(model, batch) -> logits [N, C]`; batches are handed to it as they come.
        loader: any iterable of batches.
        n_kfac: columns of a low-rank factor; None: every factor is full.
        lr_threshold: a factor at least this wide is low-rank.
        target_module_keywords: parts of module names.
        exclude_bias: whether to leave out the column of ones that stands for a bias.
        use_tqdm: whether to show a progress bar.
        scale: `published`: the last position of the sequence only, targets sampled by PyTorch's global generator,
            output gradients of a mean loss; full factors are divided by the number of batches, low-rank ones by
            nothing. `correct`: A the mean over all valid tokens, S the sum over the data, exact Fisher up to 16
            logits; then posterior precision = `A (x) S + 1 / s2`, and no scale depends on the batch size.

    Returns:
        `{module name: (A, S)}`, `A [d_in, d_in]` or `[d_in, n_kfac]` with `B B^T` the estimate, `S` likewise over
        d_out; low-rank factors are float64. A module that is never called is left out.

    Raises:
        ValueError: for an unknown scale, no matching module, an empty loader, logits that are not `[N, C]`, factors
            that are not finite.
    """
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    layers = _matching_layers(model, target_module_keywords, exclude_bias)
    published = scale == "published"
    tokens: Literal["last", "expand"] = "last" if published else "expand"
    threshold = max(math.ceil(min(lr_threshold, 2**62)) - 1, 1)
    rank = None if n_kfac is None else int(n_kfac)
    sums = KroneckerSums(LaplaceConfig(tokens=tokens, rank=rank, rank_threshold=threshold, tail=False))
    forward = BoxedForward(model, forward_call, masked=not published)
    likelihood, generator = Classification(), torch.Generator(model_device(model)).manual_seed(0)
    rows: dict[str, int] = {}
    batches = 0
    with measuring(model):
        for batch in tqdm(loader, disable=not use_tqdm):
            recorded = capture(layers, forward, boxed(batch))
            if recorded.logits.ndim != 2:
                raise ValueError(f"forward_call: expected logits [N, C], got {list(recorded.logits.shape)}")
            if not published:
                likelihood.check_logits(recorded.logits)
            sums.add_inputs(recorded.inputs)
            for name in recorded.inputs:
                rows[name] = rows.get(name, 0) + len(recorded.logits)
            cotangents = _sampled_mean_loss(recorded.logits)
            if not published:
                cotangents = likelihood.cotangents(
                    recorded.logits, None, None, fisher="auto", samples=1, generator=generator
                )
            for cotangent, last in cotangents:
                gradients = recorded.backward(cotangent, retain_graph=not last)
                sums.add_gradients(gradients, recorded.inputs)
            batches += 1
    if not batches:
        raise ValueError("loader: expected at least one batch, got none")
    factors: KFAC_t = {}
    for name, measured in sums.factors().items():
        low_rank = [n_kfac is not None and len(factor) >= lr_threshold for factor in (measured.a, measured.s)]
        if published:  # A came as a mean over its rows
            scales = [rows[name] if low else rows[name] / batches for low in low_rank[:1]]
            scales += [1.0 if low else 1.0 / batches for low in low_rank[1:]]
        else:
            scales = [1.0, 1.0]
        a, s = (
            _as_root(factor) * weight**0.5 if low else factor * weight
            for factor, weight, low in zip((measured.a, measured.s), scales, low_rank, strict=True)
        )
        factors[name] = a, s
    return {layer.name: factors[layer.name] for layer in layers if layer.name in factors}


def _matching_layers(model: nn.Module, keywords: Sequence[str], exclude_bias: bool) -> list[LinearLayer]:
    modules = dict(model.named_modules())
    layers = [
        linear_layer(name, modules, {"weight"} if module.bias is None or exclude_bias else {"weight", "bias"})
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and any(keyword in name for keyword in keywords)
    ]
    if not layers:
        raise ValueError(f"target_module_keywords: no nn.Linear of the model contains any of {list(keywords)}")
    return layers


def _sampled_mean_loss(logits: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """The gradient of the mean cross-entropy of one sampled target per example, from the global generator."""
    logits = logits.detach()
    probs = logits.softmax(-1)
    targets = torch.multinomial(probs, 1)
    yield (probs - torch.zeros_like(probs).scatter_(1, targets, 1)) / len(logits), True


def _as_root(factor: Tensor) -> Tensor:
    """A low-rank factor, which the engine returns in full if its rank is its width, as columns B with `B B^T`."""
    factor = factor.double()
    if factor.shape[0] != factor.shape[1]:
        return factor
    values, vectors = torch.linalg.eigh(factor)
    return (vectors * values.clamp_min(0).sqrt()).flip(1)


def cholesky_decompose_small_factors(
    factors: KFAC_t, lr_threshold: int, device: str | torch.device, dtype: torch.dtype
) -> KFAC_t:
    """Replace factors narrower than `lr_threshold` by their Cholesky factors, in place; all move to device and dtype.

    Returns:
        The same dictionary.
    """
    for name, pair in factors.items():
        decomposed = [stable_cholesky(f.double()) if len(f) < lr_threshold else f for f in pair]
        factors[name] = decomposed[0].to(device, dtype), decomposed[1].to(device, dtype)
    return factors


def calc_M(
    activations: Tensor, output_grads: Tensor, n_lora: int, n_kfac: int, s2: Tensor, return_LB: bool = False
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """`M = I + s2 (B^T B) (x) (L^T L)` of equation 32 of Yang et al. 2024, `[n_lora * n_kfac] * 2`.

    Nothing here uses it: the posterior works in the factors' eigenbases, where M is diagonal.

    Args:
        activations: `L [n_lora, n_lora]` or `B [d, n_kfac]`.
        output_grads: the other.
        n_lora: rank of the adapter.
        n_kfac: columns of B.
        s2: prior variance.
        return_LB: whether to return `(M, (L, B))`.
    """
    small_first = activations.shape[-2:] == (n_lora, n_lora)
    small, large = (activations, output_grads) if small_first else (output_grads, activations)
    if small.shape[-2:] != (n_lora, n_lora) or large.shape[-1] != n_kfac:
        raise ValueError(
            f"calc_M: expected factors [{n_lora}, {n_lora}] and [d, {n_kfac}], got {list(activations.shape)} and "
            f"{list(output_grads.shape)}"
        )
    m = torch.eye(n_lora * n_kfac, dtype=small.dtype, device=small.device)
    m = m + s2 * torch.kron(large.mT @ large, small.mT @ small)
    return (m, (small, large)) if return_LB else m


def model_evidence(
    model: nn.Module,
    LL: Tensor,
    factors: KFAC_t,
    n_lora: int,
    n_kfac: int,
    s2: Tensor,
    *,
    published: bool = False,
) -> Tensor:
    """Log marginal likelihood, differentiable in `s2`.

    `LL - ||theta||^2 / (2 s2) - 1/2 sum over layers of logdet(I + s2 A (x) S)`, which is right if the factors are on
    the scale of the summed curvature (`scale="correct"`). bayesian_lora 0.0.6 computes
    `LL + sum of ||theta_l|| / s2 + 1/2 (sum of logdet - n_lora d log s2)`, d the widest side of the last factors: the
    norm not squared, both terms with the wrong sign.

    Args:
        model: whose parameters `theta` are.
        LL: log-likelihood of the data.
        factors: roots, as `cholesky_decompose_small_factors` leaves them.
        n_lora: rank of the adapter, for `published`.
        n_kfac: not used.
        s2: prior variance.
        published: whether to reproduce their formula.

    Returns:
        A tensor of the shape of `s2`.
    """
    s2 = torch.as_tensor(s2)
    logdet = torch.zeros((), dtype=torch.float64)
    for name, pair in factors.items():
        values, multiplicity = _posterior(name, pair, 1.0).spectrum()
        variances = s2.reshape(()).to(values.device, torch.float64)
        logdet = logdet + (torch.log1p(variances * values) * multiplicity).sum().to(logdet.device)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if published:
        widest = max(max(factor.shape) for factor in list(factors.values())[-1])
        norms = sum(torch.linalg.norm(p) for name, p in parameters.items() if "lora" in name.lower())
        return LL + norms / s2 + 0.5 * (logdet - n_lora * widest * s2.log())
    squares = torch.zeros((), dtype=torch.float64)
    for key in factors:
        weight = _parameter_name(key, parameters)
        names = [weight, weight.removesuffix("weight") + "bias"]
        squares = squares + sum(parameters[n].detach().double().square().sum().cpu() for n in names if n in parameters)
    evidence = LL - 0.5 * squares.to(s2.device) / s2 - 0.5 * logdet.to(s2.device)
    return evidence.to(torch.promote_types(s2.dtype, LL.dtype if isinstance(LL, Tensor) else s2.dtype))


def jacobian_mean(
    model: nn.Module,
    batch_inputs: Mapping[str, Any],
    target_ids: Tensor | None = None,
    is_s2s: bool = False,
    output_callback: Callable[[Any], Tensor] | None = None,
) -> tuple[MutableMapping[str, Tensor], Tensor]:
    """Jacobian of chosen logits with respect to the trainable parameters, and the logits.

    One backward pass for each logit serves all examples. The model is measured in eval mode and comes back as it was.

    Args:
        model: its trainable parameters are in `nn.Linear` modules.
        batch_inputs: what the model takes as keyword arguments.
        target_ids: `[C]`, the logits that are wanted; None: all of them.
        is_s2s: not needed: encoder-decoders are recognised, and their last valid decoder position is taken.
        output_callback: from the model's output to logits `[N, C]`; `target_ids` is then not used, as there. None: the
            logits of a classifier, or of the last valid position. Under left padding, position ids follow the mask.

    Returns:
        `{parameter name: [N, C, *shape]}`, formed where looked at, and `[N, C]`.

    Raises:
        ValueError: for trainable parameters elsewhere, target ids out of range, logits of another shape.
    """
    batch = Batch.of(batch_inputs, model_device(model))
    forward = _jacobian_forward(model, batch.given, target_ids, output_callback)
    layers = find_layers(model)
    with measuring(model):
        recorded = capture(layers, forward, batch)
        logits = recorded.logits
        if logits.ndim != 2:
            raise ValueError(f"jacobian_mean: expected logits [N, C], got {list(logits.shape)}")
        chosen = None if target_ids is None or output_callback is not None or forward.head_rows else target_ids
        _, indices = choose_logits(logits.detach(), chosen)
        jacobian = LazyJacobian(recorded, layers, indices)
    return jacobian, logits.detach().gather(1, indices)


def _jacobian_forward(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target_ids: Tensor | None,
    output_callback: Callable[[Any], Tensor] | None,
) -> Forward:
    """The default one where it can take a shortcut to the wanted logits, else the model's call as it is."""
    if output_callback is not None:
        return Forward(model, lambda m, batch: output_callback(m(**batch)))
    forward = Forward(model, None)
    if forward.head is None:
        return Forward(model, lambda m, batch: _last_position(m(**batch), inputs))
    head_is_trained = any(p.requires_grad for p in forward.head.module.parameters())
    return forward if target_ids is None or head_is_trained else Forward(model, None, target_ids)


def _last_position(output: Any, inputs: Mapping[str, Any]) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    if logits.ndim != 3:
        return logits
    masks = (inputs[key].bool() for key in MASK_KEYS if isinstance(inputs.get(key), Tensor))
    mask = next((m for m in masks if m.shape == logits.shape[:2]), None)
    return logits[torch.arange(len(logits), device=logits.device), last_valid(logits, mask)]


def variance(
    inputs: Any,
    jacobian: Mapping[str, Tensor],
    factors: KFAC_t,
    s2: Tensor,
    n_logits: int,
    n_lora: int,
    n_kfac: int,
    device: str | torch.device,
) -> Tensor:
    """Covariance of the logits: sum over layers of `J (A (x) S + I / s2)^-1 J^T`, given the factors exactly.

    Args:
        inputs: not used; the Jacobian knows how many examples there are.
        jacobian: ours, which is never formed, or any mapping `{parameter name: [N, C, *shape]}`.
        factors: roots, as `cholesky_decompose_small_factors` leaves them: `A = a a^T`, whatever the shapes.
        s2: prior variance; a gradient with respect to it is recorded if it requires one.
        n_logits: C.
        n_lora: not used; may differ between layers.
        n_kfac: not used; may differ between layers.
        device: of the result.

    Returns:
        `[N, C, C]`, float32 (float64 for a float64 Jacobian).

    Raises:
        ValueError: if a layer has no entry in the Jacobian, or one of another shape.
    """
    s2 = torch.as_tensor(s2)
    total: Tensor | None = None
    for key, pair in factors.items():
        name = _parameter_name(key, jacobian)
        posterior = _posterior(key, pair, s2.reshape(()).double().reciprocal())
        part = None
        if isinstance(jacobian, LazyJacobian) and not s2.requires_grad:
            part = jacobian.covariance(name, posterior)
        if part is None:
            gradient = _matrices(key, name, jacobian, posterior.shape, n_logits)
            right = posterior.apply(torch.reciprocal, gradient)
            part = gradient.flatten(2) @ right.flatten(2).mT
        part = part.to(device)
        total = part if total is None else total + part
    if total is None:
        raise ValueError("factors: expected at least one layer, got none")
    return total


def _posterior(key: str, pair: tuple[Tensor, Tensor], precision: float | Tensor) -> KroneckerPosterior:
    """The layer's Gaussian, from roots of its two factors."""
    for which, root in zip("AS", pair, strict=True):
        if root.ndim != 2:
            raise ValueError(f"{key}: expected factor {which} of shape [d, k], got {list(root.shape)}")
    a, s = (root if root.shape[1] < root.shape[0] else root.double() @ root.double().mT for root in pair)
    zero = torch.zeros((), dtype=torch.float64, device=a.device)
    return KroneckerPosterior.from_factors(KroneckerFactors(a, s, zero, zero), precision)


def _parameter_name(key: str, names: Iterable[str]) -> str:
    """The weight of a module, whose name may lack what wraps the model; adapters are not mistaken for each other."""
    every = list(names)
    if f"{key}.weight" in every:
        return f"{key}.weight"
    found = [n for n in every if n.endswith(f".{key}.weight") or f"{key}.weight".endswith(f".{n}")]
    found = found or [n for n in every if key in n]
    if len(found) != 1:
        what = "no parameter" if not found else f"several parameters, {found[0]} and {found[1]},"
        raise ValueError(f"{key}: {what} could belong to this factor; expected {key}.weight")
    return found[0]


def _matrices(key: str, name: str, jacobian: Mapping[str, Tensor], shape: tuple[int, int], n_logits: int) -> Tensor:
    """`[N, C, d_out, d_in]` of a layer, with its bias as the last column if the factor counts one."""
    weight = jacobian[name]
    weight = weight.to(accumulate_dtype(weight))
    bias = jacobian.get(name.removesuffix("weight") + "bias") if name.endswith("weight") else None
    if bias is not None and weight.shape[-1] + 1 == shape[1]:
        weight = torch.cat([weight, bias.to(weight.dtype)[..., None]], dim=-1)
    if weight.shape[-2:] != shape and weight.shape[-2:] == shape[::-1]:
        weight = weight.mT
    if weight.ndim < 2 or weight.shape[-2:] != shape or weight.numel() % (n_logits * shape[0] * shape[1]):
        raise ValueError(
            f"{key}: expected a Jacobian [N, {n_logits}, {shape[0]}, {shape[1]}] to match its factors, got "
            f"{list(weight.shape)}"
        )
    return weight.reshape(-1, n_logits, *shape)
