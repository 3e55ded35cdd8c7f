"""LaplaceLoRA: fit, tune, predict, save. It connects the parts and holds little code of its own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.curvature.factors import TOKENS, FactorSettings
from bayesian_lora_kernels.curvature.fit import CurvatureFit, Fit, FitSettings
from bayesian_lora_kernels.curvature.likelihood import FISHERS, LIKELIHOODS
from bayesian_lora_kernels.model import fingerprint
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.findings import CHECKS
from bayesian_lora_kernels.model.forward import Forward, ForwardFunction, model_device
from bayesian_lora_kernels.model.layers import Modules, find_layers
from bayesian_lora_kernels.posterior import archive, storage
from bayesian_lora_kernels.posterior.evidence import log_evidence, maximise_evidence
from bayesian_lora_kernels.posterior.kronecker import KroneckerFactors, KroneckerPosterior, as_precision
from bayesian_lora_kernels.posterior.layerwise import LayerwisePosterior
from bayesian_lora_kernels.posterior.weights import MeasuredWeights, adapter_digest, covered_by, find_adapter
from bayesian_lora_kernels.predictive.distribution import LogitPosterior
from bayesian_lora_kernels.predictive.hidden_samples import HiddenSampler
from bayesian_lora_kernels.predictive.logits import LogitPredictor, Outputs
from bayesian_lora_kernels.predictive.pushforward import Pushforward
from bayesian_lora_kernels.predictive.scoring import TokenScores, score_tokens
from bayesian_lora_kernels.predictive.tuning import minimise_nll
from bayesian_lora_kernels.predictive.vocabulary import SAMPLES, VocabularyPosterior, vocabulary_posterior
from bayesian_lora_kernels.surroundings import in_own_surroundings
from bayesian_lora_kernels.verification import Verification, verify

BASE = "base_model"  # the tensor that holds the fingerprint of the base model
CURVATURES = ("kfac", "ekfac", "exact")
PriorPrecision = float | Tensor | Mapping[str, float | Tensor]


class LaplaceLoRA:
    """Gaussian posterior over the trainable weights of a fine-tuned model, by a Laplace approximation.

    The curvature is the sum over the data set of the per-example Fisher (generalised Gauss-Newton) of the negative
    log-likelihood: posterior precision = curvature + prior precision, with no factor of the number of examples hidden
    anywhere, and independent of batch size and padding.

    Source: Yang, Robeyns, Wang, Aitchison 2024, "Bayesian low-rank adaptation for large language models".

    Args:
        model: a `peft.PeftModel`, or any `nn.Module` whose trainable parameters are all in `nn.Linear` modules.
        forward: `callable(model, batch)` -> logits `[N, C]`, or `[N, T, C]`, or `(logits, mask [N, T])`. None serves
            any module that returns logits, and takes the last valid token of a causal LM.
        class_token_ids: `[C]`, restricts a causal LM's logits to these tokens; labels are then indices into them.
        likelihood: `classification`, or `regression` with unit noise.
        curvature: `kfac`, `ekfac` (a second pass corrects the eigenvalues), or `exact` (the full Gauss-Newton matrix of
            all layers, in function space: for up to some thousand examples times logits).
        memory_budget: bytes that captured tensors, and `exact`'s rows, may take; None: half of what is free. Batches
            run in pieces, and rows move to the host or to disk, to stay within it.
        fisher: `mc`, `exact`, `empirical`; `auto` is exact up to 16 backward passes for logits `[N, C]`, else mc.
        fisher_samples: targets drawn per example with `mc`.
        tokens: `expand`, `reduce` or `last`: how weight sharing over tokens is treated (`docs/method.md`).
        rank: a factor wider than `rank_threshold` keeps this many columns; None keeps every factor in full.
        rank_threshold: see `rank`.
        tail: whether the directions outside the kept columns share the eigenvalue that the trace leaves them.
        prior_precision: one positive number, or one for each module.
        modules: regular expression or list of names; default: every trainable `nn.Linear`. `{name: ("weight", "bias")}`
            takes these, or one of them, whether they require gradients or not.
        row_dtype: in which `exact` stores its rows; None: that of the gradients (float32, or float64).
        seed: of everything random in `fit`.
        check: when what is taken for granted of the model is checked (docs/method.md): `first`, on the first two
            batches of every kind, the 32nd, the 512th and so on; `always`; `off`.

    Raises:
        ValueError, TypeError: for a model without trainable `nn.Linear` parameters, with trainable parameters
            elsewhere, and for every argument out of its range; the message names it.
    """

    @in_own_surroundings
    def __init__(
        self,
        model: nn.Module,
        forward: ForwardFunction | None = None,
        class_token_ids: Sequence[int] | Tensor | None = None,
        likelihood: str = "classification",
        curvature: str = "kfac",
        memory_budget: int | None = None,
        fisher: str = "auto",
        fisher_samples: int = 1,
        tokens: str = "expand",
        rank: int | None = 32,
        rank_threshold: int = 256,
        tail: bool = True,
        prior_precision: PriorPrecision = 1.0,
        modules: Modules | None = None,
        row_dtype: torch.dtype | None = None,
        seed: int = 0,
        check: str = "first",
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if forward is not None and not callable(forward):
            raise TypeError(f"forward: expected a callable(model, batch) -> logits, got {type(forward).__name__}")
        _check_choice("likelihood", likelihood, tuple(LIKELIHOODS))
        _check_choice("curvature", curvature, CURVATURES)
        _check_choice("fisher", fisher, FISHERS)
        _check_choice("tokens", tokens, TOKENS)
        _check_choice("check", check, CHECKS)
        _check_positive("rank", rank, optional=True)
        _check_positive("rank_threshold", rank_threshold)
        _check_positive("fisher_samples", fisher_samples)
        _check_positive("memory_budget", memory_budget, optional=True)
        if row_dtype is not None and not (isinstance(row_dtype, torch.dtype) and row_dtype.is_floating_point):
            raise TypeError(f"row_dtype: expected a floating-point torch.dtype, got {row_dtype!r}")
        self._forward = Forward(model, forward, class_token_ids, check=check)
        self.model = model
        self.likelihood = likelihood
        self._layers = find_layers(self.model, modules, self._forward.head_rows)
        self._settings = FitSettings(
            curvature=curvature,
            fisher=fisher,
            fisher_samples=fisher_samples,
            seed=seed,
            memory_budget=memory_budget,
            row_dtype=row_dtype,
            factors=FactorSettings(tokens=tokens, rank=rank, rank_threshold=rank_threshold, tail=tail),
        )
        self._fit: Fit | None = None
        self._weights: MeasuredWeights | None = None
        self._pushforward = Pushforward()
        self._prior = self._per_layer(prior_precision)

    @in_own_surroundings
    def fit(self, loader: Iterable[Any], progress: bool = True) -> LaplaceLoRA:
        """Measure the curvature at the current weights.

        Args:
            loader: batches: mappings (`input_ids`, `attention_mask`, `labels`, ...) or tuples `(inputs, labels)`.
                Labels are needed for the evidence and for the empirical Fisher only. EKFAC goes over the loader twice.
            progress: whether to show a progress bar.

        Returns:
            Itself. Whatever happens, the model comes back as it was: mode, `.grad`, hooks, requires_grad; and a failed
            fit leaves an earlier one in place.

        Raises:
            ValueError: for an empty loader, bad labels, numbers that are not finite, a layer that is never called.
        """
        likelihood = LIKELIHOODS[self.likelihood]()
        self._fit = CurvatureFit(
            self.model, self._layers, self._forward, likelihood, loader, self._settings, progress
        ).run()
        self._weights = MeasuredWeights.of(self.model, self._parameters())
        return self

    @in_own_surroundings
    def log_marginal_likelihood(self, prior_precision: PriorPrecision | None = None) -> Tensor:
        """Laplace's estimate of `log p(labels | inputs, prior)`, 0-d float64, differentiable in `prior_precision`.

        Rows of an output head that no class uses are integrated out and do not appear in it.

        Raises:
            RuntimeError: before `fit`, or if the data had no labels.
            ValueError: if a prior precision is not positive.
        """
        fit = self._fitted("log_marginal_likelihood")
        if fit.log_likelihood is None:
            raise RuntimeError("log_marginal_likelihood: fit saw batches without labels, so there is no likelihood")
        prior = self._prior if prior_precision is None else self._per_layer(prior_precision)
        return log_evidence(fit.log_likelihood, fit.posterior, self._square_norms(), prior)

    @in_own_surroundings
    def optimize_prior_precision(
        self, method: str = "marglik", per_module: bool = False, val_loader: Iterable[Any] | None = None
    ) -> LaplaceLoRA:
        """Choose the prior precision; later calls use it.

        Args:
            method: `marglik` maximises the log marginal likelihood; `nll` minimises the negative log-likelihood of the
                probit predictive on held-out data.
            per_module: one precision for each module (`marglik` only).
            val_loader: labelled batches, for `nll`; goes over it a few times.

        Returns:
            Itself.

        Raises:
            RuntimeError: before `fit`.
            ValueError: for another method, `nll` without data or per module.
        """
        fit = self._fitted("optimize_prior_precision")
        _check_choice("method", method, ("marglik", "nll"))
        if method == "marglik":
            self._prior = self._per_layer(maximise_evidence(fit.posterior, self._square_norms(), per_module))
            return self
        if val_loader is None:
            raise ValueError('val_loader: method="nll" needs held-out labelled batches, got None')
        if per_module:
            raise ValueError('per_module: expected method="marglik"; a held-out set is too small to tune every module')
        likelihood = LIKELIHOODS[self.likelihood]()
        best = minimise_nll(self._predictor(fit), likelihood, val_loader, list(self._prior))
        self._prior = self._per_layer(best)
        return self

    @overload
    def predict(self, batch: Any, outputs: Literal["vocabulary"]) -> VocabularyPosterior: ...

    @overload
    def predict(self, batch: Any, outputs: Outputs = None) -> LogitPosterior: ...

    @in_own_surroundings
    def predict(
        self, batch: Any, outputs: Outputs | Literal["vocabulary"] = None
    ) -> LogitPosterior | VocabularyPosterior:
        """The Gaussian posterior over logits of a batch.

        Args:
            batch: as for `fit`; labels are ignored.
            outputs: None, all the logits that forward returns; a LongTensor `[C]`, or `[N, C]` for each example; an int
                k, the k most probable of each example; `"vocabulary"`, all logits of a causal LM's next token, with or
                without `class_token_ids`.

        Returns:
            Mean `[N, C]` and covariance `[N, C, C]`, float32 (float64 for a float64 model); a `VocabularyPosterior`,
            which forms neither, for the vocabulary.

        Raises:
            RuntimeError: before `fit`.
            ValueError, TypeError: for `outputs` out of range, and logits that are not finite or not `[N, C]`.
        """
        fit = self._fitted("predict")
        if isinstance(outputs, str) and outputs == "vocabulary":
            return vocabulary_posterior(self._sampler(fit, "predict"), batch, self._settings.memory_budget)
        mean, covariances, indices = self._predictor(fit).predict(
            Batch.of(batch, model_device(self.model), labels=False), outputs, [self._detached_prior()]
        )
        return LogitPosterior(mean, covariances[0], indices, self.likelihood == "classification")

    @in_own_surroundings
    def verify(self, batch: Any) -> Verification:
        """Compare what is formed from the model with what autograd and the model itself say, on a batch of your own.

        On the example with most padding and a neighbour: captured Jacobians against plain autograd, in the model's
        dtype and, where a copy fits, in float64; a derivative against differences; logits against those of each example
        alone, without padding; a fit in pieces against one in one piece. No fit is needed before, and the model comes
        back as it was.

        Returns:
            A report: `.ok`, `.agreements`, `.as_dict()`; as a string, a table.

        Raises:
            ValueError, TypeError: as `fit` does, for what is not served.
        """
        likelihood = LIKELIHOODS[self.likelihood]()
        return verify(self._layers, self._forward, self.model, likelihood, self._settings, batch)

    @in_own_surroundings
    def score(self, batch: Any, n_samples: int = SAMPLES, generator: torch.Generator | None = None) -> TokenScores:
        """How a causal LM rates each token of a text, and how sure it can be of that.

        Args:
            batch: a mapping with `input_ids [N, T]`, and `attention_mask` for padded texts.
            n_samples: posterior samples; half of them are drawn, the others are their mirror images.
            generator: of the samples; None: torch's global one.

        Returns:
            Named `[N, T]` tensors, at each token about itself given those before it: `log_prob_map`, `log_prob` (of the
            posterior predictive), `entropy`, `mutual_information`, in nats, and `mask`, False where there is no such
            prediction (padding, the first token), and zero stands in the others.

        Raises:
            RuntimeError: before `fit`.
            ValueError, TypeError: for a model that is no causal LM, or a head that cannot be served.
        """
        _check_positive("n_samples", n_samples)
        return score_tokens(self._sampler(self._fitted("score"), "score"), batch, n_samples, generator)

    @in_own_surroundings
    def sample_weights(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Samples of the trainable weights, `{parameter name: [n, *shape]}`, around their MAP values.

        Rows of an output head that no class uses are drawn from the prior's spread around theirs.

        Raises:
            RuntimeError: before `fit`.
            ValueError: if n is not positive.
        """
        fit = self._fitted("sample_weights")
        _check_positive("n", n)
        prior = self._detached_prior()
        deviations = fit.posterior.sample(n, prior, generator)
        samples = {}
        for layer in self._layers:
            parts = layer.split(deviations[layer.name])
            for name, parameter in layer.parameters().items():
                value = parameter.detach()
                deviation = parts[name].to(value.device)
                if layer.rows is not None:
                    whole = torch.randn(
                        (n, *value.shape), generator=generator, dtype=deviation.dtype, device=value.device
                    )
                    whole *= prior[layer.name].to(whole.device).rsqrt().to(whole.dtype)
                    whole[:, layer.rows] = deviation
                    deviation = whole
                samples[name] = value + deviation.to(value.dtype)
        return samples

    @in_own_surroundings
    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the posterior into a folder, `laplace.json` and a safetensors file, whole or not at all.

        It may be the adapter's own folder. Neither adapter nor base model is written; loading checks that they are the
        same. Processes that write to one folder at once take turns.

        Raises:
            RuntimeError: before `fit`.
            ValueError: if an adapter is merged into the base model.
        """
        fit, weights = self._fitted("save_pretrained"), self._weights
        assert weights is not None
        factor_settings = asdict(self._settings.factors)
        description = {
            "settings": {
                "likelihood": self.likelihood,
                "curvature": self._settings.curvature,
                "fisher": self._settings.fisher,
                "fisher_samples": self._settings.fisher_samples,
                "seed": self._settings.seed,
                "row_dtype": None if self._settings.row_dtype is None else str(self._settings.row_dtype).split(".")[1],
                **factor_settings,
            },
            "class_token_ids": None
            if self._forward.class_token_ids is None
            else self._forward.class_token_ids.tolist(),
            "custom_forward": self._forward.function is not None,
            "prior_precision": {name: float(value) for name, value in self._prior.items()},
            "n_examples": fit.n_examples,
            "log_likelihood": fit.log_likelihood,
            "adapter_sha256": weights.digest or adapter_digest(self._parameters()),
        }
        tensors, layers = archive.pack(fit.posterior, fit.factors)
        for layer in self._layers:
            layers[layer.name]["covers"] = [leaf for leaf in ("weight", "bias") if getattr(layer, leaf)]
        tensors[BASE], base = weights.base or fingerprint.take(self.model, self._parameters().values())
        storage.save(folder, tensors, {**description, "layers": layers, "base_model": base})

    @classmethod
    @in_own_surroundings
    def from_pretrained(
        cls, model: nn.Module, folder: str | os.PathLike[str], forward: ForwardFunction | None = None
    ) -> LaplaceLoRA:
        """Read a posterior for a model that already carries the adapter it was fitted to, on whatever device it is.

        The adapter may have another name, be frozen, be loaded by `peft` or by transformers' `load_adapter`, and the
        model be wrapped (DDP, `torch.compile`). Of several adapters with these weights the active one is taken. The
        base model is compared in some values of each of its tensors, and may be in another float type.

        Raises:
            FileNotFoundError: if there is no posterior in the folder.
            ValueError: if a file is damaged or newer than this package, if the model's layers, adapter or base model
                are not those of the fit, or if the fit had its own `forward` and none is given.
        """
        tensors, content = storage.load(folder)
        if content["custom_forward"] and forward is None:
            raise ValueError(f"{folder}: this posterior was fitted with its own forward; pass the same forward=...")
        settings = dict(content["settings"])
        row_dtype = settings.pop("row_dtype")
        with _errors_name(folder):
            place, same_weights = find_adapter(model, content)
            covers = covered_by(model, content["layers"], place)
        laplace = cls(
            model,
            forward=forward,
            class_token_ids=content["class_token_ids"],
            modules=covers,
            row_dtype=None if row_dtype is None else getattr(torch, row_dtype),
            **settings,
        )
        found = {layer.name: layer for layer in laplace._layers}
        with _errors_name(folder):
            for stored, name in place.layers.items():
                expected, shape = tuple(content["layers"][stored]["shape"]), found[name].shape
                if expected != shape:
                    raise ValueError(f"expected {name} of shape {list(expected)}, this model's has {list(shape)}")
            if not same_weights:
                raise ValueError(
                    "the adapter's weights are not those the posterior was fitted to (another adapter, further "
                    "training, or a dtype that does not hold them)"
                )
            posterior, factors = archive.unpack(
                tensors,
                content["layers"],
                place.layers,
                {layer.name: layer.device for layer in laplace._layers},
                exact=settings["curvature"] == "exact",
            )
            if content["version"] > 1:
                count = sum(tensor["values"] for tensor in content["base_model"]["tensors"].values())
                values = archive.stored_values(tensors, BASE, count)
                base = content["base_model"]
                fingerprint.check(model, laplace._parameters().values(), place.adapters, values, base)
            else:
                warnings.warn(
                    f"{folder}: its posterior is of format version 1, which says nothing of the base model; make sure "
                    "that it is the right one, and save_pretrained again",
                    stacklevel=2,
                )
        laplace._fit = Fit(posterior, factors, content["n_examples"], content["log_likelihood"])
        laplace._weights = MeasuredWeights.of(laplace.model, laplace._parameters())
        laplace._prior = laplace._per_layer(
            {place.layers[stored]: value for stored, value in content["prior_precision"].items()}
        )
        return laplace

    @property
    def n_examples(self) -> int:
        """Examples that `fit` saw."""
        return self._fitted("n_examples").n_examples

    @property
    def log_likelihood(self) -> float | None:
        """Log-likelihood of the labels at the MAP weights, summed over the data; None without labels."""
        return self._fitted("log_likelihood").log_likelihood

    @property
    def prior_precision(self) -> Tensor | dict[str, Tensor]:
        """The prior precision, 0-d float64, or one for each module. May be set; nothing is refitted."""
        values = list(self._prior.values())
        if all(value is values[0] for value in values):
            return values[0]
        return dict(self._prior)

    @prior_precision.setter
    def prior_precision(self, value: PriorPrecision) -> None:
        self._prior = self._per_layer(value)

    @property
    def factors(self) -> dict[str, KroneckerFactors]:
        """`{module name: factors}`; modules that saw the same input share the same tensor for it."""
        fit = self._fitted("factors")
        if fit.factors is None:
            raise RuntimeError('factors: curvature="exact" has no Kronecker factors')
        return fit.factors

    @property
    def posterior(self) -> dict[str, KroneckerPosterior]:
        """`{module name: its Gaussian}` under the current prior precision."""
        posterior = self._fitted("posterior").posterior
        if not isinstance(posterior, LayerwisePosterior):
            raise RuntimeError('posterior: curvature="exact" couples all modules and has none for each')
        return posterior.with_prior(self._prior)

    def _fitted(self, what: str) -> Fit:
        if self._fit is None:
            raise RuntimeError(f"{what}: call fit(loader) first")
        if self._weights is not None:
            self._weights.check_unchanged(self._parameters(), what)
        return self._fit

    def _predictor(self, fit: Fit) -> LogitPredictor:
        return LogitPredictor(self.model, self._layers, self._forward, fit.posterior, self._settings.memory_budget)

    def _sampler(self, fit: Fit, what: str) -> HiddenSampler:
        if self.likelihood != "classification":
            raise ValueError(f"{what}: expected likelihood='classification' for a vocabulary, got {self.likelihood!r}")
        if self._forward.head is None:
            raise ValueError(
                f"{what}: expected a causal LM with an output head over a vocabulary and the default forward"
            )
        return HiddenSampler(
            self.model,
            self._layers,
            self._forward,
            fit.posterior,
            self._detached_prior(),
            self._settings.memory_budget,
            self._pushforward,
        )

    def _per_layer(self, prior_precision: PriorPrecision) -> dict[str, Tensor]:
        names = [layer.name for layer in self._layers]
        if not isinstance(prior_precision, Mapping):
            return dict.fromkeys(names, as_precision(prior_precision))
        if set(prior_precision) != set(names):
            difference = sorted(set(prior_precision) ^ set(names))
            raise ValueError(
                f"prior_precision: expected one number for each of {len(names)} modules; missing or unknown: "
                f"{', '.join(difference[:3])}"
            )
        values = {name: prior_precision[name] for name in names}
        if len({id(v) if isinstance(v, Tensor) else float(as_precision(v)) for v in values.values()}) == 1:
            return dict.fromkeys(names, as_precision(values[names[0]]))
        return {name: as_precision(value) for name, value in values.items()}

    def _detached_prior(self) -> dict[str, Tensor]:
        detached = {id(value): value.detach() for value in self._prior.values()}
        return {name: detached[id(value)] for name, value in self._prior.items()}

    def _square_norms(self) -> dict[str, Tensor]:
        return {layer.name: layer.matrix().double().square().sum() for layer in self._layers}

    def _parameters(self) -> dict[str, Tensor]:
        return {name: value for layer in self._layers for name, value in layer.parameters().items()}


@contextmanager
def _errors_name(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Errors begin with the folder."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_positive(name: str, value: Any, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a positive int{' or None' if optional else ''}, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
