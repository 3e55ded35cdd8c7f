"""`blk fit`: measure the curvature, choose the prior precision, write the posterior."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bayesian_lora_kernels.commands import options, output
from bayesian_lora_kernels.commands.errors import as_input_errors
from bayesian_lora_kernels.commands.job import FEW_LABELS, how_to_calibrate, how_to_score, load_job
from bayesian_lora_kernels.commands.parts import Advice, Facts
from bayesian_lora_kernels.posterior.storage import JSON_NAME


def run(args: Namespace) -> int:
    """Fit and save.

    Raises:
        InputError: for whatever the user has to put right.
    """
    folder = args.out or args.adapter
    output.check_folder(folder, "" if args.out is None else "--out ")
    if args.checkpoint is not None:
        output.check_folder(args.checkpoint, "--checkpoint ")
    config = options.config_of(args)
    job = load_job(args, labelled=True, texts=True)
    with as_input_errors():
        laplace = job.laplace(config)
        started = time.perf_counter()
        laplace.fit(job.batches(), progress=output.watched(), checkpoint=args.checkpoint)
        laplace.optimize_prior_precision(per_module=args.per_module)
        evidence = float(laplace.log_marginal_likelihood())
        seconds = time.perf_counter() - started
        laplace.save_pretrained(folder)
    parameters = [p for layer in laplace.layers for p in layer.parameters().values()]
    result = {
        "command": "fit",
        "adapter": str(args.adapter),
        "base": job.base,
        "data": str(args.data),
        "posterior": str(folder),
        "task": job.task.kind,
        "choices": job.task.names,
        "class_tokens": job.inputs.tokens,
        "class_token_ids": job.inputs.token_ids,
        **laplace.config.as_json(),
        "n_examples": laplace.n_examples,
        "n_truncated": job.inputs.truncated,
        "n_tokens": sum(len(ids) - 1 for (ids,) in job.inputs.ids) if job.task.texts else None,
        "n_modules": len(laplace.layers),
        "n_parameters": sum(p.numel() for p in parameters),
        "log_likelihood": laplace.log_likelihood,
        "log_marginal_likelihood": evidence,
        "prior_precision": _numbers(laplace.prior_precision),
        "seconds": seconds,
    }
    output.write_json(args.json, result)
    if job.task.texts:
        advice = Advice("how sure the model is of each token of a text", how_to_score(args, folder))
    else:
        advice = Advice(
            f"probabilities are not calibrated by the evidence; held-out labels (from {FEW_LABELS} on) do that",
            how_to_calibrate(args, folder),
        )
    output.show(args, _report(result), "", advice)
    return 0


def _report(result: Mapping[str, Any]) -> Facts:
    unit, n = ("example", result["n_examples"]) if result["n_tokens"] is None else ("token", result["n_tokens"])
    names = list(map(repr, result["choices"]))
    if result["class_tokens"] is not None:
        names = [f"{name} by token {token!r}" for name, token in zip(names, result["class_tokens"], strict=True)]
    return Facts(
        [
            *(
                [(result["task"], ", ".join(names))]
                if names
                else [("tokens", f"{n:,} predicted, each from those before it")]
            ),
            ("examples", f"{result['n_examples']}"),
            ("modules", f"{result['n_modules']}"),
            ("parameters", f"{result['n_parameters']:,}"),
            ("curvature", result["curvature"]),
            ("log-likelihood", f"{result['log_likelihood']:.2f}  ({result['log_likelihood'] / n:.4f} per {unit})"),
            ("log evidence", f"{result['log_marginal_likelihood']:.2f}"),
            ("prior precision", _precision(result["prior_precision"])),
            ("time", f"{result['seconds']:.1f} s"),
            ("written to", f"{result['posterior']}/{JSON_NAME}"),
        ]
    )


def _numbers(precision: Tensor | Mapping[str, Tensor]) -> float | dict[str, float]:
    if isinstance(precision, Mapping):
        return {name: float(value) for name, value in precision.items()}
    return float(precision)


def _precision(precision: float | Mapping[str, float]) -> str:
    if isinstance(precision, Mapping):
        return f"{min(precision.values()):.4g} to {max(precision.values()):.4g}, one for each module"
    return f"{precision:.4g}"
