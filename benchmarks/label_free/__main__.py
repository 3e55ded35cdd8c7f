"""Can leave-one-out on the refitted linearised model calibrate without labels? `python -m benchmarks.label_free`.

docs/label-free.md says what is asked and what came out.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.predictive.probabilities import pairwise_log_probs

from . import rules
from .linearised import Evidence, Features, Refit, evidence_arguments, jacobians, refit
from .models import Model, families
from .report import as_markdown, decision_table, decisions
from .verify import verification

# Mean prior variance of a centred logit, tried from the smallest up.
VARIANCES = [10.0 ** (0.5 * k) for k in range(9)]


_initial: dict[str, Any] = {}


def laplace_of(model: Model, which: torch.nn.Module) -> LaplaceLoRA:
    forward = model.forward if model.class_token_ids is None else None
    return LaplaceLoRA(
        which, forward, model.class_token_ids, curvature="exact", likelihood="regression", fisher="exact"
    )


def path(features: Features, labels: Tensor) -> list[Refit]:
    """Refits along the grid, each started from the last."""
    fits: list[Refit] = []
    for variance in VARIANCES:
        fits.append(refit(features, labels, features.scale / variance, fits[-1].weights if fits else None))
    return fits


def predictive_nll(fit: Refit, labels: Tensor) -> float:
    return float(-pairwise_log_probs(fit.loo, fit.loo_covariance).gather(1, labels[:, None]).mean())


def matched(features: Features, labels: Tensor, fits: list[Refit], train_nll: float) -> Refit:
    """The refit that fits its training labels as well as the network does; the end of the grid if none does."""
    losses = [fit.train_nll for fit in fits]
    after = next((i for i, loss in enumerate(losses) if loss <= train_nll), len(fits) - 1)
    if after == 0 or losses[after] > train_nll:
        return fits[after]
    a, b = fits[after - 1], fits[after]
    share = (math.log(a.train_nll) - math.log(train_nll)) / (math.log(a.train_nll) - math.log(b.train_nll))
    precision = math.exp(math.log(a.precision) + share * (math.log(b.precision) - math.log(a.precision)))
    return refit(features, labels, precision, a.weights)


def measure(model: Model) -> dict[str, Any]:
    """Every rule on one model."""
    start = time.perf_counter()
    labels = model.labels
    logits = {name: model.logits(name) for name in labels}
    n, c = logits["train"].shape
    tuned = laplace_of(model, model.model)
    features = Features.of(jacobians(tuned, model.batches["train"], c))
    evidence = Evidence.of(features, logits["train"], labels["train"], **evidence_arguments(tuned))
    covariance = {
        name: evidence.covariance(jacobians(tuned, model.batches[name], c)) for name in ("held_out", "test", "shift")
    }
    train_nll = rules.measured(logits["train"].softmax(1), labels["train"])["nll"]
    z = evidence.factor

    if _initial.get("of") is not model.initial:  # the same for all moments
        rows = Features.of(jacobians(laplace_of(model, model.initial), model.batches["train"], c))
        _initial.update({"of": model.initial, "rows": rows, "fits": path(rows, labels["train"])})
    initial: Features = _initial["rows"]
    chosen: dict[str, Refit] = {}
    grids = {}
    for source, own in (("map", features), ("init", initial)):
        fits: list[Refit] = _initial["fits"] if source == "init" else path(own, labels["train"])
        grids[source] = [
            {
                "variance": variance,
                "train_nll": fit.train_nll,
                "loo_nll": predictive_nll(fit, labels["train"]),
                "loo_plug_in_nll": rules.measured(fit.loo.softmax(1), labels["train"])["nll"],
                "loo_accuracy": float((fit.loo.argmax(1) == labels["train"]).double().mean()),
                "T": rules.temperature(fit.loo, labels["train"]),
            }
            for variance, fit in zip(VARIANCES, fits, strict=True)
        ]
        best = min(range(len(fits)), key=lambda i: grids[source][i]["loo_nll"])
        chosen[f"{source}"] = fits[best]
        chosen[f"{source}, matched"] = matched(own, labels["train"], fits, train_nll)

    found: dict[str, Any] = {}
    probs = {name: {"MAP": logits[name].softmax(1)} for name in ("test", "shift")}
    cavities = evidence.cavities()
    t100 = rules.temperature(logits["held_out"], labels["held_out"])
    tb100 = rules.weights(logits["held_out"], z * covariance["held_out"], labels["held_out"])
    temperatures = {"T100": t100, "best T": rules.temperature(logits["test"], labels["test"])}
    weights = {"Tb100": tb100}
    for key, fit in chosen.items():
        temperatures[f"LOO-T ({key})"] = rules.temperature(fit.loo, labels["train"])
        weights[f"LOO-Tb ({key})"] = rules.weights(fit.loo, z * cavities, labels["train"])
        found[key] = {
            "prior_variance": rows_scale(features if key.startswith("map") else initial, fit),
            "train_nll": fit.train_nll,
            "loo_nll": predictive_nll(fit, labels["train"]),
            "loo_accuracy": float((fit.loo.argmax(1) == labels["train"]).double().mean()),
        }
    for name in probs:
        for key, t in temperatures.items():
            probs[name][key] = (logits[name] / t).softmax(1)
        for key, weight in weights.items():
            probs[name][key] = rules.averaged(logits[name], z * covariance[name], weight)
        probs[name]["evidence"] = pairwise_log_probs(logits[name], covariance[name]).exp()
    return {
        "cell": model.cell,
        "seed": model.seed,
        "n": n,
        "classes": c,
        "weights": features.rows.shape[2] if features.span is None else len(features.span),
        "train_nll": train_nll,
        "train_accuracy": float((logits["train"].argmax(1) == labels["train"]).double().mean()),
        "l0": evidence.precision,
        "z": z,
        "temperatures": temperatures,
        "refits": found,
        "grids": grids,
        "results": {
            name: {key: rules.measured(value, labels[name]) for key, value in each.items()}
            for name, each in probs.items()
        },
        "seconds": time.perf_counter() - start,
    }


def rows_scale(features: Features, fit: Refit) -> float:
    return features.scale / fit.precision


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.label_free", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for label_free.json, label_free.md")
    parser.add_argument("--quick", action="store_true", help="seconds: shows that every part works, and nothing else")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--add", type=Path, metavar="FILE", help="a label_free.json of other seeds, to be reported with"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="families whose name has this in it")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = [family for family in families(arguments.quick) if arguments.only in family.name]
    seeds = range(arguments.first_seed, arguments.first_seed + (1 if arguments.quick else arguments.seeds))
    checked = verification()
    records: list[dict[str, Any]] = json.loads(arguments.add.read_text())["models"] if arguments.add else []
    with tqdm(total=len(seeds) * sum(len(family.moments) for family in chosen), desc="models") as bar:
        for family in chosen:
            for seed in seeds:
                for model in family.make(seed):
                    bar.set_postfix_str(model.cell)
                    records.append(measure(model))
                    bar.update()
            write(arguments.out, records, checked, shlex.join(["python", "-m", "benchmarks.label_free", *sys.argv[1:]]))
    print(decision_table(records))


def write(folder: Path, records: list[dict[str, Any]], checked: dict[str, Any], command: str) -> None:
    """Both files, after every family."""
    used = ("torch", "transformers", "peft", "scikit-learn")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in used)
    content = {
        "command": command,
        "versions": versions,
        "decisions": decisions(records),
        "verification": checked,
        "models": records,
    }
    text = json.dumps(rounded(content), separators=(",", ":"))
    (folder / "label_free.json").write_text(text.replace('{"cell"', '\n{"cell"') + "\n", encoding="utf-8")
    (folder / "label_free.md").write_text(as_markdown(records, checked, command, versions), encoding="utf-8")


def rounded(value: Any) -> Any:
    """Five digits of every number."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    main()
