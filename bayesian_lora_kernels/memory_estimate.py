"""How much memory a fit and a prediction will need, found by a dry run of both: what lives in it is counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.curvature.exact import FunctionSpaceCurvature
from bayesian_lora_kernels.curvature.factor_sums import ROWS_PER_COLUMN, stream_columns
from bayesian_lora_kernels.curvature.likelihood import LIKELIHOODS
from bayesian_lora_kernels.curvature.passes import Passes, fit_curvature
from bayesian_lora_kernels.curvature.rows import RowStore
from bayesian_lora_kernels.model.dry_run import DryRun, LiveBytes
from bayesian_lora_kernels.model.forward import Forward, ForwardFunction, model_device
from bayesian_lora_kernels.model.layers import LinearLayer, find_layers
from bayesian_lora_kernels.model.memory import default_budget, tokens_of
from bayesian_lora_kernels.posterior.curvature import CURVATURES, Curvature
from bayesian_lora_kernels.posterior.posterior import Posterior
from bayesian_lora_kernels.posterior.prior import Prior
from bayesian_lora_kernels.predictive.hidden_samples import HiddenSampler
from bayesian_lora_kernels.predictive.jvp import JacobianVectorProduct
from bayesian_lora_kernels.predictive.logits import LogitPredictor, Outputs
from bayesian_lora_kernels.predictive.vocabulary import vocabulary_posterior

MODEL, GRAPH, GRADIENTS = "model", "forward passes, with their graph", "captured inputs and gradients"
ROWS, LOSSES, OTHER = "exact's rows", "losses and their cotangents", "other"
# Of a tensor that is made in a file, or by what is called from there.
LABELS = {
    "model/forward.py": GRAPH,
    "model/hidden.py": GRAPH,
    "model/capture.py": GRADIENTS,
    "model/jacobians.py": GRADIENTS,
    "curvature/likelihood/base.py": LOSSES,
    "curvature/likelihood/classification.py": LOSSES,
    "curvature/likelihood/comparisons.py": LOSSES,
    "curvature/likelihood/regression.py": LOSSES,
    "model/checks.py": "checks of the model",
    "model/probe.py": "checks of the model",
    "model/padding.py": "checks of the model",
    "model/alone.py": "checks of the model",
    "curvature/factors.py": "factors and rows that wait for them",
    "curvature/factor_sums.py": "factors and rows that wait for them",
    "curvature/eigenvalues.py": "EKFAC's projections and sums",
    "curvature/rows.py": ROWS,
    "curvature/exact.py": "exact's Gram matrix and solutions",
    "posterior/kronecker.py": "eigenbases and posterior",
    "predictive/hidden_samples.py": "samples of weights and hidden states",
    "predictive/jvp.py": "samples of weights and hidden states",
    "predictive/vocabulary.py": "logits of the vocabulary",
    "predictive/sampled_logits.py": "logits of the vocabulary",
}
BATCHES = 16  # of a dry fit at most
Use = Literal["fit", "predict"]
Parts = Mapping[str, Mapping[str, int]]  # {device: {what: bytes}}
Peak = dict[torch.device, dict[str, int]]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a fit and a prediction need, when they need most; as a string, a table.

    Attributes:
        fit_parts: `{device: {what: bytes}}` at the moment of a fit at which the bytes on this device are most.
        predict_parts: the same of a prediction, with the posterior that it is made with.
        row_bytes: of `curvature="exact"`, that the fit keeps for each example; 0 of others.
        n_examples: for how many examples `exact`'s rows are in it; None: for none.
        file_bytes: of these rows, how many go to files.
        memory_budget: bytes, with which it was made.
    """

    fit_parts: Parts
    predict_parts: Parts
    row_bytes: int
    n_examples: int | None
    file_bytes: int
    memory_budget: int

    @property
    def fit(self) -> dict[str, int]:
        """`{device: bytes}` of a fit, the model among them."""
        return {device: sum(parts.values()) for device, parts in self.fit_parts.items()}

    @property
    def predict(self) -> dict[str, int]:
        """`{device: bytes}` of a prediction, model and posterior among them."""
        return {device: sum(parts.values()) for device, parts in self.predict_parts.items()}

    def as_dict(self) -> dict[str, Any]:
        """All of it, in values that JSON can hold."""
        return {**asdict(self), "fit": self.fit, "predict": self.predict}

    def __str__(self) -> str:
        lines = []
        for device in dict.fromkeys([*self.fit_parts, *self.predict_parts]):
            fit, predict = self.fit_parts.get(device, {}), self.predict_parts.get(device, {})
            lines.append(f"{device:<42}{'fit':>12}{'predict':>12}")
            for what in sorted({*fit, *predict}, key=lambda what: -max(fit.get(what, 0), predict.get(what, 0))):
                lines.append(f"  {what:<40}{readable(fit.get(what, 0)):>12}{readable(predict.get(what, 0)):>12}")
            lines.append(f"  {'together':<40}{readable(sum(fit.values())):>12}{readable(sum(predict.values())):>12}")
        if self.row_bytes:
            each = f"exact keeps {readable(self.row_bytes)} for each example of the fit"
            if self.n_examples is None:
                lines.append(f"{each}, which come to this; say with n_examples=... for how many")
            else:
                where = f", {readable(self.file_bytes)} of it in files" if self.file_bytes else ""
                lines.append(f"{each}, {readable(self.row_bytes * self.n_examples)} for {self.n_examples}{where}")
        lines.append(f"memory budget {readable(self.memory_budget)}")
        return "\n".join(lines)


