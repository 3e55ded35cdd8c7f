"""The class that laplace-lora and BayesAdapt scripts construct:
`from bayesian_lora_kernels.compat.laplace_lora import Laplace` in place of `from laplace import Laplace`, or of
`from bayesadapt.laplace import Laplace`; `blk.patch("bayesadapt")` does the latter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from bayesian_lora_kernels.curvature.factors import KroneckerSums
from bayesian_lora_kernels.curvature.kfac import KroneckerCurvature
from bayesian_lora_kernels.laplace import LaplaceLoRA
from bayesian_lora_kernels.model.reading import MASK_KEYS, inputs_and_labels
from bayesian_lora_kernels.posterior.curvature import register
from bayesian_lora_kernels.posterior.kronecker import KroneckerFactors
from bayesian_lora_kernels.predictive.distribution import LogitPosterior
from bayesian_lora_kernels.predictive.probabilities import bridge_log_probs

STRUCTURES = {"kron": "kfac", "ekfac": "ekfac", "full": "exact"}
SCALES = ("correct", "published")
PUBLISHED = "kfac-published"  # the curvature's name in the engine and in files
_HIDDEN = "hidden "


class Laplace:
    """Laplace approximation of a wrapped model, which takes `**batch` and returns logits `[N, C]`.

    Args:
        model: the wrapper. Trainable weights in `nn.Linear` modules count; those in `modules_to_save` are left out.
        likelihood: `classification` or `regression`.
        subset_of_weights: `all`; freeze what should not count.
        hessian_structure: `kron`; also `ekfac`, and `full`, which is exact and never forms a `[P, P]` matrix.
        sigma_noise: 1.
        prior_precision: a number, or a tensor of one or of one for each layer; None: one for each layer, all 1.
        prior_mean: 0.
        temperature: 1.
        scale: `correct`: low-rank factors of the curvature summed over the data, padding left out. `published`: full
            factors in which A is divided by the number of examples instead of tokens, which makes the curvature T
            times too large, and padding counts.
        **settings: of `LaplaceLoRA` (`rank`, `tail`, `fisher`, `seed`, ...), for `correct`.

    Raises:
        ValueError: for another value where one is named above, and what `LaplaceLoRA` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str = "classification",
        subset_of_weights: str = "all",
        hessian_structure: str = "kron",
        sigma_noise: float = 1.0,
        prior_precision: float | Tensor | None = None,
        prior_mean: float = 0.0,
        temperature: float = 1.0,
        *,
        scale: str = "correct",
        **settings: Any,
    ):
        _check("subset_of_weights", subset_of_weights, ("all",), "freeze what should not count")
        _check("hessian_structure", hessian_structure, tuple(STRUCTURES))
        _check("scale", scale, SCALES)
        for name, value, only in (
            ("sigma_noise", sigma_noise, 1),
            ("prior_mean", prior_mean, 0),
            ("temperature", temperature, 1),
        ):
            _check(name, float(value), (only,))
        if scale == "published":
            if hessian_structure != "kron" or settings:
                raise ValueError('scale="published": expected hessian_structure="kron" and no other settings')
            settings = {"rank": None, "tail": False, "fisher": "exact", "curvature": PUBLISHED}
        self.model, self.likelihood, self.scale = model, likelihood, scale
        self.engine = LaplaceLoRA(
            model,
            forward=_call_wrapper,
            likelihood=likelihood,
            modules=_without_saved_modules(model),
            **{"curvature": STRUCTURES[hessian_structure], **settings},
        )
        self._layers = [layer.name for layer in self.engine.layers]
        self.prior_precision = torch.ones(len(self._layers)) if prior_precision is None else prior_precision
        self.n_outputs: int | None = None

    @property
    def prior_precision(self) -> Tensor:
        """`[1]`, or one for each layer in the order of the parameters. May be set, also to a number."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        tensor = torch.as_tensor(value).reshape(-1)
        tensor = tensor if tensor.is_floating_point() else tensor.float()
        if len(tensor) not in (1, len(self._layers)):
            layers = len(self._layers)
            raise ValueError(
                f"prior_precision: expected one number, or one for each of {layers} layers, got {len(tensor)}"
            )
        self.engine.prior_precision = self._for_engine(tensor.detach())
        self._prior_precision = tensor

    def _for_engine(self, precision: Tensor) -> Tensor | dict[str, Tensor]:
        if len(precision) == 1:
            return precision[0]
        return dict(zip(self._layers, precision.unbind(), strict=True))

    @property
    def n_layers(self) -> int:
        """Layers that count."""
        return len(self._layers)

    @property
    def n_params(self) -> int:
        """Weights that count."""
        return len(self.mean)

    @property
    def mean(self) -> Tensor:
        """The weights that count, as one vector."""
        return parameters_to_vector([p for layer in self.engine.layers for p in layer.parameters().values()]).detach()

    @property
    def n_data(self) -> int:
        """Examples that `fit` saw."""
        return self.engine.n_examples

    @property
    def log_likelihood(self) -> Tensor:
        """Of the labels, summed over the data."""
        value = self.engine.log_likelihood
        if value is None:
            raise RuntimeError("log_likelihood: fit saw batches without labels")
        return torch.tensor(value)

    def fit(self, train_loader: Iterable[Any], override: bool = True) -> None:
        """Measure the curvature at the current weights; the model comes back as it was.

        Args:
            train_loader: mappings with `labels`, or tuples `(mapping, labels)` or `(mapping, labels, question ids)`; a
                last batch may be smaller.
            override: True: a fit replaces the one before.

        Raises:
            ValueError: if `override` is False, and what `LaplaceLoRA.fit` raises.
        """
        _check("override", override, (True,), "fit on all of the data at once")
        self.engine.fit(_Prepared(train_loader, self.scale), progress=True)

    def log_marginal_likelihood(self, prior_precision: Tensor | None = None, sigma_noise: None = None) -> Tensor:
        """Differentiable in `prior_precision`, which is kept if it is given."""
        _check("sigma_noise", sigma_noise, (None,))
        if prior_precision is not None:
            self.prior_precision = prior_precision
        return self.engine.log_marginal_likelihood(self._for_engine(self._prior_precision))

    def optimize_prior_precision(
        self,
        method: str = "marglik",
        pred_type: str = "glm",
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float = 1.0,
        val_loader: Iterable[Any] | None = None,
        **others: Any,
    ) -> Tensor:
        """The best prior precision; later calls use it.

        Args:
            method: `marglik`, the maximum of the evidence, for each layer if the prior precision has one for each;
                `val_gd` or `CV`, the smallest negative log-likelihood of the probit predictive on `val_loader`, shared.
            pred_type: `glm`.
            n_steps: not used: the optimum is found, not approached.
            lr: not used.
            init_prior_prec: not used.
            val_loader: labelled batches.
            **others: `loss`, `link_approx`, `n_samples`, `verbose`, `log_prior_prec_min`, `log_prior_prec_max`,
                `grid_size`: not used.

        Returns:
            The prior precision, `[1]` or one for each layer.

        Raises:
            ValueError: for another method, or `val_gd` without data.
            TypeError: for other arguments.
        """
        _check("method", method, ("marglik", "val_gd", "CV"))
        _check("pred_type", pred_type, ("glm",))
        if unknown := set(others) - _UNUSED:
            raise TypeError(f"optimize_prior_precision: unexpected arguments {sorted(unknown)}")
        before = self._prior_precision
        if method == "marglik":
            self.engine.optimize_prior_precision(per_module=len(before) > 1)
        else:
            if val_loader is None:
                raise ValueError(f"val_loader: method={method!r} needs labelled batches, got None")
            self.engine.optimize_prior_precision("nll", val_loader=_Prepared(val_loader, self.scale))
        found = self.engine.prior_precision
        if isinstance(found, Mapping):
            values = torch.stack([found[name].cpu() for name in self._layers])
        else:
            values = found.cpu().expand(len(before))
        self.prior_precision = values.to(before)
        return self.prior_precision

    def calibrate(self, val_loader: Iterable[Any]) -> None:
        """Set the level of `predict(batch).probs()` by labels, as `LaplaceLoRA.calibrate`, which laplace-lora lacks.

        Args:
            val_loader: batches as for `fit`, of examples that the model was not trained on.
        """
        self.engine.calibrate(_Prepared(val_loader, self.scale))

    def _glm_predictive_distribution(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Mean `[N, C]` and covariance `[N, C, C]` of the logits."""
        prediction = self.predict(batch)
        return prediction.mean, prediction.covariance

    def predict(self, batch: Any) -> LogitPosterior:
        """The Gaussian over the logits, with its samples and probabilities."""
        prediction = self.engine.predict(_prepare(batch, self.scale))
        self.n_outputs = prediction.mean.shape[1]
        return prediction

    def __call__(
        self,
        batch: Any,
        pred_type: str = "glm",
        link_approx: str = "probit",
        n_samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Class probabilities `[N, C]` with `mc`, `probit` or `bridge`; mean and covariance for regression."""
        _check("pred_type", pred_type, ("glm",))
        _check("link_approx", link_approx, ("mc", "probit", "bridge"))
        prediction = self.predict(batch)
        if self.likelihood == "regression":
            return prediction.mean, prediction.covariance
        if link_approx == "mc":
            return prediction.probs("mc", n_samples=n_samples, generator=generator)
        return _LINKS[link_approx](prediction.mean, prediction.covariance)

    def sample(self, n_samples: int = 100) -> Tensor:
        """`[n_samples, n_params]` samples of the weights, in the order of `mean`."""
        samples = self.engine.sample_weights(n_samples)
        names = [name for layer in self.engine.layers for name in layer.parameters()]
        return torch.cat([samples[name].flatten(1) for name in names], dim=1)


def _probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """Theirs: with all of each logit's variance, also what all logits share."""
    return (mean / (1 + math.pi / 8 * covariance.diagonal(dim1=1, dim2=2)).sqrt()).softmax(dim=1)


def _bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    """Theirs: of the Gaussian conditioned on logits that sum to zero, rather than of the logits less their mean."""
    row = covariance.sum(dim=2)
    total = row.sum(dim=1, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)
    conditioned = covariance - row[:, :, None] * row[:, None, :] / total[:, :, None]
    return bridge_log_probs(mean - row * mean.sum(dim=1, keepdim=True) / total, conditioned).exp()


_LINKS = {"probit": _probit, "bridge": _bridge}
_UNUSED = {"loss", "link_approx", "n_samples", "verbose", "log_prior_prec_min", "log_prior_prec_max", "grid_size"}


@register(PUBLISHED)
class PublishedCurvature(KroneckerCurvature):
    """K-FAC with A divided by the number of examples, whatever the number of tokens, and padding among them."""

    masked: ClassVar[bool] = False

    @classmethod
    def finish_factors(cls, sums: KroneckerSums, n_examples: int) -> dict[str, KroneckerFactors]:
        """See `KroneckerCurvature`."""
        rows = sums.input_rows
        return {name: replace(f, a=f.a * (rows[name] / n_examples)) for name, f in sums.factors().items()}


class _Prepared:
    """A loader whose batches are prepared one by one; it can start again if the loader can."""

    def __init__(self, loader: Iterable[Any], scale: str):
        self.loader, self.scale = loader, scale

    def __iter__(self) -> Iterator[Any]:
        return (_prepare(batch, self.scale) for batch in self.loader)


def _prepare(batch: Any, scale: str) -> tuple[dict[str, Any], Tensor | None]:
    """`(inputs, labels)`, the engine's form, with what the wrapper shall see and the engine not under other keys."""
    if isinstance(batch, tuple) and len(batch) == 3 and isinstance(batch[0], Mapping):
        batch = batch[:2]  # BayesAdapt's question ids
    inputs, labels = inputs_and_labels(batch)
    if not isinstance(inputs, Mapping):
        raise TypeError(f"batch: expected a mapping for the wrapped model, got {type(inputs).__name__}")
    hidden = MASK_KEYS if scale == "published" else ()
    prepared = {_HIDDEN + key if key in hidden else key: value for key, value in inputs.items()}
    if isinstance(batch, Mapping) and labels is not None:
        prepared[_HIDDEN + "labels"] = labels
    return prepared, labels


def _call_wrapper(model: nn.Module, batch: Any) -> Tensor:
    return model(**{key.removeprefix(_HIDDEN): value for key, value in batch[0].items()})


def _without_saved_modules(model: nn.Module) -> list[str] | None:
    trained = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    kept = [name for name in trained if "modules_to_save" not in name]
    return None if len(kept) == len(trained) else kept


def _check(name: str, value: Any, choices: tuple[Any, ...], advice: str = "") -> None:
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected {expected}, got {value!r}" + (f"; {advice}" if advice else ""))
