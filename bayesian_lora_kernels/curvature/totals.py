"""What a pass over the data counts beside its sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bayesian_lora_kernels.curvature.repeats import joined, warn_of_repeats
from bayesian_lora_kernels.processes import Processes


@dataclass
class Totals:
    """Of all batches so far.

    Attributes:
        n_examples: that were counted.
        positions: that carry a loss, each as often as the weight of its example says.
        log_likelihood: of the labels; None: there were none.
        labelled: whether all batches had labels.
        sketch: of the examples, for `warn_of_repeats`.
        targets: outputs at these positions.
    """

    n_examples: int = 0
    positions: Tensor | float = 0
    log_likelihood: Tensor | float | None = None
    labelled: bool = True
    sketch: list[int] = field(default_factory=list)
    targets: Tensor | float = 0

    def of_all(self, processes: Processes) -> Totals:
        """Those of all processes together."""
        known = None if self.log_likelihood is None else float(self.log_likelihood)
        counts = self.n_examples, float(self.positions), float(self.targets)
        parts = processes.values([*counts, known, self.labelled, self.sketch])
        examples, positions, targets, likelihoods, labelled, sketches = zip(*parts, strict=True)
        warn_of_repeats(sketches)
        seen = [one for one in likelihoods if one is not None]
        likelihood = sum(seen) if seen else None
        return Totals(sum(examples), sum(positions), likelihood, all(labelled), targets=sum(targets))

    def state(self) -> dict[str, Any]:
        """See `Stateful`."""
        return vars(self)

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Stateful`."""
        vars(self).update(state)

    def join(self, state: Mapping[str, Any]) -> None:
        """See `Joining`."""
        other = Totals()
        other.restore(state)
        self.n_examples += other.n_examples
        self.positions, self.targets = self.positions + other.positions, self.targets + other.targets
        self.labelled &= other.labelled
        known = [one for one in (self.log_likelihood, other.log_likelihood) if one is not None]
        self.log_likelihood = sum(known[1:], known[0]) if known else None
        self.sketch = joined(self.sketch, other.sketch)


class Names(set[str]):
    """Of the layers that were called."""

    def state(self) -> list[str]:
        """See `Stateful`."""
        return sorted(self)

    def restore(self, state: Iterable[str]) -> None:
        """See `Stateful`."""
        self.update(state)

    join = restore
