"""One package at one job, in a process of its own: `python -m benchmarks.compat` starts these and has them take turns.

Two of the peers are both called `laplace`, so that they cannot share a process. A worker builds the model and the
posterior, answers `ready`, and then obeys lines: `time` runs the job once and answers with the seconds, `peak` with the
bytes above what was resident before, `save FILE` keeps the result for comparison.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .peak_memory import peak_bytes
from .workload import Workload

Job = Callable[[], Tensor]


class Wrapped(nn.Module):
    """As laplace-lora's scripts wrap a causal LM (keywords), and laplace-torch's users (one mapping)."""

    def __init__(self, workload: Workload):
        super().__init__()
        self.model, self.ids = workload.model(), workload.class_token_ids

    def forward(self, data: Mapping[str, Tensor] | None = None, **kwargs: Tensor) -> Tensor:
        inputs = {key: value for key, value in (data or kwargs).items() if key != "labels"}
        return self.model(**inputs).logits[:, -1, self.ids]


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """`count` batches of the workload, example by example."""

    def __init__(self, workload: Workload, count: int):
        batches = workload.batches(count)
        self.columns = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: value[i] for key, value in self.columns.items()}


def bayesian_lora(workload: Workload, package: str, seed: int) -> Job:
    """Jacobian and variance, with roots of factors that both take: random ones, which cost what others would."""
    import transformers

    if package == "ours":
        from bayesian_lora_kernels.compat import bayesian_lora as source
    else:
        import bayesian_lora.main as source
    model, batch = workload.model(), workload.batches(1, seed)[0]
    inputs = transformers.BatchEncoding({key: value for key, value in batch.items() if key != "labels"})
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lora" in name:
            small = torch.randn(workload.lora_rank, workload.lora_rank, generator=generator).tril()
            wide = torch.randn(max(module.weight.shape), workload.kept, generator=generator)
            factors[name] = (wide, small) if "lora_A" in name else (small, wide)
    ids = workload.class_token_ids

    def job() -> Tensor:
        with torch.no_grad():
            if package == "ours":
                jacobian, _ = source.jacobian_mean(model, inputs, ids)
            else:  # its own way to choose logits raises NameError
                jacobian, _ = source.jacobian_mean(model, inputs, output_callback=lambda o: o.logits[:, -1, ids])
            one = torch.tensor(1.0)
            arguments = (workload.classes, workload.lora_rank, workload.kept, "cpu")
            covariance: Tensor = source.variance(inputs, jacobian, factors, one, *arguments)
            return covariance

    return job


def laplace_torch(workload: Workload, package: str, seed: int) -> Job:
    """`backend.jacobians` of a wrapped causal LM."""
    from laplace.curvature import CurvlinopsGGN

    from bayesian_lora_kernels.compat.laplace_torch import BlkGGN

    backend = (BlkGGN if package == "ours" else CurvlinopsGGN)(Wrapped(workload), "classification")
    batch = workload.batches(1, seed)[0]
    return lambda: backend.jacobians(batch)[0].detach()


def laplace_lora(workload: Workload, package: str, seed: int) -> Job:
    """`_glm_predictive_distribution` after a fit on 4 batches; theirs is a checkout on the path."""
    if package == "theirs":
        from laplace import Laplace
    else:
        from bayesian_lora_kernels.compat.laplace_lora import Laplace
    settings = {"scale": "published"} if package == "ours, published scale" else {}
    la = Laplace(
        Wrapped(workload),
        "classification",
        prior_precision=1.0,
        subset_of_weights="all",
        hessian_structure="kron",
        **settings,
    )
    la.fit(torch.utils.data.DataLoader(Rows(workload, 4), batch_size=workload.examples))
    batch = workload.batches(1, seed)[0]
    return lambda: la._glm_predictive_distribution(batch)[1]


JOBS = {"bayesian_lora": bayesian_lora, "laplace_torch": laplace_torch, "laplace_lora": laplace_lora}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=list(JOBS))
    parser.add_argument("package")
    parser.add_argument("workload", type=json.loads)
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # what the packages print is not an answer

    def answer(value: Any) -> None:
        print(value, file=answers, flush=True)

    job = JOBS[arguments.job](Workload(**arguments.workload), arguments.package, seed=2)
    job()
    answer("ready")
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "time":
            start = time.perf_counter()
            job()
            answer(time.perf_counter() - start)
        elif command == "peak":
            answer(peak_bytes(job))
        else:
            torch.save(job(), argument)
            answer("saved")


if __name__ == "__main__":
    main()
