"""`blk doctor`: what this machine can run, and whether it gets a small problem right, and the user's own model."""

from __future__ import annotations

import platform
from argparse import Namespace
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import nn

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.adapter import TASKS, open_adapter
from bayesian_lora_kernels.commands.dataset import batches, read_examples
from bayesian_lora_kernels.commands.errors import FAILED, InputError, as_input_errors
from bayesian_lora_kernels.commands.inputs import load_inputs
from bayesian_lora_kernels.commands.kernels import format_kernels, verify_kernels
from bayesian_lora_kernels.commands.memory import estimate
from bayesian_lora_kernels.commands.parts import Part, Table
from bayesian_lora_kernels.commands.task import task_of
from bayesian_lora_kernels.laplace import LaplaceLoRA
from bayesian_lora_kernels.ops import native
from bayesian_lora_kernels.ops.dispatch import backends
from bayesian_lora_kernels.verification import Verification

PACKAGES = ("torch", "triton", "transformers", "peft", "safetensors", "numpy", "matplotlib")
TOLERANCE = 1e-10
OF_AN_ESTIMATE = ("batch_size", "length", "budget", "examples")  # options
OF_AN_ADAPTER = ("model", "data", "choices", *OF_AN_ESTIMATE)
EXAMPLES = 8  # of the file; the one with most padding among them and its neighbour are compared


def run(args: Namespace) -> int:
    """Examine the machine, estimate or verify the adapter if there is one, print, write."""
    unused = next((name for name in OF_AN_ADAPTER if args.adapter is None and getattr(args, name) is not None), None)
    if unused is not None:
        raise InputError(f"--{unused.replace('_', '-')}: expected with --adapter FOLDER, whose adapter it is about")
    report: dict[str, Any] = {"command": "doctor", **examine()}
    parts: list[Part] = [format_report(report)]
    if args.verify is not None:
        kernels = verify_kernels(args.verify)
        parts += ["", *format_kernels(kernels)]
        report |= {"kernels": kernels, "ok": report["ok"] and kernels["ok"]}
    asked = any(getattr(args, name) is not None for name in OF_AN_ESTIMATE)
    if asked:
        text, found = estimate(args)
        parts += ["", str(args.adapter), text]
        report |= {"memory": found, "ok": report["ok"] and all(found["fits"].values())}
    if args.adapter is not None and (args.data is not None or not asked):
        verified = verify_adapter(args)
        parts += ["", str(args.adapter), Table(verified.rows(), left=5)]
        report |= {"model": verified.as_dict(), "ok": report["ok"] and verified.ok}
    output.write_json(args.json, report)
    output.show(args, *parts)
    return 0 if report["ok"] else FAILED


def examine() -> dict[str, Any]:
    """Versions, devices, implementations and the self-test, in values that JSON can hold."""
    reason = native.why_unavailable()
    checks = [
        _attempt(check) for check in (evidence_is_that_of_the_dense_matrix, covariance_is_that_of_the_dense_matrix)
    ]
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "cuda": {
            "version": torch.version.cuda,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "implementations": backends(),
        "native": {"reason": reason} if reason is not None else {"build": native.build_info()},
        "checks": checks,
        "ok": all(check["passed"] for check in checks),
    }


def format_report(report: dict[str, Any]) -> str:
    """The same to read."""
    lines = [f"{name:<14}{version or 'not installed'}" for name, version in report["versions"].items()]
    cuda = report["cuda"]
    lines.append(f"{'CUDA':<14}{cuda['version'] or 'this PyTorch is built without'}")
    lines.append(f"{'GPU':<14}{', '.join(cuda['devices']) or 'none'}")
    lines.append("\nimplementations")
    for name, entry in report["implementations"].items():
        state = "can run" if entry["available"] else f"cannot run: {entry['reason']}"
        lines.append(f"  {name:<12}{state}")
    if "build" in report["native"]:
        build = ", ".join(f"{key} {value or 'none'}" for key, value in report["native"]["build"].items())
        lines.append(f"  native extension: {build}")
    lines.append("\nself-test")
    for check in report["checks"]:
        lines.append(f"  {'pass' if check['passed'] else 'FAIL'}  {check['name']}: {check['detail']}")
    return "\n".join(lines)


