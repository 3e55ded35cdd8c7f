"""A callback for `transformers.Trainer`: the posterior of what it has trained."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import TrainerCallback

from bayesian_lora_kernels.calibration.metrics import expected_calibration_error, negative_log_likelihood
from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.laplace import LaplaceLoRA
from bayesian_lora_kernels.model.forward import ForwardFunction
from bayesian_lora_kernels.posterior.evidence import effective_parameters

logger = logging.getLogger(__name__)


class LaplaceCallback(TrainerCallback):
    """Fits a posterior when training has ended, to the Trainer's own data, and saves it beside the adapter.

    The data are those of `train_dataset`, each example once and in the order of the data set, as the Trainer's collator
    makes batches of them; of several processes each takes a share. The model is the one that the Trainer ends with: the
    best one under `load_best_model_at_end`. What was found goes into the Trainer's log: `laplace_log_evidence`,
    `laplace_effective_parameters`, `laplace_prior_precision`, and with `calibrate` also `laplace_nll` and `laplace_ece`
    of the evaluation data, and `laplace_nll_map` and `laplace_ece_map` without the posterior.

    A posterior that cannot be had does not cost the training: it is warned of, unless `strict`.

    Args:
        trainer: whose log gets the numbers, so that TensorBoard, W&B and others show them:
            `trainer.add_callback(LaplaceCallback(trainer, ...))`. None, as in `Trainer(callbacks=[LaplaceCallback()])`:
            they are in `trainer.state.log_history` and in Python's log, as a Trainer does not make itself known.
        forward: as for `LaplaceLoRA`.
        class_token_ids: as for `LaplaceLoRA`.
        calibrate: whether the labels of the evaluation data set the level of the probabilities.
        optimize_prior_precision: whether the evidence chooses the prior precision; None: unless there is one among the
            settings, or no labels.
        folder: where to save; None: the Trainer's `output_dir`, where `trainer.save_model()` puts the adapter.
        strict: whether an error of the posterior is one of the training.
        progress: whether to show progress bars.
        config: as for `LaplaceLoRA`.
        **settings: as for `LaplaceLoRA`.

    Attributes:
        laplace: the posterior, after training; None before, or if there was an error.

    Raises:
        TypeError, ValueError: for a setting that is unknown or out of its range.
    """

    def __init__(
        self,
        trainer: Any = None,
        *,
        forward: ForwardFunction | None = None,
        class_token_ids: Sequence[int] | Tensor | None = None,
        calibrate: bool = False,
        optimize_prior_precision: bool | None = None,
        folder: str | os.PathLike[str] | None = None,
        strict: bool = False,
        progress: bool = True,
        config: LaplaceConfig | None = None,
        **settings: Any,
    ):
        if trainer is not None and not callable(getattr(trainer, "log", None)):
            raise TypeError(f"trainer: expected a transformers.Trainer or None, got {type(trainer).__name__}")
        if class_token_ids is not None:
            settings["class_token_ids"] = class_token_ids
        self.config = LaplaceConfig.of(config, settings)
        tuned = config is None and "prior_precision" not in settings
        self.tune = tuned if optimize_prior_precision is None else optimize_prior_precision
        self.trainer, self.forward, self.calibrate = trainer, forward, calibrate
        self.folder, self.strict, self.progress = folder, strict, progress
        self.laplace: LaplaceLoRA | None = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fit, choose the prior precision, calibrate, save, log; called by the Trainer, last of all.

        Raises:
            Exception: if there is no posterior, and `strict`.
        """
        self.laplace = None
        try:
            laplace = self._fitted(args, kwargs["model"], kwargs["train_dataloader"])
            found = self._numbers(laplace)
            if self.calibrate:
                found |= self._calibrated(laplace, args, kwargs.get("eval_dataloader"))
            if state.is_world_process_zero or laplace.posterior.curvature.processes.size > 1:  # each holds a part
                laplace.save_pretrained(args.output_dir if self.folder is None else self.folder)
        except Exception as error:
            if self.strict:
                raise
            logger.debug("no posterior", exc_info=True)
            warnings.warn(
                f"LaplaceCallback: the model is trained, but has no posterior: {type(error).__name__}: {error}; "
                "LaplaceCallback(strict=True) raises this",
                stacklevel=2,
            )
            return
        self.laplace = laplace
        self._log(found, state)

    def _fitted(self, args: Any, model: Any, loader: Any) -> LaplaceLoRA:
        laplace = LaplaceLoRA(model, self.forward, config=self.config)
        if args.world_size == 1:
            laplace.fit(_InOrder(loader, args), self.progress)
        else:
            share = _InOrder(loader, args, args.process_index, args.world_size)
            laplace.fit(share, self.progress, group=torch.distributed.group.WORLD)
        if self.tune and laplace.log_likelihood is not None:
            laplace.optimize_prior_precision()
        return laplace

    def _numbers(self, laplace: LaplaceLoRA) -> dict[str, float]:
        found = {"effective_parameters": sum(effective_parameters(laplace.posterior).values())}
        if laplace.log_likelihood is not None:
            found["log_evidence"] = float(laplace.log_marginal_likelihood())
        if laplace.prior.shared is not None:
            found["prior_precision"] = float(laplace.prior.shared)
        return found

    def _calibrated(self, laplace: LaplaceLoRA, args: Any, loader: Any) -> dict[str, float]:
        """Every process goes over all of the evaluation data."""
        if loader is None and self.trainer is not None and self.trainer.eval_dataset is not None:
            loader = self.trainer.get_eval_dataloader()
        if loader is None:
            raise ValueError(
                "calibrate: expected evaluation data; give the Trainer an eval_dataset and an eval_strategy, or this "
                "callback the Trainer"
            )
        held_out = _InOrder(loader, args)
        laplace.calibrate(held_out, self.progress)
        labels, probs, plain = [], [], []
        for batch in held_out:
            prediction = laplace.predict(batch, differences=True)
            labels.append(torch.as_tensor(batch["labels"]).cpu())
            probs.append(prediction.probs().cpu())
            plain.append(prediction.probs("map").cpu())
        found = {}
        for name, parts in (("", probs), ("_map", plain)):
            found[f"nll{name}"] = negative_log_likelihood(torch.cat(parts), torch.cat(labels))
            found[f"ece{name}"] = expected_calibration_error(torch.cat(parts), torch.cat(labels))
        return found

    def _log(self, found: dict[str, float], state: Any) -> None:
        named = {f"laplace_{name}": value for name, value in found.items()}
        if self.trainer is not None:
            self.trainer.log(named)
            return
        state.log_history.append({**named, "epoch": state.epoch, "step": state.global_step})
        if state.is_world_process_zero:
            logger.info(", ".join(f"{name} {value:.6g}" for name, value in named.items()))


