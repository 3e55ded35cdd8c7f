"""What the queries' losses become when the adapter is trained again on half of the examples: the truth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import problem


def subset(number: int) -> Tensor:
    """Half of the training examples, drawn by its number: sorted indices."""
    generator = torch.Generator().manual_seed(10_000 + number)
    return torch.randperm(problem.TRAIN, generator=generator)[: problem.TRAIN // 2].sort().values


def retrain(model: nn.Module, start: Sequence[Tensor], count: int, path: Path, starts: int) -> tuple[Tensor, Tensor]:
    """Members `[count, TRAIN]` bool and losses `[starts, count, QUERIES]`; what `path` has already is not done again.

    Args:
        model: comes back with other weights of its adapter.
        start: the adapter's weights that the model of the scores started from, and the first start here; the others
            have the input matrices drawn anew.
        count: of subsets.
        path: a line of JSON for each training.
        starts: to train every subset from.
    """
    done = {tuple(line["which"]): line["losses"] for line in _lines(path)}
    data, queries = problem.train_data(), problem.query_data()
    with path.open("a") as file:
        for which in tqdm([(s, k) for k in range(count) for s in range(starts)], desc="retraining", unit="model"):
            if which in done:
                continue
            rows = subset(which[1])
            problem.train(model, other_start(start, which[0]), (data[0][rows], data[1][rows]))
            with torch.no_grad():
                done[which] = problem.losses(model, queries).tolist()
            file.write(json.dumps({"which": which, "losses": done[which]}) + "\n")
            file.flush()
    members = torch.zeros(count, problem.TRAIN, dtype=torch.bool)
    for k in range(count):
        members[k, subset(k)] = True
    return members, torch.tensor([[done[s, k] for k in range(count)] for s in range(starts)])


def other_start(start: Sequence[Tensor], number: int) -> list[Tensor]:
    """The adapter's own start for 0; else with input matrices of the same size, drawn by the number."""
    if number == 0:
        return list(start)
    generator = torch.Generator().manual_seed(20_000 + number)
    return [x.std() * torch.randn(x.shape, generator=generator) if x.any() else x for x in start]


def _lines(path: Path) -> list[dict[str, list[float]]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
