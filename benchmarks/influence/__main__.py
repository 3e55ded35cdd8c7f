"""Influence against retraining on subsets: `python -m benchmarks.influence WORK [--peers PYTHON] [--results FOLDER]`.

WORK keeps the model, a line for each retrained model and the scores of each method: started again, it goes on where it
was. The peers need an interpreter that has kronfluence and bergson beside this package's requirements.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..workload import environment
from . import ours, problem, report, retraining
from .worker import BATCH, METHODS, OURS, PEERS

RANKS = (16, 64, 128, 240)  # of indexes
ROOT = Path(__file__).resolve().parents[2]


def save_model(folder: Path) -> None:
    """The base model, its tokenizer, the adapter's start, and the adapter trained on all of the data."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model: Any = problem.untrained()
    base = copy.deepcopy(model).unload()
    base.save_pretrained(folder / "base")
    words = {f"t{i}": i for i in range(problem.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0").save_pretrained(folder / "base")
    start = [p.detach().clone() for p in problem.adapter(model)]
    problem.train(model, start, problem.train_data())
    model.peft_config["default"].base_model_name_or_path = str((folder / "base").resolve())
    model.save_pretrained(folder / "adapter")
    torch.save(start, folder / "start.pt")  # last: all of it is there


def run_method(name: str, python: str, folder: Path) -> None:
    """Its scores into a folder of its own, unless they are there."""
    own = folder / name.replace(" ", "-")
    if (own / "costs.json").exists():
        return
    own.mkdir(exist_ok=True)
    command = [python, "-m", "benchmarks.influence.worker", name, str(folder.resolve()), str(own.resolve())]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder for what can be gone on with")
    parser.add_argument("--subsets", type=int, default=120)
    parser.add_argument("--starts", type=int, default=1, help="of each training, whose losses are averaged")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter with kronfluence and bergson")
    parser.add_argument("--results", type=Path, help="folder for influence.json and influence.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not (arguments.work / "start.pt").exists():
        save_model(arguments.work)
    for name in METHODS:
        if name in OURS or arguments.peers:
            run_method(name, sys.executable if name in OURS else arguments.peers, arguments.work)
    result = evaluate(arguments.work, arguments.subsets, arguments.starts, bool(arguments.peers))
    result["command"] = f"python -m benchmarks.influence WORK --subsets {arguments.subsets} --starts {arguments.starts}"
    if arguments.peers:
        result["command"] += " --peers PYTHON"
        result["versions"] = {name: _version(arguments.peers, name) for name in ("kronfluence", "bergson")}
    print(text := report.table(result))
    if arguments.results is not None:
        (arguments.results / "influence.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.results / "influence.md").write_text(text)


def evaluate(work: Path, subsets: int, starts: int, peers: bool) -> dict[str, Any]:
    """Retrain what is missing, and compare all scores with it."""
    model = problem.load(work)
    with torch.no_grad():
        now = [problem.losses(model, data) for data in (problem.train_data(), problem.query_data())]
    start = torch.load(work / "start.pt")
    unpreconditioned = ours.gradients_only(model, BATCH)
    indexes = {
        curvature: ours.from_indexes(ours.fitted(model, curvature, BATCH), BATCH, RANKS)
        for curvature in ("ekfac", "exact")
    }
    members, losses = retraining.retrain(model, start, subsets, work / "subsets.jsonl", starts)
    truth = losses.double().mean(dim=0)
    every, methods = {}, {}
    for name in METHODS if peers else OURS:
        folder = work / name.replace(" ", "-")
        scores = torch.load(folder / "scores.pt")
        every[name] = {key: report.datamodelling_scores(one, members, truth) for key, one in scores.items()}
        lds = {key: report.mean_and_error(values) for key, values in every[name].items()}
        methods[name] = {"lds": lds, "costs": json.loads((folder / "costs.json").read_text())}
    controls = {"random scores": ours.random_scores(), "inner products of gradients": unpreconditioned}
    result = {
        "environment": environment(),
        "problem": (
            f"A Llama of two layers, {sum(p.numel() for p in problem.adapter(model)):,} weights of LoRA, is trained on "
            f"{problem.TRAIN} examples (mean loss {float(now[0].mean()):.2f}; of the queries, "
            f"{float(now[1].mean()):.2f}). Each subset is half of them."
        ),
        "subsets": subsets,
        "starts": starts,
        "queries": problem.QUERIES,
        "spread_of_losses": float(truth.std(dim=0).mean()),
        "methods": methods,
        "controls": {
            name: report.mean_and_error(report.datamodelling_scores(one, members, truth))
            for name, one in controls.items()
        },
        "differences": {
            f"{name} less {other}, {key}": report.mean_and_error(
                report.best(every[name], key) - report.best(every[other], key)
            )
            for other in every
            if other in PEERS and other.endswith("EKFAC")
            for name in OURS
            for key in ("own", "1.0", "best")
        },
        "indexes": {
            f"{curvature}, rank {rank}": {
                "kept": kept,
                "lds": report.mean_and_error(report.datamodelling_scores(one, members, truth)),
            }
            for curvature, found in indexes.items()
            for rank, (kept, one) in found.items()
        },
    }
    if starts > 1:
        result["controls"]["losses from another start"] = report.mean_and_error(report.agreement(losses))
    return result


def _version(python: str, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
