"""Jacobian-vector products `J dtheta` with deviations of the weights, by whatever derivative the model has.

Forward-mode differentiation, many samples at once, is the best and serves ordinary layers. Custom operations (quantised
layers, fused kernels) often lack it; then `J v` comes out of two backward passes, since `u -> J^T u` is linear and its
own transpose is J. Where even that is missing, central differences with an estimate of their error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bayesian_lora_kernels.predictive.attention import attention_with_tangents, plain_attention

Parameters = Mapping[str, Tensor]
Function = Callable[[Parameters], Tensor]

METHODS = ("forward", "forward-single", "double-backward", "differences")
STEPS = tuple(4.0**k for k in range(-3, 4))  # times the cube root of the machine's precision

logger = logging.getLogger(__name__)


class JacobianVectorProduct:
    """Jacobian times weight deviations, with the first method that works on the model; later calls keep to it.

    A method that runs is believed only if it agrees with a backward pass, once: `<u, J v> = <J^T u, v>`.

    Attributes:
        method: of METHODS, None before the first call. `forward`: forward mode, all samples at once; `forward-single`:
            one sample at a time, for operations that cannot be batched; `double-backward`; `differences`.
        error: estimated relative error of `differences`, from its first sample; 0 for the others, which are exact.
        reasons: `{method: why it was left out}`.

    Args:
        method: take this one and no other.
    """

    def __init__(self, method: str | None = None):
        if method is not None and method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        self.method = method
        self.error = 0.0
        self.reasons: dict[str, str] = {}
        self._step: float | None = None

    def __call__(self, function: Function, parameters: Parameters, deviations: Parameters) -> Tensor:
        """`J v_s` for every sample.

        Args:
            function: of the parameters; is called a few times.
            parameters: where to linearise.
            deviations: `{name: [S, *shape]}`.

        Returns:
            `[S, *shape of the function's value]`.

        Raises:
            RuntimeError: if no method works; the message says why.
        """
        parameters = {name: value.detach() for name, value in parameters.items()}
        deviations = {name: deviations[name].to(value.dtype) for name, value in parameters.items()}
        if self.method is not None:
            return self._run(self.method, function, parameters, deviations)
        for method in METHODS:
            try:
                result = self._run(method, function, parameters, deviations)
                if method != "differences":
                    _compare(function, parameters, deviations, result[0])
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                self.reasons[method] = " ".join(str(error).split())[:160] or type(error).__name__
                continue
            self.method = method
            if method != METHODS[0]:
                level = logging.WARNING if method == "differences" else logging.INFO
                logger.log(level, "samples of the hidden state by %s; left out: %s", self.describe(), self._left_out())
            return result
        raise RuntimeError(f"no derivative of the hidden state with respect to the weights: {self._left_out()}")

    def describe(self) -> str:
        """The method, and the error of central differences; "none yet" before the first call."""
        if self.method == "differences":
            return f"central differences (relative error about {self.error:.1e})"
        return self.method or "none yet"

    def _left_out(self) -> str:
        return "; ".join(f"{method}: {reason}" for method, reason in self.reasons.items())

    def _run(self, method: str, function: Function, parameters: Parameters, deviations: Parameters) -> Tensor:
        if method == "forward":
            return _forward(function, parameters, deviations)
        if method == "forward-single":
            return _forward_single(function, parameters, deviations)
        if method == "double-backward":
            return _double_backward(function, parameters, deviations)
        return self._differences(function, parameters, deviations)

    @torch.no_grad()
    def _differences(self, function: Function, parameters: Parameters, deviations: Parameters) -> Tensor:
        """`(h(theta + e v) - h(theta - e v)) / 2e`; the error is seen from the step of twice the size.

        Rounding asks for long steps, curvature for short ones: the first sample of all tries several.
        """
        level = _norm(list(parameters.values()))
        results = []
        for v in _unstacked(deviations):
            length = _norm(list(v.values()))
            if not length:
                results.append(torch.zeros_like(function(parameters)))
                continue
            unit = level / length if level else 1 / length

            def along(step: float, v: Parameters = v, unit: float = unit) -> Tensor:
                ends = [
                    function({name: value + sign * step * unit * v[name] for name, value in parameters.items()})
                    for sign in (1, -1)
                ]
                return (ends[0] - ends[1]) / (2 * step * unit)

            if self._step is not None and self.error:
                results.append(along(self._step))
                continue
            trials = []
            coarsest = max(torch.finfo(value.dtype).eps for value in [*parameters.values(), function(parameters)])
            for factor in STEPS:
                step = factor * coarsest ** (1 / 3)
                near, far = along(step), along(2 * step)
                error = float((near - far).norm() / near.norm().clamp_min(torch.finfo(near.dtype).tiny))
                trials.append((error, step, near))
            error, self._step, best = min(trials, key=lambda trial: trial[0])
            self.error = max(error, torch.finfo(torch.float64).tiny)
            results.append(best)
        return torch.stack(results)


def _forward(function: Function, parameters: Parameters, deviations: Parameters) -> Tensor:
    def jvp(v: dict[str, Tensor]) -> Tensor:
        return torch.func.jvp(function, (dict(parameters),), (v,))[1]

    with attention_with_tangents():
        return torch.func.vmap(jvp)(dict(deviations))


def _forward_single(function: Function, parameters: Parameters, deviations: Parameters) -> Tensor:
    results = []
    for v in _unstacked(deviations):
        with forward_ad.dual_level(), attention_with_tangents():
            value = function({name: forward_ad.make_dual(p, v[name].contiguous()) for name, p in parameters.items()})
            tangent = forward_ad.unpack_dual(value).tangent
            results.append(torch.zeros_like(value) if tangent is None else tangent.clone())
    return torch.stack(results)


def _double_backward(function: Function, parameters: Parameters, deviations: Parameters) -> Tensor:
    """With `g(u) = J^T u`, linear in u, `J v` is the gradient of `<g(u), v>` with respect to u."""
    with torch.enable_grad(), plain_attention():
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        value = function(leaves)
        samples = len(next(iter(deviations.values())))
        if not value.requires_grad:
            return value.detach().new_zeros(samples, *value.shape)
        u = torch.zeros_like(value, requires_grad=True)
        transposed = torch.autograd.grad(value, list(leaves.values()), u, create_graph=True, allow_unused=True)
        used = [(name, g) for name, g in zip(leaves, transposed, strict=True) if g is not None]
        results = []
        for s in range(samples):
            pushed = torch.autograd.grad(
                [g for _, g in used], u, [deviations[name][s] for name, _ in used], retain_graph=s + 1 < samples
            )
            results.append(pushed[0].detach())
    return torch.stack(results)


def _compare(function: Function, parameters: Parameters, deviations: Parameters, first: Tensor) -> None:
    """Raises RuntimeError if a backward pass contradicts `J v` of the first sample: a derivative that is cut off.

    Where all of it is, `J v` is zero; then the backward pass is of a random u.
    """
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(first)
    u = first if first.any() else noise
    with torch.enable_grad():
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        value = function(leaves)
        wide = torch.float64
        backward = 0.0
        if value.requires_grad:
            grads = torch.autograd.grad(value, list(leaves.values()), u.to(value.dtype), allow_unused=True)
            backward = sum(
                float((g.to(wide) * deviations[name][0].to(g.device, wide)).sum())
                for name, g in zip(leaves, grads, strict=True)
                if g is not None
            )
    forward = float((u.to(wide) * first.to(wide)).sum())
    tolerance = 0.1 if torch.finfo(first.dtype).bits < 32 else 1e-2
    if not abs(forward - backward) <= tolerance * max(abs(forward), abs(backward)):
        raise RuntimeError(f"disagrees with a backward pass ({forward:.6g} against {backward:.6g})")


def _unstacked(deviations: Parameters) -> list[dict[str, Tensor]]:
    samples = len(next(iter(deviations.values())))
    return [{name: value[s] for name, value in deviations.items()} for s in range(samples)]


def _norm(tensors: list[Tensor]) -> float:
    return float(sum(float(t.double().square().sum()) for t in tensors)) ** 0.5
