"""The two Kronecker factors of every layer, from sums of outer products of its inputs and output gradients."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.curvature.factor_sums import FactorSum, FactorSums, not_finite, stream_columns
from bayesian_lora_kernels.curvature.reduction import SumOfAll, merged, reduce
from bayesian_lora_kernels.model.capture import LayerInput
from bayesian_lora_kernels.model.deferred import AT_ONCE, AtOnce
from bayesian_lora_kernels.model.layers import LinearLayer
from bayesian_lora_kernels.model.masks import last_valid
from bayesian_lora_kernels.ops.checks import accumulate_dtype
from bayesian_lora_kernels.posterior.kronecker import KroneckerFactors
from bayesian_lora_kernels.processes import Processes


class KroneckerSums:
    """The factors of all layers while the data passes by.

    Layers that saw the same tensor share one input factor. The sharing is read off each batch; should a batch break it,
    the layers part with the sum they had in common.
    """

    def __init__(self, config: LaplaceConfig):
        self.config = config
        self._sums = FactorSums(config)
        self._group: dict[str, int] = {}
        # Rows of each batch, or their weight; what a mask or weights count stays on its device.
        self._counts: dict[int, list[float | Tensor]] = {}

    def add_inputs(
        self,
        inputs: Mapping[str, LayerInput],
        checks: AtOnce = AT_ONCE,
        where: str = "",
        weights: Tensor | None = None,
    ) -> None:
        """Add one batch's inputs, each example as often as its weight `[N]` says.

        Raises:
            ValueError: for a layer whose input is not finite, when `checks` look; it ends with `where`.
        """
        self._regroup(inputs)
        rows: dict[Hashable, tuple[Tensor, Tensor | None]] = {}
        names: dict[Hashable, str] = {}
        counts: dict[int, Tensor] = {}  # of the masks, which most layers share
        for name, (a, mask, _) in inputs.items():
            group = self._group[name]
            if ("a", group) in names:
                continue
            names["a", group] = name
            x, counted = rows["a", group] = token_rows(a, mask, self.config.tokens, mean=True)
            if weights is not None:
                each = weights.to(x.device, torch.float64).repeat_interleave(len(x) // len(weights))
                rows["a", group] = each.to(accumulate_dtype(x)).sqrt()[:, None] * x, counted
                count = (each if counted is None else each.masked_fill(~counted, 0)).sum()
                self._counts.setdefault(group, []).append(count)
                continue
            if counted is not None and id(mask) not in counts:
                counts[id(mask)] = counted.sum()
            self._counts.setdefault(group, []).append(len(x) if counted is None else counts[id(mask)])
        self._sums.add(rows, checks, lambda key: not_finite(names[key], "input", where))

    def add_gradients(
        self,
        gradients: Mapping[str, Tensor],
        inputs: Mapping[str, LayerInput],
        checks: AtOnce = AT_ONCE,
        where: str = "",
    ) -> None:
        """Add one backward pass's output gradients.

        Raises:
            ValueError: for a layer whose gradient is not finite, when `checks` look; it ends with `where`.
        """
        names: dict[Hashable, str] = {("s", name): name for name in gradients}
        rows: dict[Hashable, tuple[Tensor, Tensor | None]] = {
            key: token_rows(gradients[name], inputs[name].mask, self.config.tokens, mean=False)
            for key, name in names.items()
        }
        self._sums.add(rows, checks, lambda key: not_finite(names[key], "output gradient", where))

    @property
    def input_rows(self) -> dict[str, float]:
        """How many rows (tokens, or examples) the A of each layer is the mean of, each as often as its weight says."""
        of_group = _summed(self._counts)
        return {name: of_group[group] for name, group in self._group.items()}

    def reduce(self, processes: Processes, layers: Sequence[LinearLayer]) -> None:
        """The sums and counts of all processes, on each of them, bit for bit the same.

        Layers share an input factor from then on if the data of all processes let them.

        Args:
            processes: each of which added other data, or none.
            layers: all that there are, in the same order everywhere.
        """
        if processes.size == 1:
            return
        self._sums.flush()
        rows, before = self.input_rows, self._sums.sums
        said = processes.values([self._said(layer.name, rows) for layer in layers])
        self._group, self._counts, self._sums.sums = {}, {}, {}
        groups: dict[tuple[int | None, ...], int] = {}
        sums: list[SumOfAll] = []
        for layer, parts in zip(layers, zip(*said, strict=True), strict=True):
            if not any(parts):
                continue  # called nowhere
            together = tuple(part and part["group"] for part in parts)
            self._group[layer.name] = group = groups.setdefault(together, len(groups))
            self._counts[group] = [sum(part["rows"] for part in parts if part)]
            d_out, d_in = layer.shape
            for key, own, width in (
                (("a", group), ("a", together[processes.rank]), d_in),
                (("s", layer.name), ("s", layer.name), d_out),
            ):
                if key in self._sums.sums:
                    continue
                total = before.get(own) or FactorSum(width, stream_columns(self.config, width))
                if any(total is one.own for one in sums):
                    total = total.clone()
                self._sums.sums[key] = total
                sums.append(SumOfAll(total, [part and part[key[0]] for part in parts], layer.device))
        reduce(processes, sums)

    def _said(self, name: str, rows: Mapping[str, float]) -> dict[str, Any] | None:
        """What other processes need to know of this one's sums of a layer; None: there are none."""
        if name not in self._group:
            return None
        group = self._group[name]
        matrices = {side: self._sums.sums[key].matrix for side, key in (("a", ("a", group)), ("s", ("s", name)))}
        dtypes = {side: str(m.dtype).removeprefix("torch.") for side, m in matrices.items() if m is not None}
        return {"group": group, "rows": rows[name], **dtypes}

    def factors(self) -> dict[str, KroneckerFactors]:
        """The finished factors: A a mean over tokens (or examples), S a sum. Shared inputs share their tensor."""
        scales: dict[Hashable, float] = {("s", name): 1.0 for name in self._group}
        scales |= {("a", self._group[name]): 1.0 / rows if rows else 1.0 for name, rows in self.input_rows.items()}
        finished = self._sums.finish(scales)
        result = {}
        for name, group in self._group.items():
            (a, tail_a), (s, tail_s) = finished["a", group], finished["s", name]
            result[name] = KroneckerFactors(a, s, tail_a, tail_s)
        return result

    def state(self) -> dict[str, Any]:
        """See `Stateful`."""
        return {"groups": self._group, "counts": _summed(self._counts), "sums": self._sums.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Stateful`."""
        self._group = dict(state["groups"])
        self._counts = {group: [count] for group, count in state["counts"].items()}
        self._sums.restore(state["sums"])

    def join(self, state: Mapping[str, Any]) -> None:
        """See `Stateful`."""
        other, before = KroneckerSums(self.config), self._sums.sums
        other.restore(state)
        self._sums.flush()
        other._sums.flush()
        rows, more = self.input_rows, other.input_rows
        pairs = {name: (self._group.get(name), other._group.get(name)) for name in {**self._group, **other._group}}
        groups = {pair: group for group, pair in enumerate(dict.fromkeys(pairs.values()))}
        self._counts = {groups[pair]: [rows.get(name, 0) + more.get(name, 0)] for name, pair in pairs.items()}
        self._sums.sums = {}
        for name, pair in pairs.items():
            self._group[name] = groups[pair]
            for key, own, theirs in (("a", groups[pair]), ("a", pair[0]), ("a", pair[1])), (("s", name),) * 3:
                if key not in self._sums.sums:
                    parts = [one for one in (before.get(own), other._sums.sums.get(theirs)) if one is not None]
                    self._sums.sums[key] = merged(parts)

    def _regroup(self, inputs: Mapping[str, LayerInput]) -> None:
        """Groups as fine as this batch demands: equal group before, equal tensor now."""
        placed: dict[tuple[int | None, object], int] = {}
        for name in dict.fromkeys([*self._group, *inputs]):
            before = self._group.get(name)
            now = inputs[name].key if name in inputs else None
            if (before, now) in placed:
                self._group[name] = placed[before, now]
                continue
            group = before
            if before is None or before in placed.values():  # new, or others kept the old group: take a copy along
                group = max(self._counts, default=-1) + 1
                self._counts[group] = list(self._counts.get(before, ())) if before is not None else []
                if before is not None:
                    self._sums.sums["a", group] = self._sums.sums["a", before].clone()
            assert group is not None
            placed[before, now] = self._group[name] = group


def _summed(counts: Mapping[int, Sequence[float | Tensor]]) -> dict[int, float]:
    """Sums of numbers of which some are on a device; there is one synchronisation per device."""
    tensors = {id(n): n for numbers in counts.values() for n in numbers if isinstance(n, Tensor)}
    known: dict[int, float] = {}
    for device in dict.fromkeys(n.device for n in tensors.values()):
        here = {key: n for key, n in tensors.items() if n.device == device}
        known |= zip(here, torch.stack(list(here.values())).tolist(), strict=True)
    return {key: sum(known[id(n)] if isinstance(n, Tensor) else n for n in numbers) for key, numbers in counts.items()}


def token_rows(x: Tensor, mask: Tensor | None, tokens: str, *, mean: bool) -> tuple[Tensor, Tensor | None]:
    """Rows `[M, d]` that enter a factor, and their mask `[M]`, from `[N, T, d]`.

    `expand` takes every token; `reduce` one row per example, the mean (of inputs) or sum (of gradients) over its valid
    tokens; `last` the last valid token. An example without a valid token, such as a text without a labelled position
    where the output head only sees those, has no row that counts.
    """
    n, t, d = x.shape
    if tokens == "expand":
        return x.reshape(n * t, d), None if mask is None else mask.reshape(n * t)
    if tokens == "last":
        if mask is None:
            return x[:, -1], None
        return x[torch.arange(n, device=x.device), last_valid(x, mask)], mask.any(dim=1)
    counted = x if mask is None else x.masked_fill(~mask[:, :, None], 0)
    total = counted.sum(dim=1, dtype=accumulate_dtype(x))
    counts_at_all = None if mask is None else mask.any(dim=1)
    if not mean:
        return total, counts_at_all
    count = t if mask is None else mask.sum(dim=1, keepdim=True).clamp_min(1)
    return total / count, counts_at_all