def verify_adapter(args: Namespace) -> Verification:
    """Load the adapter, and verify it on the first prompts of the file.

    Raises:
        InputError: for whatever the user has to put right.
    """
    if args.data is None:
        raise InputError("--data: expected a file of JSON lines with prompts, to verify the adapter on")
    folder = open_adapter(args.adapter, args.model, tuple(TASKS))
    task = task_of(folder, args.choices, without="choices")
    examples = read_examples(args.data, None, labelled=False, pairs=task.pairs)[:EXAMPLES]
    inputs = load_inputs(folder, task, examples, args.device, args.dtype)
    with as_input_errors():
        laplace = LaplaceLoRA(inputs.model, None, inputs.token_ids, likelihood=task.likelihood)
        return laplace.verify(batches(inputs.ids, EXAMPLES, inputs.pad_id)[0])


def evidence_is_that_of_the_dense_matrix() -> float:
    """Relative error of a K-FAC evidence against determinants of the dense Kronecker product."""
    model, inputs, labels = _toy()
    precision = 0.7
    laplace = LaplaceLoRA(model, curvature="kfac", fisher="exact", prior_precision=precision)
    laplace.fit([(inputs, labels)], progress=False)
    dense = _dense_precision(model, inputs, precision)
    weight = model.weight.detach()
    expected = (
        -nn.functional.cross_entropy(model(inputs).detach(), labels, reduction="sum")
        - precision / 2 * weight.square().sum()
        + weight.numel() / 2 * torch.tensor(precision, dtype=torch.float64).log()
        - torch.linalg.slogdet(dense).logabsdet / 2
    )
    return float((laplace.log_marginal_likelihood() - expected).abs() / expected.abs())


def covariance_is_that_of_the_dense_matrix() -> float:
    """Relative error of a K-FAC predictive covariance against `J inverse(precision) J^T`."""
    model, inputs, labels = _toy()
    precision = 0.7
    laplace = LaplaceLoRA(model, curvature="kfac", fisher="exact", prior_precision=precision)
    laplace.fit([(inputs, labels)], progress=False)
    inverse = torch.linalg.inv(_dense_precision(model, inputs, precision))
    # The logits are W x, so logit c's Jacobian is x in row c of W.
    classes = torch.eye(model.out_features, dtype=torch.float64)
    jacobian = torch.einsum("cd,ni->ncdi", classes, inputs).flatten(2)
    expected = jacobian @ inverse @ jacobian.mT
    return float((laplace.predict((inputs, labels)).covariance - expected).norm() / expected.norm())


def _toy() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 5, generator=generator, dtype=torch.float64))
    inputs = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    return model, inputs, torch.randint(3, (12,), generator=generator)


def _dense_precision(model: nn.Linear, inputs: torch.Tensor, precision: float) -> torch.Tensor:
    """Mean of `a a^T` and sum of the softmax's Fisher matrices, multiplied out, plus the prior: `[15, 15]`."""
    probs = model(inputs).detach().softmax(dim=-1)
    fisher = (torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]).sum(dim=0)
    dense = torch.kron(fisher, inputs.mT @ inputs / len(inputs))
    return dense + precision * torch.eye(len(dense), dtype=torch.float64)


def _attempt(check: Callable[[], float]) -> dict[str, Any]:
    name = check.__name__.replace("_", " ")
    try:
        error = check()
    except Exception as problem:  # a broken installation breaks in any way; the report is what tells
        return {"name": name, "passed": False, "detail": f"{type(problem).__name__}: {problem}"}
    return {"name": name, "passed": error <= TOLERANCE, "detail": f"relative error {error:.1e} (limit {TOLERANCE:g})"}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