def readable(size: int) -> str:
    """Bytes in a unit that suits them: `1.5 GB`."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size < 999.5 * scale else f"{size / scale:.0f} {unit}"
    return f"{size} B"


def estimate_memory(
    model: nn.Module,
    function: ForwardFunction | None,
    config: LaplaceConfig,
    prior: Prior,
    batch: Any,
    *,
    outputs: Outputs | Literal["vocabulary"] = None,
    differences: bool = False,
    n_examples: int | None = None,
    device: torch.device | None = None,
) -> MemoryEstimate:
    """See `LaplaceLoRA.memory_estimate`, whose parts these are."""
    if n_examples is not None and (isinstance(n_examples, bool) or not isinstance(n_examples, int) or n_examples < 1):
        raise ValueError(f"n_examples: expected a positive int or None, got {n_examples!r}")
    here, live = Path(__file__).parent, LiveBytes()
    dry = DryRun(live, {str(here / file): label for file, label in LABELS.items()}, OTHER, GRADIENTS)
    twin, device = dry.without_numbers(model, device, MODEL), device or model_device(model)
    budget = config.memory_budget or default_budget(device)
    subject = _Subject(dry, twin, function, replace(config, memory_budget=budget), prior, device)
    rows = _Rows(0, n_examples, budget)
    try:
        with dry:
            curvature, _ = subject.fit(batch)
            fit = live.peak
            if isinstance(curvature, FunctionSpaceCurvature):
                del curvature
                curvature, later, rows = subject.exact(batch, n_examples, budget)
                fit = max(fit, *later, key=lambda peak: sum(peak[device].values()))
            live.forget_peak()
            subject.predict(batch, curvature, outputs, differences)
    except RuntimeError as error:
        first = next(iter(str(error).splitlines()), "")
        raise RuntimeError(
            f"memory_estimate: the model does not run without the numbers of its weights ({type(error).__name__}: "
            f"{first}), so that what it needs can only be measured"
        ) from error
    return MemoryEstimate(_named(fit), _named(live.peak), rows.each, n_examples, rows.in_files, budget)


@dataclass(frozen=True)
class _Rows:
    """Bytes of exact's rows: for each example, and for those of the fit, if that is known."""

    each: int
    n_examples: int | None
    budget: int

    @property
    def all(self) -> int:
        return self.each * (self.n_examples or 0)

    @property
    def in_files(self) -> int:
        return self.all if self.all > self.budget else 0


class _Data(Passes):
    """Passes whose rows all stay in memory: there are no numbers for a file."""

    @property
    def memory_budget(self) -> int:
        """See `Passes`."""
        return 2**62


