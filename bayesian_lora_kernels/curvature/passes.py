"""Passes over the data of one fit: from a loader to captures and gradients, which a curvature is measured from."""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.curvature.checkpoint import Checkpoint
from bayesian_lora_kernels.curvature.factor_sums import Rows, checked_square_sums, not_finite
from bayesian_lora_kernels.curvature.identity import check_alike, identity
from bayesian_lora_kernels.curvature.likelihood import LIKELIHOODS
from bayesian_lora_kernels.curvature.repeats import sketch
from bayesian_lora_kernels.curvature.state import Stateful
from bayesian_lora_kernels.curvature.totals import Names, Totals
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.capture import Capture
from bayesian_lora_kernels.model.deferred import Deferred
from bayesian_lora_kernels.model.forward import Forward, model_device
from bayesian_lora_kernels.model.layers import LinearLayer
from bayesian_lora_kernels.model.measuring import measuring
from bayesian_lora_kernels.model.memory import default_budget, examples_within
from bayesian_lora_kernels.model.out_of_memory import Limit, ran_out
from bayesian_lora_kernels.model.pieces import captures
from bayesian_lora_kernels.model.reading import check_loader
from bayesian_lora_kernels.model.sharding import in_step, sharing
from bayesian_lora_kernels.posterior.curvature import CURVATURES, Curvature
from bayesian_lora_kernels.processes import ALONE, Processes


@dataclass(frozen=True)
class Fit:
    """What a fit found.

    Attributes:
        curvature: at unit noise, if there is any.
        n_examples: that it saw, whatever they weigh.
        log_likelihood: of their labels, at unit noise; None without labels.
        targets: how many numbers that is of, each as often as its weight says.
    """

    curvature: Curvature
    n_examples: int
    log_likelihood: float | None
    targets: float = 0.0


