"""`blk calibrate`: set the level of the probabilities by labels that the adapter was not trained on."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping

from bayesian_lora_kernels.calibration import expected_calibration_error, negative_log_likelihood
from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.errors import as_input_errors
from bayesian_lora_kernels.commands.job import FEW_LABELS, load_job, load_posterior
from bayesian_lora_kernels.commands.parts import Facts, Table
from bayesian_lora_kernels.commands.probabilities import name_of
from bayesian_lora_kernels.posterior.storage import JSON_NAME
from bayesian_lora_kernels.predictive.calibrate import LabelLikelihood

METRICS = {"nll": ("NLL", negative_log_likelihood), "ece": ("ECE", expected_calibration_error)}
METHOD = "pairwise"


def run(args: Namespace) -> int:
    """Look at the labels, save, print, write.

    Raises:
        InputError: for whatever the user has to put right.
    """
    folder = args.posterior or args.adapter
    output.check_folder(folder, "" if args.posterior is None else "--posterior ")
    job = load_job(args, labelled=True, posterior=folder, classes=2)
    if len(job.labels) < FEW_LABELS:
        output.warn(f"{args.data}: {len(job.labels)} labels say little; {FEW_LABELS} do, a hundred are good")
    laplace = load_posterior(job.inputs.model, folder)
    logits, labels = job.judged(laplace)
    evidence = LabelLikelihood()
    with as_input_errors():
        evidence.add(logits.mean, logits.covariance, labels, laplace.variance_scale)
        calibration = laplace.calibrate(evidence).calibration
    assert calibration is not None
    calibrated = calibration.probs(METHOD, logits.mean, logits.covariance)
    probs = {"MAP": logits.probs("map"), name_of(METHOD, calibration): calibrated}
    metrics = {
        name: {key: metric(values, labels) for key, (_, metric) in METRICS.items()} for name, values in probs.items()
    }
    with as_input_errors():
        laplace.save_pretrained(folder)
    result = {
        "command": "calibrate",
        "adapter": str(args.adapter),
        "base": job.base,
        "posterior": str(folder),
        "data": str(args.data),
        "task": job.task.kind,
        "choices": job.task.names,
        "n_examples": calibration.n_labels,
        "n_truncated": job.inputs.truncated,
        "grid_points": calibration.weights[METHOD].numel(),
        "effective_points": calibration.effective_points,
        "method": METHOD,
        **dict(zip(("map", "laplace"), metrics.values(), strict=True)),
    }
    output.write_json(args.json, result)
    points = ", ".join(f"{points:.1f} ({method})" for method, points in calibration.effective_points.items())
    facts = [
        (job.task.examples, f"{calibration.n_labels} of {args.data}"),
        ("effective grid points", f"{points}, of {result['grid_points']}"),
        ("written to", f"{folder}/{JSON_NAME}"),
    ]
    judge = "the calibration was made with these labels, so they do not judge it; blk evaluate does, on others"
    output.show(args, Facts(facts), "", _report(metrics), "", judge)
    return 0


def _report(metrics: Mapping[str, Mapping[str, float]]) -> Table:
    rows = [["on these labels", *(title for title, _ in METRICS.values())]]
    rows += [[name, *(f"{values[key]:.4f}" for key in METRICS)] for name, values in metrics.items()]
    return Table(rows)
