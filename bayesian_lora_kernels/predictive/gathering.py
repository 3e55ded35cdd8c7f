"""Predictions of several processes, each of its own examples, put together on all of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from bayesian_lora_kernels.predictive.scoring import TokenScores
from bayesian_lora_kernels.processes import Processes

Logits = tuple[Tensor, list[Tensor], Tensor | None]  # as `LogitPredictor.predict` returns them


def gather_logits(processes: Processes, own: Logits | None, device: torch.device) -> Logits:
    """Means, covariances and indices of the examples of all processes, in the order of the ranks.

    Args:
        processes: that call this at once.
        own: None, where a process has no examples.
        device: of the result.

    Raises:
        ValueError: if nobody has examples, or if processes differ in the logits that they chose.
    """
    rows: dict[str, Tensor] = {}
    shared: list[int] | None = None
    if own is not None:
        means, (covariances,), indices = own
        rows = {"mean": means, "covariance": covariances}
        if indices is not None and indices.ndim == 2:
            rows["indices"] = indices
        elif indices is not None:
            shared = indices.tolist()
    known = [said["indices"] for said in processes.values({"some": own is not None, "indices": shared}) if said["some"]]
    if any(one != known[0] for one in known):
        raise ValueError(f"outputs: expected the same on all processes, got {' and '.join(map(str, known))}")
    found = _gather_rows(processes, rows, device, "predict")
    chosen = torch.tensor(known[0], device=device) if known[0] is not None else found.get("indices")
    return found["mean"], [found["covariance"]], chosen


def gather_scores(processes: Processes, own: TokenScores | None, device: torch.device) -> TokenScores:
    """Scores of the texts of all processes, in the order of the ranks, padded to the longest.

    Raises:
        ValueError: if nobody has texts.
    """
    rows = {} if own is None else own._asdict()
    return TokenScores(**_gather_rows(processes, rows, device, "score", pad=True))


def _gather_rows(
    processes: Processes, rows: Mapping[str, Tensor], device: torch.device, what: str, pad: bool = False
) -> dict[str, Tensor]:
    """Tensors `{name: [N, ...]}` of all processes, those without examples have none; `pad`: `[N, T]` by zeros."""
    kinds = {name: [str(value.dtype).removeprefix("torch."), list(value.shape[1:])] for name, value in rows.items()}
    some = [said for said in processes.values(kinds) if said]
    if not some:
        raise ValueError(f"{what}: expected at least one example, no process has any")
    found = {}
    for name in some[0]:
        if any(name not in said or len(said[name][1]) != len(some[0][name][1]) for said in some):
            raise ValueError(f"{what}: expected the same kind of outputs on all processes, got {some}")
        dtypes, shapes = zip(*(said[name] for said in some), strict=True)
        if not pad and any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"{what}: expected as many logits on all processes, got {' and '.join(map(str, shapes))}")
        shape = [max(sizes) for sizes in zip(*shapes, strict=True)]
        dtype = functools.reduce(torch.promote_types, [getattr(torch, one) for one in dtypes])
        own = rows[name] if name in rows else torch.zeros(0, *shape)
        # Not every backend knows booleans.
        full = torch.zeros(len(own), *shape, dtype=torch.uint8 if dtype == torch.bool else dtype, device=device)
        full[(slice(None), *map(slice, own.shape[1:]))] = own.to(full)
        found[name] = torch.cat(processes.gather(full)).to(dtype)
    return found
