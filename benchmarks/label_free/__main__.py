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
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.predictive.probabilities import pairwise_log_probs

from . import rules
from .linearised import Evidence, Features, Refit, evidence_arguments, jacobians, map_weights, refit
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


def sources(model: Model, tuned: LaplaceLoRA, logits: Tensor, jacobian: Tensor) -> Iterator[tuple[str, Features]]:
    """What can be refitted: the linearised network, the kernel of its Jacobian, the kernel before fine-tuning."""
    features = Features.of(jacobian)
    yield "lin", features.around(logits, jacobian, map_weights(tuned))
    yield "map", features
    if _initial.get("of") is not model.initial:  # the same for all moments
        before = jacobians(laplace_of(model, model.initial), model.batches["train"], logits.shape[1])
        _initial.update({"of": model.initial, "features": Features.of(before)})
        _initial.pop("fits", None)
    yield "init", _initial["features"]


def measure(model: Model, known: dict[str, Any]) -> dict[str, Any]:
    """Every rule on one model; `known` may have some of the refits already, and gets the others."""
    start = time.perf_counter()
    labels = model.labels
    logits = {name: model.logits(name) for name in labels}
    y = labels["train"]
    n, c = logits["train"].shape
    tuned = laplace_of(model, model.model)
    jacobian = jacobians(tuned, model.batches["train"], c)
    evidence = Evidence.of(Features.of(jacobian), logits["train"], y, **evidence_arguments(tuned))
    covariance = {
        name: evidence.covariance(jacobians(tuned, model.batches[name], c)) for name in ("held_out", "test", "shift")
    }
    train_nll = rules.measured(logits["train"].softmax(1), y)["nll"]
    z = evidence.factor

    chosen: dict[str, Refit] = {}
    found: dict[str, Any] = {}
    grids: dict[str, Any] = {}
    for source, features in sources(model, tuned, logits["train"], jacobian):
        if source in known.get("refits", {}):
            continue
        fits: list[Refit] = _initial.get("fits", []) if source == "init" else []
        fits = fits or path(features, y)
        if source == "init":
            _initial["fits"] = fits
        grids[source] = [described(features, fit, y) for fit in fits]
        best = min(range(len(fits)), key=lambda i: grids[source][i]["loo_nll"])
        for key, fit in ((source, fits[best]), (f"{source}, matched", matched(features, y, fits, train_nll))):
            chosen[key], found[key] = fit, described(features, fit, y)

    temperatures = {
        "T100": rules.temperature(logits["held_out"], labels["held_out"]),
        "best T": rules.temperature(logits["test"], labels["test"]),
    }
    weights = {"Tb100": rules.weights(logits["held_out"], z * covariance["held_out"], labels["held_out"])}
    cavities = evidence.cavities()
    for key, fit in chosen.items():
        temperatures[f"LOO-T ({key})"] = rules.temperature(fit.loo, y)
        weights[f"LOO-Tb ({key})"] = rules.weights(fit.loo, z * cavities, y)
    results: dict[str, Any] = {}
    for name in ("test", "shift"):
        probs = {"MAP": logits[name].softmax(1), "evidence": pairwise_log_probs(logits[name], covariance[name]).exp()}
        probs |= {key: (logits[name] / t).softmax(1) for key, t in temperatures.items()}
        probs |= {key: rules.averaged(logits[name], z * covariance[name], each) for key, each in weights.items()}
        results[name] = {key: rules.measured(value, labels[name]) for key, value in probs.items()}
        results[name] = {**known.get("results", {}).get(name, {}), **results[name]}
    return {
        "cell": model.cell,
        "seed": model.seed,
        "n": n,
        "classes": c,
        "weights": jacobian.shape[2],
        "train_nll": train_nll,
        "train_accuracy": float((logits["train"].argmax(1) == y).double().mean()),
        "l0": evidence.precision,
        "z": z,
        "temperatures": {**known.get("temperatures", {}), **temperatures},
        "refits": {**known.get("refits", {}), **found},
        "grids": {**known.get("grids", {}), **grids},
        "results": results,
        "seconds": time.perf_counter() - start + known.get("seconds", 0),
    }


def described(features: Features, fit: Refit, labels: Tensor) -> dict[str, float]:
    """Numbers of a refit; `prior_variance` is the mean one of a centred logit."""
    return {
        "prior_variance": features.scale / fit.precision,
        "train_nll": fit.train_nll,
        "loo_nll": predictive_nll(fit, labels),
        "loo_plug_in_nll": rules.measured(fit.loo.softmax(1), labels)["nll"],
        "loo_accuracy": float((fit.loo.argmax(1) == labels).double().mean()),
        "T": rules.temperature(fit.loo, labels),
    }


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
    earlier = json.loads(arguments.add.read_text(encoding="utf-8"))["models"] if arguments.add else []
    known = {(record["cell"], record["seed"]): record for record in earlier}
    records: list[dict[str, Any]] = []
    with tqdm(total=len(seeds) * sum(len(family.moments) for family in chosen), desc="models") as bar:
        for family in chosen:
            for seed in seeds:
                for model in family.make(seed):
                    bar.set_postfix_str(model.cell)
                    records.append(measure(model, known.get((model.cell, model.seed), {})))
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
        "models": [{key: value for key, value in record.items() if key != "grids"} for record in records],
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
