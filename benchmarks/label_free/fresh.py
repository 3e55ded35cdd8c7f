"""The label-free rule on the study's tasks, which it had not seen: `python -m benchmarks.label_free.fresh`.

Takes the folder of a finished `python -m benchmarks.calibration.labels` (exact curvature) and its cache of models. The
rule is LOO (T, b) of docs/label-free.md, and LOO T, as they were; nothing is chosen here.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.calibration import paired_difference

from ..calibration.scores import scores
from ..calibration.tasks import make_task
from . import rules
from .__main__ import described, path
from .linearised import Evidence, Features, evidence_arguments, jacobians, map_weights

SPLITS = ("test", "shift")
NAMES = {"LOO-T": "LOO T", "LOO-Tb": "LOO (T, b)"}


def measure(record: dict[str, Any], file: Path, cache: Path) -> dict[str, Any]:
    """Scores of both rules on one model of the study."""
    start = time.perf_counter()
    task = make_task(record["task"], cache)
    splits = task.make(record["seed"])
    model = task.fine_tune(splits.train, record["seed"])
    saved = load_file(file)
    logits, labels = saved["train/logits"].double(), saved["train/labels"]
    tuned = LaplaceLoRA(
        model, task.forward, task.class_token_ids, curvature="exact", likelihood="regression", fisher="exact"
    )
    batches = [{key: value for key, value in batch.items() if key != "labels"} for batch in task.batches(splits.train)]
    jacobian = jacobians(tuned, batches, logits.shape[1])
    features = Features.of(jacobian)
    evidence = Evidence.of(features, logits, labels, **evidence_arguments(tuned))
    around = features.around(logits, jacobian, map_weights(tuned))
    del jacobian
    fits = path(around, labels)
    numbers = [described(around, fit, labels) for fit in fits]
    best = min(range(len(fits)), key=lambda i: numbers[i]["loo_nll"])
    temperature = rules.temperature(fits[best].loo, labels)
    z = record["facts"]["variance_scale"]
    weight = rules.weights(fits[best].loo, z * evidence.cavities(), labels)
    found: dict[str, Any] = {}
    for split in SPLITS:
        values = saved[f"{split}/logits"].double()
        probs = {
            "LOO-T": (values / temperature).softmax(1),
            "LOO-Tb": rules.averaged(values, z * saved[f"{split}/covariance"].double(), weight),
        }
        found[split] = {name: scores(one, saved[f"{split}/labels"]) for name, one in probs.items()}
    return {
        "task": record["task"],
        "seed": record["seed"],
        "z": {"study": z, "here": evidence.factor},
        "refit": numbers[best],
        "scores": found,
        "map": {split: record["scores"][split]["map"]["0"] for split in SPLITS},
        "temperature": {split: record["scores"][split]["temperature"]["100"] for split in SPLITS},
        "seconds": time.perf_counter() - start,
    }


def table(records: list[dict[str, Any]]) -> str:
    lines = [
        "NLL / ECE, and the paired differences in NLL: mean ± standard error (share of models better).",
    ]
    tasks = [*dict.fromkeys(record["task"] for record in records), "all"]
    for split in SPLITS:
        lines += [
            "",
            split,
            "",
            "| task | MAP | T, 100 labels | "
            + " | ".join(f"{name} | less MAP | less T" for name in NAMES.values())
            + " |",
            "|---" * (3 + 3 * len(NAMES)) + "|",
        ]
        for task in tasks:
            own = [record for record in records if task in ("all", record["task"])]
            cells = [task, *(_level([record[key][split] for record in own]) for key in ("map", "temperature"))]
            for name in NAMES:
                ours = [record["scores"][split][name] for record in own]
                cells.append(_level(ours))
                cells += [_difference(ours, [record[key][split] for record in own]) for key in ("map", "temperature")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _level(rows: list[dict[str, float]]) -> str:
    return " / ".join(f"{statistics.fmean(row[key] for row in rows):.3f}" for key in ("nll", "ece"))


def _difference(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> str:
    found = paired_difference([row["nll"] for row in ours], [row["nll"] for row in theirs])
    error = "" if found.standard_error is None else f" ± {found.standard_error:.3f}"
    worse = found.standard_error is not None and found.mean > found.standard_error
    return f"{found.mean:+.3f}{error} ({found.share_lower:.0%}){' *' if worse else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.label_free.fresh", description=__doc__)
    parser.add_argument("--study", type=Path, required=True, metavar="FOLDER", help="--out of the study")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="--cache of the study; default: in its folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for fresh.json and fresh.md")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / "fresh.json"
    done = json.loads(target.read_text(encoding="utf-8")) if target.exists() else []
    known = {(record["task"], record["seed"]) for record in done}
    for file in sorted((arguments.study / "models").glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if (record["task"], record["seed"]) in known:
            continue
        done.append(measure(record, file.with_suffix(".safetensors"), arguments.cache or arguments.study / "cache"))
        target.write_text(json.dumps(_plain(done), indent=1) + "\n", encoding="utf-8")
        print(f"{record['task']} {record['seed']}: {done[-1]['seconds']:.0f} s", flush=True)
    text = table(done)
    (arguments.out / "fresh.md").write_text(text, encoding="utf-8")
    print(text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