class _Subject:
    """What runs dry: a model without numbers, and the settings."""

    def __init__(
        self,
        dry: DryRun,
        model: nn.Module,
        function: ForwardFunction | None,
        config: LaplaceConfig,
        prior: Prior,
        device: torch.device,
    ):
        self.dry, self.model, self.config, self.prior, self.device = dry, model, config, prior, device
        masked = CURVATURES[config.curvature].masked
        answers = LIKELIHOODS[config.likelihood].answers
        self.forward = Forward(model, function, config.class_token_ids, masked, config.check, answers)
        self.layers: Sequence[LinearLayer] = find_layers(model, config.modules, self.forward.head_rows)

    def fit(self, batch: Any) -> tuple[Curvature, int]:
        """The curvature of some batches like this one, and of how many examples that is."""
        data = _Data(self.model, self.layers, self.forward, [batch] * self._batches(batch), self.config)
        return fit_curvature(data).curvature, data.n_examples

    def exact(self, batch: Any, n_examples: int | None, budget: int) -> tuple[Curvature, list[Peak], _Rows]:
        """The curvature of all examples, bytes at the peaks of the pass that leads there and of its end, and its rows.

        The pass has the model's first batches behind it, which `fit` has run, and with them their checks.
        """
        live = self.dry.live
        live.forget_peak()
        some, seen = self.fit(batch)
        assert isinstance(some, FunctionSpaceCurvature)
        peak, store, shapes = dict(live.peak), some.store, some.shapes
        column = store.read(slice(0, 1))
        rows = _Rows(column.nbytes * store.n_columns // seen, n_examples, budget)
        peak[self.device] = {**peak[self.device], ROWS: min(rows.all, budget)}
        size = round(store.n_rows * (n_examples or seen) / seen), store.n_columns
        like = torch.empty(size, dtype=column.dtype, device="meta")
        counted = rows.all > 0 and not rows.in_files
        widths = {name: store.width(name) for name in shapes}
        found = RowStore.of(widths, self.dry.empty(like, self.device, ROWS if counted else None))
        del some, store
        live.forget_peak()
        return FunctionSpaceCurvature(found, shapes, self.device), [peak, live.peak], rows

    def predict(
        self, batch: Any, curvature: Curvature, outputs: Outputs | Literal["vocabulary"], differences: bool
    ) -> None:
        """As `LaplaceLoRA.predict`; of a vocabulary, the probabilities."""
        posterior, budget = Posterior(curvature, self.prior), self.config.memory_budget
        if outputs is None and self.forward.head is not None and self.forward.class_token_ids is None:
            outputs = "vocabulary"
        if isinstance(outputs, str) and outputs == "vocabulary":
            jvp = JacobianVectorProduct()
            sampler = HiddenSampler(self.model, self.layers, self.forward, posterior, budget, jvp)
            vocabulary_posterior(sampler, batch).probs()
            return
        predictor = LogitPredictor(self.model, self.layers, self.forward, curvature.whole_jacobians, budget)
        parsed = self.forward.read(batch, self.device, labels=False)
        if isinstance(outputs, (Tensor, int, type(None))):  # the first pieces show what all the others need
            parsed = parsed.rows(0, min(parsed.size, 2 * predictor.examples_at_once(parsed, outputs)))
            if isinstance(outputs, Tensor) and outputs.ndim == 2:
                outputs = outputs[: parsed.size]
        predictor.predict(parsed, outputs, [posterior], differences)

    def _batches(self, given: Any) -> int:
        """How many batches of a fit show all that it ever holds: until wide factors have taken their first rows."""
        widths = {width for layer in self.layers for width in layer.shape}
        columns = max((stream_columns(self.config, width) or 0 for width in widths), default=0)
        batch = self.forward.read(given)
        rows = batch.size * (tokens_of(batch) if self.config.tokens == "expand" else 1)
        return max(2, min(math.ceil(ROWS_PER_COLUMN * columns / rows) + 1, BATCHES))


def _named(peak: Mapping[torch.device, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    return {str(device): {what: size for what, size in parts.items() if size} for device, parts in peak.items()}