class _InOrder(Iterable[Any]):
    """The batches of the data set behind a Trainer's loader, from its first example to its last.

    Args:
        loader: of the Trainer, for its data set and collator. It shuffles, may drop examples, and repeats some for
            processes to have equally many.
        args: of the Trainer.
        rank: of this process.
        size: how many processes share the data set.

    Raises:
        ValueError: for data without a length, and labels of several columns.
    """

    def __init__(self, loader: Any, args: Any, rank: int = 0, size: int = 1):
        data = loader.dataset
        if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
            raise ValueError(
                f"train_dataset: expected one with a length, got {type(data).__name__}, which may have no end; call "
                "LaplaceLoRA(model).fit(loader) with the batches that are to count"
            )
        names = list(args.label_names or ["labels"])
        if len(names) > 1:
            raise ValueError(f"label_names: expected one, got {names}; pass forward=..., and fit without the callback")
        self.label = names[0]
        share = Subset(data, range(rank, len(data), size))
        collate: Callable[[Any], Any] = loader.collate_fn
        self._batches = DataLoader(
            share, args.per_device_eval_batch_size, collate_fn=collate, num_workers=loader.num_workers
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            if self.label != "labels" and self.label in batch:
                batch = {
                    **{key: value for key, value in batch.items() if key != self.label},
                    "labels": batch[self.label],
                }
            yield batch
