"""`J v` by every method against the dense Jacobian, and the choice between them."""

from __future__ import annotations

import logging

import pytest
import torch
from dense import relative, rows_of
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayesian_lora_kernels.predictive.jvp import METHODS, JacobianVectorProduct


class NoForwardMode(torch.autograd.Function):
    """`x^3` with a backward pass that can be differentiated, and nothing else."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class BackwardOnce(torch.autograd.Function):
    """Likewise, with a backward pass that cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class NoBatching(torch.autograd.Function):
    """Forward mode of the plain kind, which torch.func does not take."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * t


class WrongForwardMode(NoForwardMode):
    """Its forward mode is half of the derivative."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return 1.5 * x**2 * t


CUBES = {
    "plain": (lambda x: x**3, "forward"),
    "no batching": (NoBatching.apply, "forward-single"),
    "no forward mode": (NoForwardMode.apply, "double-backward"),
    "wrong forward mode": (WrongForwardMode.apply, "double-backward"),
    "backward once": (BackwardOnce.apply, "differences"),
}


def problem(cube, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64).to(dtype)
    parameters = {"a": torch.randn(3, 4, generator=generator, dtype=torch.float64).to(dtype)}
    parameters["b"] = torch.randn(2, 3, generator=generator, dtype=torch.float64).to(dtype)
    parameters["unused"] = torch.ones(2, dtype=dtype)
    shapes = {name: (6, *p.shape) for name, p in parameters.items()}
    v = {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}

    def function(p: dict[str, Tensor]) -> Tensor:
        return cube(torch.tanh(x @ p["a"].mT) @ p["b"].mT)

    return function, parameters, v


def truth(parameters, v):
    function, _, _ = problem(lambda x: x**3)
    leaves = {name: p.double().clone().requires_grad_() for name, p in parameters.items()}
    jacobians = rows_of(function(leaves).flatten(), list(leaves.values()))
    return sum(j.flatten(1) @ d.double().flatten(1).mT for j, d in zip(jacobians, v.values(), strict=True)).mT


@pytest.mark.parametrize("name", CUBES)
def test_the_first_method_that_works_is_taken_and_right(name, caplog):
    cube, method = CUBES[name]
    function, parameters, v = problem(cube)
    jvp = JacobianVectorProduct()
    with caplog.at_level(logging.INFO, logger="bayesian_lora_kernels"):
        found = jvp(function, parameters, v)
    assert jvp.method == method
    assert list(jvp.reasons) == list(METHODS[: METHODS.index(method)])
    assert relative(found.flatten(1), truth(parameters, v)) < (1e-7 if method == "differences" else 1e-12)
    assert (method in caplog.text or "differences" in caplog.text) == (method != "forward")
    again = jvp(function, parameters, {n: d[2:4] for n, d in v.items()})
    assert relative(again, found[2:4]) < 1e-7
    assert all(p.grad is None and not p.requires_grad for p in parameters.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_right_where_all_work(method, dtype):
    function, parameters, v = problem(lambda x: x**3, dtype)
    jvp = JacobianVectorProduct(method)
    found = jvp(function, parameters, v)
    assert found.dtype == dtype
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    inexact = 1e-7 if dtype == torch.float64 else 3e-3
    assert relative(found.flatten(1), truth(parameters, v)) < (inexact if method == "differences" else exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_central_differences_know_their_error(dtype):
    function, parameters, v = problem(BackwardOnce.apply, dtype)
    jvp = JacobianVectorProduct("differences")
    found = jvp(function, parameters, v).double().flatten(1)
    expected = truth(parameters, v)
    error = float((found[0] - expected[0]).norm() / expected[0].norm())
    assert 0 < jvp.error < (1e-2 if dtype == torch.float32 else 1e-6)
    assert error < 3 * jvp.error + torch.finfo(dtype).eps
    assert f"{jvp.error:.1e}" in jvp.describe()


def test_a_deviation_of_zero_and_a_constant_function():
    function, parameters, v = problem(lambda x: x**3)
    zero = {name: torch.zeros_like(d) for name, d in v.items()}
    for method in METHODS:
        assert not JacobianVectorProduct(method)(function, parameters, zero).any()
    for method in METHODS:
        assert not JacobianVectorProduct(method)(lambda p: torch.ones(3), parameters, v).any()
    assert not JacobianVectorProduct()(lambda p: torch.ones(3), parameters, v).any()


def test_nothing_works():
    def broken(p: dict[str, Tensor]) -> Tensor:
        raise RuntimeError("no such kernel")

    _, parameters, v = problem(torch.sin)
    with pytest.raises(RuntimeError, match=r"forward: no such kernel.*differences: no such kernel"):
        JacobianVectorProduct()(broken, parameters, v)


def test_an_unknown_method():
    with pytest.raises(ValueError, match="expected one of forward, forward-single"):
        JacobianVectorProduct("reverse")
