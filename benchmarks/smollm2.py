"""What a posterior over SmolLM2-135M costs, beside a training step, bayesian_lora and laplace-lora.

    make .venv/.llm .venv/.peers                                     # the model, and bayesian_lora
    python -m benchmarks.smollm2 --json FILE [--sources FOLDER]      # FOLDER has a checkout laplace-lora

LoRA r = 8 on q_proj and v_proj, batches of 8 texts of 64 tokens without padding, two logits, float32. Every job runs in
a process of its own, one after the other: once to warm up, then `--rounds` times for the seconds, then once for the
peak of memory above what model, posterior and data take. A package that cannot do a job says why in its row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from bayesian_lora_kernels import LaplaceLoRA

from .peak_memory import measurable, peak_bytes
from .peer_worker import JOBS as PEERS
from .peer_worker import Rows, Wrapped
from .workload import SMOLLM2, environment, published_fit

FIT_BATCHES = 4
RANK = 10  # of factors as published

Job = Callable[[], object]


def training_step() -> Job:
    """Forward, backward and AdamW, as fine-tuning does for every batch."""
    model, batch = SMOLLM2.model().train(), SMOLLM2.batches(1)[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def job() -> None:
        output = model(batch["input_ids"], batch["attention_mask"], use_cache=False, logits_to_keep=1)
        loss = cross_entropy(output.logits[:, -1, SMOLLM2.class_token_ids], batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return job


def fit(**settings: Any) -> Job:
    """Of all batches, by this package."""
    laplace = LaplaceLoRA(SMOLLM2.model(), class_token_ids=SMOLLM2.class_token_ids, **settings)
    batches = SMOLLM2.batches(FIT_BATCHES)
    return lambda: laplace.fit(batches, progress=False)


def predict(**settings: Any) -> Job:
    """One batch, by this package: mean and covariance of the logits, or of their difference."""
    differences = settings.pop("differences", False)
    laplace = LaplaceLoRA(SMOLLM2.model(), class_token_ids=SMOLLM2.class_token_ids, **settings)
    laplace.fit(SMOLLM2.batches(FIT_BATCHES), progress=False)
    batch = SMOLLM2.batches(1, seed=2)[0]
    return lambda: laplace.predict(batch, differences=differences)


def fit_of_bayesian_lora() -> Job:
    """Its pass over all batches, which sees the last token only."""
    model, batches = SMOLLM2.model(), SMOLLM2.batches(FIT_BATCHES)
    return lambda: published_fit(model, batches, RANK, SMOLLM2.class_token_ids)


def fit_of_laplace_lora() -> Job:
    """Its K-FAC fit of all batches."""
    from laplace import Laplace

    loader = torch.utils.data.DataLoader(Rows(SMOLLM2, FIT_BATCHES), batch_size=SMOLLM2.examples)

    settings = {"prior_precision": 1.0, "subset_of_weights": "all", "hessian_structure": "kron"}
    model = Wrapped(SMOLLM2)
    return lambda: Laplace(model, "classification", **settings).fit(loader)


# {name: (batches, job)}; the time is given for one batch
JOBS: dict[str, tuple[int, Callable[[], Job]]] = {
    "training step": (1, training_step),
    "fit, K-FAC, one sampled label": (FIT_BATCHES, lambda: fit(fisher="mc")),
    "fit, K-FAC": (FIT_BATCHES, fit),
    "fit, EKFAC": (FIT_BATCHES, lambda: fit(curvature="ekfac")),
    "fit, exact": (FIT_BATCHES, lambda: fit(curvature="exact")),
    "predict, K-FAC": (1, predict),
    "predict, K-FAC, the difference": (1, lambda: predict(differences=True)),
    "predict, exact, the difference": (1, lambda: predict(curvature="exact", differences=True)),
    "bayesian_lora: fit, last token": (FIT_BATCHES, fit_of_bayesian_lora),
    "bayesian_lora: predict": (1, lambda: PEERS["bayesian_lora"](SMOLLM2, "theirs", 2)),
    "the same by this package": (1, lambda: PEERS["bayesian_lora"](SMOLLM2, "ours", 2)),
    "laplace-lora: fit": (FIT_BATCHES, fit_of_laplace_lora),
    "laplace-lora: predict": (1, lambda: PEERS["laplace_lora"](SMOLLM2, "theirs", 2)),
}


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Of one job, in this process."""
    batches, make = JOBS[name]
    job = make()
    job()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        job()
        seconds.append((time.perf_counter() - start) / batches)
    return {"seconds": seconds, "peak_bytes": peak_bytes(job) if measurable() else None}


def in_a_process(name: str, rounds: int, limit: float, sources: Path | None) -> dict[str, Any]:
    """What `measure` says, or `{"error": why}`."""
    if name.startswith("laplace-lora") and (sources is None or not (sources / "laplace-lora" / "laplace").is_dir()):
        return {"error": "no checkout of laplace-lora: --sources names no folder that has one"}
    path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    if name.startswith("laplace-lora"):
        path.insert(0, str(sources / "laplace-lora"))  # type: ignore[operator]
    command = [sys.executable, "-m", __spec__.name, "--job", name, "--rounds", str(rounds)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:.0f} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    step = results["training step"]
    lines = [
        "| of a batch of 8 texts | median s | of a training step | peak MiB | of a training step |",
        "|---|---|---|---|---|",
    ]
    for name, row in results.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | |")
            continue
        median, share = (statistics.median(one["seconds"]) for one in (row, step))
        peak, whole = row["peak_bytes"] or 0, step["peak_bytes"] or 1
        lines.append(f"| {name} | {median:.2f} | {median / share:.2f} | {peak / 2**20:,.0f} | {peak / whole:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="of one job; default: 600")
    parser.add_argument(
        "--sources", type=Path, default=os.environ.get("BLK_PEER_SOURCES"), metavar="FOLDER", help="has laplace-lora"
    )
    parser.add_argument("--job", choices=list(JOBS), help="only this one, in this process")
    arguments = parser.parse_args()
    if arguments.job:
        warnings.simplefilter("ignore")
        answers, sys.stdout = sys.stdout, sys.stderr  # what packages print is not an answer
        print(json.dumps(measure(arguments.job, arguments.rounds)), file=answers)
        return
    results = {}
    for i, name in enumerate(JOBS):
        print(f"{i + 1}/{len(JOBS)} {name}", file=sys.stderr, flush=True)
        results[name] = in_a_process(name, arguments.rounds, arguments.limit, arguments.sources)
    print(table(results))
    if arguments.json:
        content = {
            "environment": environment(),
            "workload": asdict(SMOLLM2),
            "fit_batches": FIT_BATCHES,
            "rounds": arguments.rounds,
            "results": results,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
