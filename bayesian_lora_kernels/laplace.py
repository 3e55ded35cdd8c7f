"""LaplaceLoRA: fit, tune, predict, save. It connects the parts and holds little code of its own."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.config import LaplaceConfig, PriorPrecision
from bayesian_lora_kernels.curvature.generations import checkpoint_in
from bayesian_lora_kernels.curvature.identity import identity
from bayesian_lora_kernels.curvature.likelihood import LIKELIHOODS
from bayesian_lora_kernels.curvature.passes import Fit, Passes, fit_curvature
from bayesian_lora_kernels.curvature.shares import own_share
from bayesian_lora_kernels.memory_estimate import MemoryEstimate, estimate_memory
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.forward import Forward, ForwardFunction, model_device
from bayesian_lora_kernels.model.layers import LinearLayer, find_layers
from bayesian_lora_kernels.model.sharding import in_step, not_sharded, together
from bayesian_lora_kernels.posterior.curvature import CURVATURES, Curvature
from bayesian_lora_kernels.posterior.evidence import log_evidence, maximise_evidence, maximise_with_noise
from bayesian_lora_kernels.posterior.kronecker import KroneckerFactors
from bayesian_lora_kernels.posterior.noise import Residuals
from bayesian_lora_kernels.posterior.posterior import Posterior
from bayesian_lora_kernels.posterior.prior import Prior, as_precision, has_derivative
from bayesian_lora_kernels.posterior.weights import MeasuredWeights
from bayesian_lora_kernels.predictive.calibrate import Calibration, LabelLikelihood, Notice
from bayesian_lora_kernels.predictive.distribution import LogitPosterior
from bayesian_lora_kernels.predictive.gathering import gather_logits, gather_scores
from bayesian_lora_kernels.predictive.hidden_samples import HiddenSampler
from bayesian_lora_kernels.predictive.joint import JointPredictor
from bayesian_lora_kernels.predictive.jvp import JacobianVectorProduct
from bayesian_lora_kernels.predictive.logits import LogitPredictor, Outputs
from bayesian_lora_kernels.predictive.scoring import TokenScores, score_tokens
from bayesian_lora_kernels.predictive.tuning import labelled_predictions, minimise_nll
from bayesian_lora_kernels.predictive.vocabulary import SAMPLES, VocabularyPosterior, vocabulary_posterior
from bayesian_lora_kernels.processes import Processes
from bayesian_lora_kernels.saving import load, save
from bayesian_lora_kernels.surroundings import in_own_surroundings
from bayesian_lora_kernels.verification import Verification, verify

UNCALIBRATED = (
    "probs: the prior precision is the evidence's, which says nothing of the level of these probabilities; "
    "calibrate(held-out labelled batches), or crossfit without any, sets it"
)


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
        class_token_ids: as in `LaplaceConfig`.
        config: all settings at once.
        **settings: single settings, by the names that they have in `LaplaceConfig`, which describes them.

    Attributes:
        config: the settings, but for the prior.
        layers: that carry the posterior, in the order of the model.

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
        *,
        config: LaplaceConfig | None = None,
        **settings: Any,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if forward is not None and not callable(forward):
            raise TypeError(f"forward: expected a callable(model, batch) -> logits, got {type(forward).__name__}")
        if class_token_ids is not None:
            settings["class_token_ids"] = class_token_ids
        given = LaplaceConfig.of(config, settings)
        # What can be changed after the fit is no setting of it.
        defaults = {name: getattr(LaplaceConfig, name) for name in ("prior_precision", "noise_variance")}
        self.config = replace(given, **defaults)
        if self.config.curvature not in CURVATURES:
            raise ValueError(f"curvature: expected one of {', '.join(CURVATURES)}, got {self.config.curvature!r}")
        masked = CURVATURES[self.config.curvature].masked
        answers = LIKELIHOODS[self.config.likelihood].answers
        if answers is not None and self.config.class_token_ids is not None:
            raise ValueError(
                f"class_token_ids: expected none with likelihood={self.config.likelihood!r}, a reward model"
            )
        if answers is not None and self.config.tokens != "expand":
            raise ValueError(
                f"tokens: expected 'expand' with likelihood={self.config.likelihood!r}, got {self.config.tokens!r}, "
                "which would make one row of all answers to a prompt; leave it out"
            )
        self._forward = Forward(model, forward, self.config.class_token_ids, masked, self.config.check, answers)
        self.model = model
        self.layers: Sequence[LinearLayer] = find_layers(model, self.config.modules, self._forward.head_rows)
        self._fit: Fit | None = None
        self._posterior: Posterior | None = None  # of the fit, under the prior
        # What it belongs to, of which the curvature may be large.
        self._calibration: tuple[Calibration, weakref.ref[Curvature], Prior] | None = None
        self._notice: Notice | None = None
        self._weights: MeasuredWeights | None = None
        self._jvp = JacobianVectorProduct()
        self.prior_precision = given.prior_precision
        self.noise_variance = given.noise_variance

    @in_own_surroundings
    def fit(
        self,
        loader: Iterable[Any],
        progress: bool = True,
        *,
        group: Any = None,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int | None = None,
    ) -> LaplaceLoRA:
        """Measure the curvature at the current weights; on several processes, of the data of all of them.

        Args:
            loader: batches: mappings (`input_ids`, `attention_mask`, `labels`, ...) or tuples `(inputs, labels)`;
                docs/batches.md has pairs of answers, and weights of examples.
                Labels are needed for the evidence and for the empirical Fisher only. EKFAC goes over the loader twice.
            progress: whether to show a progress bar; of a group, only rank 0 does.
            group: a `torch.distributed` process group, all of whose processes call this, each with the batches of its
                own share of the data: as many as it has, or none (`[]`). All of them end with the same curvature, that
                of all examples (docs/distributed.md). None: this process alone.
            checkpoint: a folder in which what is measured so far is written down. The same fit of the same data, killed
                or interrupted, goes on from there to the same result; once it has that, nothing is left there. See
                docs/long-runs.md.
            every: batches between checkpoints; None: one a minute, or fewer where they take long to write.

        Returns:
            Itself. Whatever happens, the model comes back as it was: mode, `.grad`, hooks, requires_grad; and a failed
            fit leaves an earlier one in place.

        Raises:
            ValueError: for an empty loader, bad labels, numbers that are not finite, a layer that is never called; for
                processes that differ in settings, layers or weights, a loader that repeats examples, so that all shares
                are equally long, without a way to tell which, and a checkpoint that is damaged, of another fit, or of
                other data than the loader's.
            RuntimeError: if another process of the group failed, or did not come within the group's timeout; it is
                named.
            OSError: if another fit writes its checkpoints to the same folder, or nothing can be written there.
            torch.OutOfMemoryError: if one example alone does not fit into memory.

        Warns:
            UserWarning: without a group, if the loader shows that it gives this process only a share of the data.
        """
        if every is not None:
            _check_positive("every", every)
            if checkpoint is None:
                raise ValueError("every: expected checkpoint=folder with it, got None")
        if checkpoint is not None:
            not_sharded(self.model, "checkpoint", "its processes would resume at different batches")
        processes = Processes(group)
        own = partial(identity, self.model, self.layers, self._forward, self.config)
        with (
            together(self.model, processes),
            checkpoint_in(checkpoint, every, own, processes, self._forward.read) as kept,
        ):
            loader = own_share(loader, processes, "fit", self._forward.read)
            passes = Passes(self.model, self.layers, self._forward, loader, self.config, progress, processes, kept)
            passes.likelihood.certain = self.config.fisher == "empirical"
            found = fit_curvature(passes)
            weights = MeasuredWeights.of(self.model, self._parameters())
            processes.values(None)  # all of them have it
            if kept is not None:
                kept.remove()
        self._fit, self._weights = found, weights
        return self

    @in_own_surroundings
    def memory_estimate(
        self,
        batch: Any,
        outputs: Outputs | Literal["vocabulary"] = None,
        differences: bool = False,
        n_examples: int | None = None,
    ) -> MemoryEstimate:
        """Bytes that `fit` on batches like this one and `predict` of it will need, when they need most.

        Both run dry, on a copy of the model without its numbers (docs/memory.md): nothing is computed with weights.

        Args:
            batch: as for `fit`, of the size and length of the longest.
            outputs: as for `predict`; a causal LM without `class_token_ids` predicts its vocabulary.
            differences: as for `predict`.
            n_examples: of `curvature="exact"`, that the fit will see; None leaves its rows out.

        Returns:
            `.fit` and `.predict`, `{device: bytes}`, and what they are made of; as a string, a table.

        Raises:
            ValueError, TypeError: as `fit` and `predict` do; for parameters that are no plain tensors (a quantised
                model).
            RuntimeError: for a model whose way depends on the numbers that it computes.
        """
        return estimate_memory(
            self.model,
            self._forward.function,
            self.config,
            self.prior,
            batch,
            outputs=outputs,
            differences=differences,
            n_examples=n_examples,
        )

    @in_own_surroundings
    def log_marginal_likelihood(
        self, prior_precision: PriorPrecision | None = None, noise_variance: float | Tensor | None = None
    ) -> Tensor:
        """Laplace's estimate of `log p(labels | inputs, prior)`, 0-d float64, differentiable in both arguments.

        Rows of an output head that no class uses are integrated out and do not appear in it.

        Raises:
            RuntimeError: before `fit`, or if the data had no labels.
            ValueError: if a prior precision or noise variance is not positive, or the likelihood has no noise.
        """
        fit = self._fitted("log_marginal_likelihood")
        if fit.log_likelihood is None:
            raise RuntimeError("log_marginal_likelihood: fit saw batches without labels, so there is no likelihood")
        prior = self.prior if prior_precision is None else Prior(prior_precision)
        noise = self._noise if noise_variance is None else self._as_noise(noise_variance)
        likelihood = self._log_likelihood(fit.log_likelihood, fit, noise)
        return log_evidence(likelihood, Posterior(fit.curvature, prior, noise), self._square_norms())

    @in_own_surroundings
    def optimize_prior_precision(
        self,
        method: str = "marglik",
        per_module: bool = False,
        val_loader: Iterable[Any] | None = None,
        *,
        noise: bool = False,
        group: Any = None,
    ) -> LaplaceLoRA:
        """Choose the prior precision, and the noise variance of a regression, if wanted; later calls use them.

        The evidence compares priors and models. It is no calibration: the level of the probabilities under its prior
        can be far off (docs/calibration.md), and `calibrate` is what sets it.

        Args:
            method: `marglik` maximises the log marginal likelihood; `nll` minimises the negative log-likelihood of the
                pairwise predictive on held-out data.
            per_module: one precision for each module (`marglik` only).
            val_loader: labelled batches, for `nll`; goes over it a few times.
            noise: whether the noise variance of a regression is chosen, too, together with the prior (`marglik` only).
            group: as for `fit`, for `nll`; `marglik` finds the same on every process.

        Returns:
            Itself.

        Raises:
            RuntimeError: before `fit`; to choose the noise, if the data had no labels.
            ValueError: for another method, `nll` without data, per module or with noise, and where there is no noise.
        """
        fit = self._fitted("optimize_prior_precision")
        _check_choice("method", method, ("marglik", "nll"))
        if noise:
            self._check_noise("noise")
            if method != "marglik":
                raise ValueError(f"noise: expected method='marglik' with it, got {method!r}")
            if fit.log_likelihood is None:
                raise RuntimeError("noise: fit saw batches without labels, so nothing is known of it")
            if not fit.targets:
                raise RuntimeError("noise: this fit was saved before the number of its targets was; fit again")
            residuals = Residuals.of(fit.log_likelihood, fit.targets)
            self.prior_precision, self.noise_variance = maximise_with_noise(
                fit.curvature, self._square_norms(), per_module, residuals
            )
            return self
        if method == "marglik":
            self.prior_precision = maximise_evidence(fit.curvature, self._square_norms(), per_module, self._noise)
            self._notice = Notice(UNCALIBRATED)
            return self
        if val_loader is None:
            raise ValueError('val_loader: method="nll" needs held-out labelled batches, got None')
        if per_module:
            raise ValueError('per_module: expected method="marglik"; a held-out set is too small to tune every module')
        likelihood = LIKELIHOODS[self.likelihood]()
        processes = Processes(group)
        with together(self.model, processes):
            val_loader = own_share(val_loader, processes, "optimize_prior_precision", self._forward.read)
            found = minimise_nll(
                self._predictor(fit), likelihood, val_loader, fit.curvature, self._noise.detach(), processes
            )
        self.prior_precision = found
        return self

    @in_own_surroundings
    def calibrate(
        self, val_loader: Iterable[Any] | LabelLikelihood, progress: bool = True, *, group: Any = None
    ) -> LaplaceLoRA:
        """Set the level of the probabilities by held-out labels; `probs` uses it from then on.

        Temperatures that depend on the posterior variance are weighed by the likelihood of the labels and averaged
        (`Calibration`, docs/calibration.md). One prediction of every batch, and no refit. It belongs to this fit under
        this prior precision: after a change of either, `probs` raises until it is called again.

        Args:
            val_loader: labelled batches of examples that the model was not trained on; ten labels do, a hundred are
                good. Or what `label_likelihood` said of them, on this model or on others like it.
            progress: whether to show a progress bar.
            group: as for `fit`: a process group, each of whose processes has a share of the labels, or none.

        Returns:
            Itself; `.calibration` says how many labels there were, and over how much of the grid their weight spreads.

        Raises:
            RuntimeError, ValueError, TypeError: as `label_likelihood`; for labels of one class only.
        """
        self._fitted("calibrate")
        if not isinstance(val_loader, LabelLikelihood):
            val_loader = self.label_likelihood(val_loader, progress, group=group)
        elif group is not None:
            raise ValueError(
                "group: expected with batches; label_likelihood(batches, group=...) adds up over processes"
            )
        self._calibration = Calibration.of(val_loader, self.variance_scale), *self._belongs()
        return self

    @in_own_surroundings
    def label_likelihood(
        self, val_loader: Iterable[Any], progress: bool = True, *, group: Any = None
    ) -> LabelLikelihood:
        """What labels that the model was not trained on say of its level; parts of it add up. See `calibrate`.

        Raises:
            RuntimeError: before `fit`.
            ValueError: for a regression or ranked lists, ties, weights, an empty loader, a batch without labels, labels
                out of range, logits that are not finite, or more than 4096 of them (a vocabulary: pass
                `class_token_ids`).
            TypeError: for a single batch instead of a loader.
        """
        fit = self._fitted("calibrate")
        likelihood = LIKELIHOODS[self.likelihood]()
        if likelihood.noisy or likelihood.answers == "lists":
            raise ValueError(
                f"calibrate: expected likelihood='classification', or 'bradley-terry', got {self.likelihood!r}"
            )
        found, scale, processes = LabelLikelihood(), self.variance_scale, Processes(group)
        with together(self.model, processes):
            val_loader = own_share(val_loader, processes, "calibrate", self._forward.read)
            processes.check_alike(self._prior_numbers())
            for mean, (covariance,), labels, weights in labelled_predictions(
                self._predictor(fit), likelihood, val_loader, [self._gaussian()], progress, processes
            ):
                if weights is not None:
                    raise ValueError(
                        "weights: expected none in held-out batches, each label counts once; leave them out"
                    )
                add = found.add if likelihood.answers is None else found.add_pairs
                add(mean, covariance, labels, scale)
            parts = processes.values(found.as_json())
        return sum(map(LabelLikelihood.from_json, parts), LabelLikelihood())

    @property
    def variance_scale(self) -> float:
        """`sum_m l_m ||theta_m||^2 / P`, the unit of calibrated variances: square weights over the prior's."""
        prior, count = self.prior, sum(self._fitted("variance_scale").curvature.n_parameters.values())
        return sum(float(prior[name].detach()) * float(norm) for name, norm in self._square_norms().items()) / count

    @property
    def calibration(self) -> Calibration | None:
        """What `calibrate` or `crossfit` found; `.outdated` says if fit or prior changed since. None before."""
        if self._calibration is None:
            return None
        found, curvature, prior = self._calibration
        if curvature() is not self._fitted("calibration").curvature:
            return replace(found, outdated="fit was called again")
        return found if prior == self.prior else replace(found, outdated="the prior precision changed")

    def _belongs(self) -> tuple[weakref.ref[Curvature], Prior]:
        return weakref.ref(self._fitted("calibration").curvature), self.prior.detached()

    @overload
    def predict(self, batch: Any, outputs: Literal["vocabulary"]) -> VocabularyPosterior: ...

    @overload
    def predict(
        self, batch: Any, outputs: Outputs = None, differences: bool = False, *, gather: Any = None
    ) -> LogitPosterior: ...

    @in_own_surroundings
    def predict(
        self,
        batch: Any,
        outputs: Outputs | Literal["vocabulary"] = None,
        differences: bool = False,
        *,
        gather: Any = None,
    ) -> LogitPosterior | VocabularyPosterior:
        """The Gaussian posterior over logits of a batch.

        Args:
            batch: as for `fit`; labels are ignored.
            outputs: None, all the logits that forward returns; a LongTensor `[C]`, or `[N, C]` for each example; an int
                k, the k most probable of each example; `"vocabulary"`, the same as `predict_vocabulary`.
            differences: whether only differences of these logits are wanted, which are all that probabilities see: the
                Gaussian of the logits less their mean over the classes, from C - 1 backward passes instead of C (half
                of them for two classes), and without the digits that a large common variance costs.
            gather: a `torch.distributed` process group, all of whose processes call this with a batch of their own, of
                any size, or None for no examples; the result is of all of them, in the order of the ranks.

        Returns:
            Mean `[N, C]` and covariance `[N, C, C]`, float32 (float64 for a float64 model); a `VocabularyPosterior`,
            which forms neither, for the vocabulary.

        Raises:
            RuntimeError: before `fit`; if another process failed.
            ValueError, TypeError: for `outputs` out of range, differences of one logit or of a vocabulary, a vocabulary
                to gather, processes of another prior precision or other outputs, and logits that are not finite or not
                `[N, C]`.
        """
        if isinstance(outputs, str) and outputs == "vocabulary":
            if differences:
                raise ValueError("differences: not of a vocabulary; its probabilities are averages over samples")
            if gather is not None:
                raise ValueError("gather: not of a vocabulary; predict it on each process, and gather what you need")
            return self.predict_vocabulary(batch)
        fit, processes = self._fitted("predict"), Processes(gather)
        device = model_device(self.model)
        with together(self.model, processes):
            own, posterior = None, self._gaussian()
            with posterior.in_step():
                if gather is None or batch is not None:
                    (batch,) = in_step(self.model, [batch])
                    parsed = self._forward.read(batch, device, labels=False)
                    if gather is None or parsed.size:
                        own = self._predictor(fit).predict(parsed, outputs, [posterior], differences)
            if own is None or gather is not None:
                processes.check_alike({"differences": differences, **self._prior_numbers()})
                own = gather_logits(processes, own, device)
        mean, (covariance,), indices = own
        return LogitPosterior(
            mean,
            covariance,
            indices,
            classification=self.likelihood != "regression" and mean.shape[1] > 1,
            noise_variance=self._noise.detach() if self.likelihood == "regression" else None,
            differences=differences,
            calibration=self.calibration,
            notice=self._notice,
        )

    @in_own_surroundings
    def joint(
        self,
        batch_a: Any,
        batch_b: Any = None,
        outputs: Sequence[int] | Tensor | None = None,
        differences: bool = False,
    ) -> Tensor:
        """The posterior covariance of the logits of some inputs with those of others, `J_a Sigma J_b^T`.

        What inputs share, which `predict` does not say: `blk.joint_samples` and `blk.select_batch` are made of it. It
        is the posterior's own: calibration sets the level of probabilities, and changes no covariance.

        Args:
            batch_a: as for `predict`, of N_a examples.
            batch_b: of N_b examples; None: the same as `batch_a`, and the result is symmetric.
            outputs: None, all C logits that forward returns, or indices `[C]`.
            differences: as for `predict`: of the logits less their mean, from C - 1 backward passes.

        Returns:
            `[N_a C, N_b C]` float64, the logits of an example next to each other. Beside it and the graph of the model,
            Jacobians and rows within `memory_budget`; where those of `batch_b` do not fit at once, the model runs over
            `batch_a` several times (docs/influence.md).

        Raises:
            RuntimeError: before `fit`.
            ValueError, TypeError: as `predict`; for a model that is sharded, and a curvature whose rows are spread over
                processes.
        """
        predictor, a = self._joint_predictor(), self._inputs(batch_a)
        if batch_b is None:
            return predictor.gaussian(a, outputs, differences)[1]
        return predictor.covariance(a, self._inputs(batch_b), outputs, differences)

    @in_own_surroundings
    def predict_vocabulary(self, batch: Any) -> VocabularyPosterior:
        """The Gaussian posterior over all logits of a causal LM's next token, with or without `class_token_ids`.

        Neither a `[V, V]` nor an `[N, S, V]` tensor is formed; see `VocabularyPosterior`.

        Args:
            batch: a mapping with `input_ids [N, T]`, and `attention_mask` for padded texts; labels are ignored.

        Raises:
            RuntimeError: before `fit`.
            ValueError, TypeError: for a model that is no causal LM, or a head that cannot be served.
        """
        return vocabulary_posterior(self._sampler("predict"), batch)

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
        not_sharded(self.model, "verify")
        return verify(self.layers, self._forward, self.model, self.config, batch)

    @in_own_surroundings
    def score(
        self,
        batch: Any,
        n_samples: int = SAMPLES,
        generator: torch.Generator | None = None,
        *,
        gather: Any = None,
    ) -> TokenScores:
        """How a causal LM rates each token of a text, and how sure it can be of that.

        Args:
            batch: a mapping with `input_ids [N, T]`, and `attention_mask` for padded texts.
            n_samples: posterior samples; half of them are drawn, the others are their mirror images.
            generator: of the samples; None: torch's global one. Processes draw their own: the same where these have
                the same state.
            gather: as for `predict`; the texts of all processes, padded to the longest.

        Returns:
            Named `[N, T]` tensors, at each token about itself given those before it: `log_prob_map`, `log_prob` (of the
            posterior predictive), `entropy`, `mutual_information`, in nats, and `mask`, False where there is no such
            prediction (padding, the first token), and zero stands in the others.

        Raises:
            RuntimeError: before `fit`.
            ValueError, TypeError: for a model that is no causal LM, or a head that cannot be served.
        """
        _check_positive("n_samples", n_samples)
        sampler, processes = self._sampler("score"), Processes(gather)
        if gather is None:
            return score_tokens(sampler, batch, n_samples, generator)
        with processes.together():
            some = batch is not None and Batch.of(batch, labels=False).size > 0
            own = score_tokens(sampler, batch, n_samples, generator) if some else None
            processes.check_alike({"n_samples": n_samples, **self._prior_numbers()})
            return gather_scores(processes, own, model_device(self.model))

    @in_own_surroundings
    def sample_weights(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Samples of the trainable weights, `{parameter name: [n, *shape]}`, around their MAP values.

        Rows of an output head that no class uses are drawn from the prior's spread around theirs.

        Raises:
            RuntimeError: before `fit`.
            ValueError: if n is not positive.
        """
        self._fitted("sample_weights")
        _check_positive("n", n)
        posterior = self._gaussian()
        deviations = posterior.sample(n, generator)
        samples, values = {}, self._values()
        for layer in self.layers:
            parts = layer.split(deviations[layer.name])
            for name in layer.parameters():
                value = values[name]
                deviation = parts[name].to(value.device)
                if layer.rows is not None:
                    whole = torch.randn(
                        (n, *value.shape), generator=generator, dtype=deviation.dtype, device=value.device
                    )
                    whole *= posterior.prior[layer.name].to(whole.device).rsqrt().to(whole.dtype)
                    whole[:, layer.rows] = deviation
                    deviation = whole
                samples[name] = value + deviation.to(value.dtype)
        return samples

    @in_own_surroundings
    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the posterior into a folder, `laplace.json` and a safetensors file, whole or not at all.

        It may be the adapter's own folder. Neither adapter nor base model is written; loading checks that they are the
        same. Processes that write to one folder at once take turns. Of `curvature="exact"` that was fitted by a group
        all processes call this, as each holds a part of it; the first one writes.

        Raises:
            RuntimeError: before `fit`; if another process failed.
            ValueError: if an adapter is merged into the base model.
        """
        save(self, folder)

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
        return load(cls, model, folder, forward)

    @property
    def likelihood(self) -> str:
        """As in `LaplaceConfig`."""
        return self.config.likelihood

    @property
    def n_examples(self) -> int:
        """Examples that `fit` saw, each once, whatever its weight."""
        return self._fitted("n_examples").n_examples

    @property
    def log_likelihood(self) -> float | None:
        """Log-likelihood of the labels at the MAP weights, summed over the data; None without labels."""
        fit = self._fitted("log_likelihood")
        if fit.log_likelihood is None:
            return None
        return float(self._log_likelihood(fit.log_likelihood, fit, self._noise))

    @property
    def noise_variance(self) -> Tensor:
        """Of a regression, 0-d float64, one for all outputs; 1 for all else. Setting it refits nothing."""
        return self._noise

    @noise_variance.setter
    def noise_variance(self, value: float | Tensor) -> None:
        self._noise = self._as_noise(value)

    @property
    def prior(self) -> Prior:
        """The prior over the weights, as it is now."""
        return Prior(self._precision)

    @property
    def prior_precision(self) -> Tensor | dict[str, Tensor]:
        """The prior precision, 0-d float64, or one for each module. Setting it (also to a `Prior`) refits nothing.

        float64 tensors are kept as they are: what is changed in place counts at once.
        """
        return self._precision if isinstance(self._precision, Tensor) else dict(self._precision)

    @prior_precision.setter
    def prior_precision(self, value: PriorPrecision | Prior) -> None:
        prior = Prior(value).over([layer.name for layer in self.layers])
        self._notice = None
        self._precision: Tensor | dict[str, Tensor]
        if isinstance(value, Prior):
            self._precision = Prior(prior.precision).precision  # not the tensors of the one that was given
        elif not isinstance(value, Mapping):
            self._precision = as_precision(value)
        elif len({id(number) if isinstance(number, Tensor) else float(number) for number in value.values()}) == 1:
            self._precision = as_precision(next(iter(value.values())))
        else:
            self._precision = {layer.name: as_precision(value[layer.name]) for layer in self.layers}

    @property
    def factors(self) -> dict[str, KroneckerFactors]:
        """`{module name: factors}`; modules that saw the same input share the same tensor for it."""
        factors = self._fitted("factors").curvature.factors
        if factors is None:
            raise RuntimeError(f"factors: curvature={self.config.curvature!r} has no Kronecker factors")
        return dict(factors)

    @property
    def posterior(self) -> Posterior:
        """The Gaussian over the weights under the current prior precision; as a mapping, `{module name: its own}`."""
        prior = self.prior
        if prior.requires_grad or self._noise.requires_grad:
            return Posterior(self._fitted("posterior").curvature, prior, self._noise)
        return self._gaussian()

    def _gaussian(self) -> Posterior:
        """The posterior without gradients of the prior; kept as long as curvature and prior are the same."""
        curvature, prior, kept = self._fitted("posterior").curvature, self.prior, self._posterior
        prior = prior.detached() if prior.requires_grad else prior
        noise = self._noise.detach()
        same = kept is not None and kept.curvature is curvature and kept.prior == prior
        if kept is None or not same or float(kept.noise_variance) != float(noise):
            self._posterior = kept = Posterior(curvature, prior, noise)
        return kept

    def _as_noise(self, value: float | Tensor) -> Tensor:
        found = as_precision(value, name="noise_variance")
        if float(found.detach()) != 1 or has_derivative(found):
            self._check_noise("noise_variance")
        return found

    def _check_noise(self, what: str) -> None:
        if not LIKELIHOODS[self.likelihood].noisy:
            raise ValueError(f"{what}: expected likelihood='regression' with it, got {self.likelihood!r}")
        if self.config.fisher == "empirical":
            raise ValueError(
                f"{what}: expected another Fisher than fisher='empirical', which has the noise in its labels"
            )

    def _log_likelihood(self, at_unit_noise: float, fit: Fit, noise: Tensor) -> float | Tensor:
        """Of the labels, at a noise variance."""
        if float(noise.detach()) == 1 and not has_derivative(noise):
            return at_unit_noise
        if not fit.targets:
            raise RuntimeError("noise_variance: this fit was saved before the number of its targets was; fit again")
        return Residuals.of(at_unit_noise, fit.targets).log_likelihood(noise)

    def _fitted(self, what: str) -> Fit:
        if self._fit is None:
            raise RuntimeError(f"{what}: call fit(loader) first")
        if self._weights is not None:
            self._weights.check_unchanged(self._parameters(), what)
        return self._fit

    def _predictor(self, fit: Fit) -> LogitPredictor:
        whole = fit.curvature.whole_jacobians
        return LogitPredictor(self.model, self.layers, self._forward, whole, self.config.memory_budget)

    def _joint_predictor(self) -> JointPredictor:
        self._fitted("joint")
        not_sharded(self.model, "joint")
        return JointPredictor(self.model, self.layers, self._forward, self._gaussian(), self.config.memory_budget)

    def _inputs(self, batch: Any) -> Batch:
        return self._forward.read(batch, model_device(self.model), labels=False)

    def _sampler(self, what: str) -> HiddenSampler:
        self._fitted(what)
        not_sharded(self.model, what)
        if self.likelihood != "classification":
            raise ValueError(f"{what}: expected likelihood='classification' for a vocabulary, got {self.likelihood!r}")
        if self._forward.head is None:
            raise ValueError(
                f"{what}: expected a causal LM with an output head over a vocabulary and the default forward"
            )
        return HiddenSampler(
            self.model, self.layers, self._forward, self._gaussian(), self.config.memory_budget, self._jvp
        )

    def _prior_numbers(self) -> dict[str, float]:
        prior = self.prior.detached()
        numbers = {f"the prior precision of {layer.name}": float(prior[layer.name]) for layer in self.layers}
        return {**numbers, "the noise variance": float(self._noise)}

    def _square_norms(self) -> dict[str, Tensor]:
        values = self._values()
        return {layer.name: layer.matrix(values).double().square().sum() for layer in self.layers}

    def _values(self) -> dict[str, Tensor]:
        """Those of the parameters, at full size."""
        kept = None if self._weights is None else self._weights.values
        return kept or {name: p.detach() for name, p in self._parameters().items()}

    def _parameters(self) -> dict[str, Tensor]:
        return {name: value for layer in self.layers for name, value in layer.parameters().items()}


def _signature() -> inspect.Signature:
    """That of `LaplaceLoRA.__init__`, with every setting by its name."""
    own = list(inspect.signature(LaplaceLoRA.__init__).parameters.values())[:-1]
    named = {parameter.name for parameter in own}
    types = LaplaceConfig.__annotations__
    settings = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=types[one.name])
        for one in fields(LaplaceConfig)
        if one.name not in named
    ]
    return inspect.Signature([*own, *settings])


LaplaceLoRA.__init__.__signature__ = _signature()  # type: ignore[attr-defined]


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a positive int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