class Passes:
    """The model, its layers and the data stay the same over the passes of a fit.

    Attributes:
        layers: to measure.
        config: settings of the fit.
        checks: of numbers, which are looked at a batch later where the host would have to wait.
        n_examples: in the data, whatever they weigh, after the first pass.
        log_likelihood: of the labels, summed over the data, after the first pass; None without labels.

    Args:
        model: stays as it is.
        layers: see above.
        forward: from a batch to logits.
        loader: any iterable of batches.
        config: see above.
        progress: whether to show a progress bar.
        processes: that share the fit, each with batches of its own; totals are of all of them, and only the first shows
            a progress bar.
        checkpoint: what an earlier fit has counted, and where this one writes it down.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LinearLayer],
        forward: Forward,
        loader: Iterable[Any],
        config: LaplaceConfig,
        progress: bool = False,
        processes: Processes = ALONE,
        checkpoint: Checkpoint | None = None,
    ):
        self.processes, self.checkpoint = processes, checkpoint
        self.model, self.layers, self.forward = model, layers, forward
        self.loader, self.config, self.progress = loader, config, progress and processes.rank == 0
        self.likelihood = LIKELIHOODS[config.likelihood]()
        self._totals: Totals | None = None
        self._generators: dict[torch.device, torch.Generator] = {}
        self._limit = Limit(may_change=sharing(model) is ALONE)
        self.checks = Deferred()
        if checkpoint is not None and checkpoint.saved is not None:
            self.restore(checkpoint.saved)

    def state(self) -> dict[str, Any]:
        """What is no pass' own; see `Stateful`.

        Raises:
            ValueError: for what was wrong with a batch: nothing is written down that has not been looked at.
        """
        self.checks.end()
        return {
            "totals": None if self._totals is None else self._totals.state(),
            "generators": {device: one.get_state() for device, one in self._generators.items()},
            "examples": self._limit.examples,
            "findings": self.forward.findings.state(),
            "checks": (self.forward.checks.unchecked, self.forward.checks.steady),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Stateful`."""
        self._totals = None if state["totals"] is None else Totals(**state["totals"])
        for device, own in state["generators"].items():
            self._generator(device).set_state(own)
        self._limit.examples = state["examples"]
        self.forward.findings.restore(state["findings"])
        self.forward.checks.unchecked, self.forward.checks.steady = state["checks"]

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return model_device(self.model)

    @property
    def memory_budget(self) -> int:
        """Bytes."""
        return self.config.memory_budget or default_budget(self.device)

    @property
    def n_examples(self) -> int:
        """See the class."""
        return 0 if self._totals is None else self._totals.n_examples

    @property
    def targets(self) -> float:
        """See `Fit`, after the first pass."""
        return 0.0 if self._totals is None else float(self._totals.targets)

    @property
    def log_likelihood(self) -> float | None:
        """See the class."""
        if self._totals is None or not self._totals.labelled or self._totals.log_likelihood is None:
            return None
        return float(self._totals.log_likelihood)

    def captures(
        self, what: str, sums: Sequence[Stateful] | None = None, *, weight_gradients: bool = False
    ) -> Iterator[tuple[int, Capture]]:
        """One pass: every batch, in pieces that fit the memory budget, with its labels checked; the first pass counts.

        Args:
            what: the name of the pass, for the progress bar.
            sums: what the captures are added to before the next one is asked for, all of it; a checkpoint holds their
                state. None: a fit with a checkpoint is refused.
            weight_gradients: whether `backward` will be asked for those, for the memory.

        Yields:
            The number of the batch, and the captured forward pass of a piece of it.

        Raises:
            ValueError: for an empty loader, bad labels, logits that are not finite; the batch is named.
            torch.OutOfMemoryError: if one example alone does not fit; where several do not, they run in smaller pieces.
        """
        totals, self.checks = Totals(), Deferred()
        for index, given in in_step(self.model, self._batches(what, sums, totals)):
            self._limit.where = f"batch {index}: "
            try:
                batch = self.forward.read(given, self.device)
                if batch.size == 0:
                    continue
                if self.processes.size > 1 and self._totals is None:
                    totals.sketch = sketch(totals.sketch, batch)
                step = examples_within(self.config.memory_budget, batch, self.layers, weight_gradients=weight_gradients)
                for recorded in self._pieces(batch, step, functools.partial(self._count, index, totals)):
                    yield index, recorded
            except (ValueError, TypeError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"batch {index}: {error}") from error
            self.checks.end_batch()
        self.checks.end()
        if self.checkpoint is not None:
            self.checkpoint.end_pass([totals, *(sums or ())], self, self.loader)
        totals = totals.of_all(self.processes)
        if totals.n_examples == 0:
            raise ValueError("loader: expected at least one batch with at least one example, got none")
        if totals.positions == 0:
            raise ValueError(
                "mask: expected at least one position that carries a loss, got none in all of the data (a mask of all "
                "False, labels that are all -100, or weights that are all 0)"
            )
        self._totals = self._totals or totals

    def _batches(self, what: str, sums: Sequence[Stateful] | None, totals: Totals) -> Iterable[tuple[int, Any]]:
        """Those that are not counted yet, and their numbers."""
        if self.checkpoint is None:
            return enumerate(tqdm(self.loader, desc=what, unit="batch", leave=None, disable=not self.progress))
        if sums is None:
            raise ValueError(
                f"checkpoint: curvature={self.config.curvature!r} does not say what to keep of its sums; pass objects "
                "with state() and restore(state) to Passes.captures or weight_gradients (sums=...), or fit without"
            )
        length = len(self.loader) if isinstance(self.loader, Sized) else None

        def show(batches: Iterator[Any], counted: int) -> Iterable[Any]:
            return tqdm(
                batches, desc=what, unit="batch", leave=None, disable=not self.progress, total=length, initial=counted
            )

        return self.checkpoint.batches(what, self.loader, show, [totals, *sums], self)

    def _pieces(self, batch: Batch, step: int, accept: Callable[[Capture], Any]) -> Iterator[Capture]:
        for _, recorded in captures(
            self.layers, self.forward, batch, step, all_labels=True, limit=self._limit, accept=accept
        ):
            yield recorded

    def weight_gradients(self, what: str, sums: Sequence[Stateful] | None = None) -> Iterator[dict[str, Tensor]]:
        """One pass: gradients `{layer: [N, d_out, d_in]}` whose outer products `g g^T` add up to the curvature.

        Each is of some examples and one column of their Fisher; zero for a layer that was not called.

        Args:
            what: see `captures`.
            sums: see `captures`.

        Raises:
            ValueError: as `captures`; for a gradient that is not finite, and for a layer that was never called.
        """
        names = [layer.name for layer in self.layers]
        called = Names()
        for index, recorded in self.captures(what, None if sums is None else [called, *sums], weight_gradients=True):
            called |= recorded.inputs.keys()
            for part, gradients in self.backward(recorded, weight_gradients=names):
                gradients |= part.without_gradient()
                rows: dict[Hashable, Rows] = {name: (gradients[name].flatten(start_dim=1), None) for name in names}
                error = functools.partial(not_finite, what="gradient", where=f" in batch {index}")
                checked_square_sums(rows, self.checks, error)
                yield gradients
        self.check_called(called)

    def backward(
        self, recorded: Capture, weight_gradients: Collection[str] = (), skip: int = 0
    ) -> Iterator[tuple[Capture, dict[str, Tensor]]]:
        """The gradients of each column of the Fisher, one after the other; see `Capture.backward`.

        Where memory runs out, the columns that are left come of fewer examples at a time.

        Args:
            recorded: the examples.
            weight_gradients: see `Capture.backward`.
            skip: columns to leave out.

        Yields:
            The capture that the gradients are of, which is `recorded` or one of a part of it, and the gradients.
        """
        done, columns, column = skip, itertools.islice(self._columns(recorded), skip, None), None
        while True:
            before = self._drawn(recorded.logits.device)
            try:
                column = next(columns, None)
                if column is None:
                    return
                gradients = recorded.backward(
                    column[0], weight_gradients=weight_gradients, retain_graph=not column[1], checks=self.checks
                )
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                self._limit.halve(len(recorded.logits), error)
                break
            yield recorded, gradients
            done += 1
        self._generator(recorded.logits.device).set_state(before)
        del columns, column
        recorded.release()
        gc.collect()
        for part in self._pieces(recorded.batch, len(recorded.logits), self._check):
            yield from self.backward(part, weight_gradients, done)

    def _columns(self, recorded: Capture) -> Iterator[tuple[Tensor, bool]]:
        logits, mask, labels, _ = recorded.result
        return self.likelihood.cotangents(
            self.likelihood.shifted(logits.detach(), labels, recorded.batch.inputs),
            mask,
            labels,
            self._example_weights(recorded),
            fisher=self.config.fisher,
            samples=self.config.fisher_samples,
            generator=self._generator(logits.device),
        )

    def _example_weights(self, recorded: Capture) -> Tensor | None:
        """How often each of them counts, `[N]`; None: once."""
        return recorded.batch.weights

    def _generator(self, device: torch.device) -> torch.Generator:
        """Of the columns that are drawn."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.processes.seed(self.config.seed))
        return self._generators[device]

    def _drawn(self, device: torch.device) -> Tensor:
        """The state of its generator."""
        return self._generator(device).get_state()

    def check_clear(self, index: int) -> None:
        """Whether it is known of every layer which of its rows are padding, as a factor of the inputs demands.

        Raises:
            ValueError: if it is not; `index` is the number of the batch.
        """
        for name, reason in self.forward.findings.unclear.items():
            raise ValueError(
                f"batch {index}: {name}: {reason}, so that its factor A would count padding; pass batches without "
                "padding (one example each, or of equal length), or curvature='exact'"
            )

    def check_called(self, called: Collection[str]) -> None:
        """Whether every layer was called, on any process; all of them ask at once.

        Raises:
            ValueError: if one was not.
        """
        own = [i for i, layer in enumerate(self.layers) if layer.name not in called]
        nowhere = set.intersection(*map(set, self.processes.values(own)))
        missing = [layer.name for i, layer in enumerate(self.layers) if i in nowhere]
        if missing:
            raise ValueError(
                f"{', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}: never called by forward, or "
                "without effect on the logits, so the data say nothing about it (an adapter that is merged, disabled "
                "or not active?); leave it out with modules=..."
            )

    def _count(self, index: int, totals: Totals, recorded: Capture) -> None:
        self.checks.prefix = f"batch {index}: "
        added = self._check(recorded)
        self.checks.prefix = ""
        logits, mask, weights = recorded.logits, recorded.result.mask, self._example_weights(recorded)
        counted: Tensor | int
        if weights is None:
            counted = len(logits) if mask is None else mask.sum()
        else:
            counted = (weights.double() if mask is None else weights.double().to(mask.device) * mask.sum(dim=1)).sum()
        totals.positions = totals.positions + counted
        totals.targets = totals.targets + counted * logits.shape[-1]
        totals.n_examples += len(logits)
        if added is None:
            totals.labelled = False
        else:
            totals.log_likelihood = added if totals.log_likelihood is None else totals.log_likelihood + added

    def _check(self, recorded: Capture) -> Tensor | None:
        """Checks logits and labels; the log-likelihood of the labels, if there are any."""
        logits, mask, labels, _ = recorded.result
        bad = ~torch.isfinite(logits.detach())
        bad = (bad if mask is None else bad & mask[..., None]).any().reshape(1)
        self.checks.add(bad, lambda _: ValueError("the logits are not finite (NaN or infinity)"))
        self.likelihood.check_logits(logits)
        labels = self.likelihood.implied_labels(logits) if labels is None else labels
        if labels is None:
            return None
        labels = self.likelihood.check_labels(logits, labels, self.checks)
        recorded.result = recorded.result._replace(labels=labels)
        shifted = self.likelihood.shifted(logits.detach(), labels, recorded.batch.inputs, self.checks)
        each, weights = self.likelihood.log_likelihood(shifted, labels, mask), self._example_weights(recorded)
        return (each if weights is None else weights.to(each) * each).sum()


def fit_curvature(passes: Passes) -> Fit:
    """Measure the curvature that the configuration names.

    Raises:
        TypeError: for a loader that is a single batch.
        ValueError: for an empty loader, bad labels, logits, inputs or gradients that are not finite, a layer that is
            never called; the batch and the module are named. For processes that differ in settings, layers or weights,
            and a kind that knows nothing of other processes.
        RuntimeError: if another process failed, or did not come.
    """
    kind = CURVATURES[passes.config.curvature]
    if passes.processes.size > 1 and not kind.of_all_processes:
        raise ValueError(
            f"group: curvature={passes.config.curvature!r} measures the data of its own process only; fit it on one, "
            "or add up over data.processes in its measure and set of_all_processes = True"
        )
    check_loader(passes.loader)
    if kind.passes > 1 and isinstance(passes.loader, Iterator):
        raise ValueError(
            f"loader: {passes.config.curvature.upper()} goes over the data twice, expected an iterable that can start "
            "again (a DataLoader or a list), got an iterator"
        )
    if passes.processes.size > 1:
        own = identity(passes.model, passes.layers, passes.forward, passes.config)
        check_alike(passes.processes, own)
    with measuring(passes.model):
        curvature = kind.measure(passes)
    return Fit(curvature, passes.n_examples, passes.log_likelihood, passes.targets)
