"""`crossfit`: fine-tune without each fold, ask the model what it makes of the fold, and pool what the labels say."""

from __future__ import annotations

import copy
import gc
import json
import os
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.crossfitting.folds import assign_folds, digest, labels_of, subset
from bayesian_lora_kernels.laplace import LaplaceLoRA
from bayesian_lora_kernels.model.forward import ForwardFunction
from bayesian_lora_kernels.model.reading import unweighted
from bayesian_lora_kernels.posterior.storage import write_text
from bayesian_lora_kernels.predictive.calibrate import LabelLikelihood

FORMAT = "bayesian_lora_kernels.fold"

Known = list[weakref.ref[Tensor]]  # trainable parameters of the models that a process has seen
_known: Known = []  # of a process that runs folds for another


def crossfit(
    fine_tune: Callable[[Any], Any],
    dataset: Any,
    folds: int = 2,
    *,
    collate: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 8,
    labels: Sequence[int] | Tensor | None = None,
    groups: Sequence[Hashable] | None = None,
    forward: ForwardFunction | None = None,
    class_token_ids: Sequence[int] | Tensor | None = None,
    folder: str | os.PathLike[str] | None = None,
    processes: int = 1,
    optimize_prior_precision: bool | None = None,
    progress: bool = True,
    config: LaplaceConfig | None = None,
    **settings: Any,
) -> LaplaceLoRA:
    """A calibrated posterior of a model fine-tuned on all of the data, without a held-out label.

    The model is fine-tuned without each fold in turn, a posterior fitted, its prior precision chosen by the evidence,
    and the fold's labels weigh temperatures and factors of the variance, as in `LaplaceLoRA.calibrate`. What all folds
    say together calibrates the model of all data: fine-tuning runs `folds + 1` times.

    Args:
        fine_tune: `callable(part of the data set) -> model`, a fresh one each time, fine-tuned on these examples and no
            others; or `-> transformers.Trainer`, which is trained here, and whose batches are used.
        dataset: a sequence of examples, or anything with `len` and indices: a `torch` data set, one of `datasets`.
        folds: 2 are enough for 300 examples and more, 5 are better for 100.
        collate: from a list of examples to a batch with labels, as `fit` takes it; None: torch's `default_collate`.
            Weights count in the fits; of a fold that is held out each label counts once.
        batch_size: of fits and predictions.
        labels: `[N]`, the classes, to spread over the folds; None: as the examples say.
        groups: `[N]`, what examples share that may not be split between folds, such as a document or an author.
        forward: as for `LaplaceLoRA`.
        class_token_ids: as for `LaplaceLoRA`.
        folder: keeps what each finished fold said, as JSON; another call with the same data, settings and functions
            goes on from there. What else the functions depend on it cannot tell: take another folder for another
            training.
        processes: how many folds to run at once, each in a process of its own; `fine_tune` must then be importable.
        optimize_prior_precision: whether the evidence chooses the prior precision; None: unless there is one among the
            settings.
        progress: whether to show a progress bar.
        config: as for `LaplaceLoRA`. Its seed is also that of the folds.
        **settings: as for `LaplaceLoRA`.

    Returns:
        The posterior of all data, calibrated; `.calibration.report` says for each fold how many examples it had, their
        accuracy and NLL, and the seconds that training and the rest took.

    Raises:
        TypeError, ValueError: for arguments other than those; examples without a class; a class that training without
            some fold would leave out; a model that `fine_tune` returned before; a folder of other data.
    """
    if not callable(fine_tune):
        raise TypeError(f"fine_tune: expected a callable(part of the data) -> model, got {type(fine_tune).__name__}")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(f"dataset: expected something with a length and indices, got {type(dataset).__name__}")
    for name, value in (("batch_size", batch_size), ("processes", processes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive int, got {value!r}")
    if class_token_ids is not None:
        settings["class_token_ids"] = class_token_ids
    options = LaplaceConfig.of(config, settings)
    tune = "prior_precision" not in settings if optimize_prior_precision is None else optimize_prior_precision
    if options.likelihood != "classification":
        raise ValueError(f"crossfit: expected likelihood='classification', got {options.likelihood!r}")
    classes = labels_of(dataset) if labels is None else labels
    if len(classes) != len(dataset):
        raise ValueError(f"labels: expected one for each of {len(dataset)} examples, got {len(classes)}")
    assigned = assign_folds(classes, folds, groups, options.seed)

    job = _Job(fine_tune, collate, batch_size, forward, options, tune)
    tasks = [_Task(job, dataset, assigned, fold) for fold in range(folds)]
    kept = None if folder is None else _Folder(Path(folder), tasks)
    known: Known = []
    found: dict[int, LabelLikelihood] = {}
    for task in tasks:
        if kept is not None and (finished := kept.read(task.fold)) is not None:
            found[task.fold] = finished
    with tqdm(total=folds + 1, initial=len(found), desc="crossfit", unit="fine-tuning", disable=not progress) as bar:
        rest = [task for task in tasks if task.fold not in found]
        for fold, evidence in _run(rest, processes, known):
            found[fold] = evidence
            if kept is not None:
                kept.write(fold, evidence)
            bar.update()
        bar.set_postfix_str("all examples")
        laplace, _, seconds = job.posterior(dataset, known)
        bar.update()
    total = sum((found[fold] for fold in range(folds)), LabelLikelihood())
    report = {
        "folds": [found[fold].report for fold in range(folds)],
        "all": {"n_train": len(dataset), **seconds},
    }
    return laplace.calibrate(replace(total, folds=folds, report=report))


@dataclass(frozen=True)
class _Job:
    """What is the same in every fold."""

    fine_tune: Callable[[Any], Any]
    collate: Callable[[list[Any]], Any] | None
    batch_size: int
    forward: ForwardFunction | None
    config: LaplaceConfig
    tune: bool

    def posterior(self, part: Any, known: Known) -> tuple[LaplaceLoRA, Callable[[Any], Any], dict[str, float]]:
        """A model fine-tuned on a part of the data, with its posterior; how to make batches; seconds that it took.

        Args:
            part: of the data set.
            known: trainable parameters of earlier models, to which those of this one are added.
        """
        gc.collect()  # a Trainer, for one, is a cycle, and its model may fill the device
        start = perf_counter()
        model, loader = self._fine_tuned(part)
        trained = perf_counter() - start
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if {id(parameter) for parameter in parameters} & {id(reference()) for reference in known}:
            raise ValueError(
                "fine_tune: returned a model that it returned before, which knows the labels of other folds; expected "
                "a fresh one each time (a copy, for example)"
            )
        known += [weakref.ref(parameter) for parameter in parameters]
        laplace = LaplaceLoRA(model, self.forward, config=self.config).fit(loader(part), progress=False)
        _check_count("fit", laplace.n_examples, part)
        if self.tune:
            laplace.optimize_prior_precision()
        seconds = {"seconds_training": trained, "seconds_beyond": perf_counter() - start - trained}
        return laplace, loader, seconds

    def _fine_tuned(self, part: Any) -> tuple[nn.Module, Callable[[Any], Any]]:
        result = self.fine_tune(part)
        if isinstance(result, nn.Module):
            return result, self._batches
        if not all(hasattr(result, name) for name in ("train", "model", "state", "args", "get_eval_dataloader")):
            raise TypeError(
                f"fine_tune: expected it to return an nn.Module or a transformers.Trainer, got {type(result).__name__}"
            )
        if result.state.global_step == 0:
            result.train()
        if result.args.world_size > 1:
            raise ValueError(f"fine_tune: expected a Trainer of one process, got one of {result.args.world_size}")
        return result.model, self._batches if self.collate is not None else partial(_trainers_loader, result)

    def _batches(self, part: Any) -> list[Any]:
        collate = default_collate if self.collate is None else self.collate
        n, size = len(part), self.batch_size
        return [collate([part[i] for i in range(start, min(start + size, n))]) for start in range(0, n, size)]


@dataclass(frozen=True)
class _Task:
    """One fold."""

    job: _Job
    dataset: Any
    assigned: Tensor
    fold: int

    @property
    def rows(self) -> list[int]:
        """The examples of the fold."""
        return (self.assigned == self.fold).nonzero().flatten().tolist()

    def run(self, known: Known) -> LabelLikelihood:
        """What the fold's labels say of a model that has not seen them."""
        others = (self.assigned != self.fold).nonzero().flatten().tolist()
        laplace, loader, seconds = self.job.posterior(subset(self.dataset, others), known)
        start = perf_counter()
        held_out = subset(self.dataset, self.rows)
        evidence = laplace.label_likelihood([unweighted(batch) for batch in loader(held_out)], progress=False)
        seconds["seconds_beyond"] += perf_counter() - start
        n = evidence.n_labels
        _check_count("calibrate", n, held_out)
        numbers = {"accuracy": evidence.hits / n, "nll_map": -evidence.map_log_likelihood / n}
        return replace(evidence, report={"n_train": len(others), "n_held_out": n, **numbers, **seconds})


def _run(tasks: Sequence[_Task], processes: int, known: Known) -> Iterator[tuple[int, LabelLikelihood]]:
    if processes == 1 or len(tasks) < 2:
        for task in tasks:
            yield task.fold, task.run(known)
        return
    job = tasks[0].job
    for name, function in (("fine_tune", job.fine_tune), ("collate", job.collate), ("forward", job.forward)):
        try:
            ForkingPickler.dumps(function)
        except Exception as error:
            raise TypeError(
                f"{name}: expected a function that another process can import, {error}; define it at the top of a "
                "module, or use processes=1"
            ) from error
    threads = max(1, torch.get_num_threads() // processes)
    failed: Exception | None = None
    with ProcessPoolExecutor(min(processes, len(tasks)), get_context("spawn")) as pool:
        waiting = {pool.submit(_in_process, task, threads): task.fold for task in tasks}
        for done in as_completed(waiting):  # what finishes is kept, also after a fold that failed
            try:
                evidence = done.result()
            except (Exception, CancelledError) as error:
                failed = failed or error
                for future in waiting:
                    future.cancel()
            else:
                yield waiting[done], evidence
    if isinstance(failed, BrokenProcessPool):
        raise RuntimeError(
            "processes: a process that ran a fold ended. A script needs `if __name__ == '__main__':` around crossfit, "
            "and functions of a notebook are unknown elsewhere; use processes=1, or a module"
        ) from failed
    if failed is not None:
        raise failed


def _in_process(task: _Task, threads: int) -> LabelLikelihood:
    torch.set_num_threads(threads)
    return task.run(_known)


def _trainers_loader(trainer: Any, part: Any) -> list[Any]:
    """The Trainer's batches of all of a part; with workers that persist it would hand out those of another part."""
    arguments, trainer.args = trainer.args, copy.copy(trainer.args)
    trainer.args.dataloader_persistent_workers = False
    trainer.args.dataloader_drop_last = False
    try:
        return list(trainer.get_eval_dataloader(part))
    finally:
        trainer.args = arguments


def _check_count(what: str, seen: int, part: Any) -> None:
    if seen != len(part):
        raise RuntimeError(f"{what}: expected batches of all {len(part)} examples, got {seen}; pass collate=...")


class _Folder:
    """What finished folds said, on disk."""

    def __init__(self, path: Path, tasks: Sequence[_Task]):
        self.path, self.count = path, len(tasks)
        path.mkdir(parents=True, exist_ok=True)
        task = tasks[0]
        ids = task.job.config.class_token_ids
        self.digest = digest(
            (task.dataset[i] for i in range(len(task.dataset))),
            task.assigned,
            (task.job.config.as_json(), task.job.tune, None if ids is None else list(ids)),
            (task.job.fine_tune, task.job.collate, task.job.forward),
        )

    def _file(self, fold: int) -> Path:
        return self.path / f"fold-{fold + 1}-of-{self.count}.json"

    def write(self, fold: int, evidence: LabelLikelihood) -> None:
        """Whole or not at all."""
        content = {"format": FORMAT, "data": self.digest, "evidence": evidence.as_json()}
        write_text(self._file(fold), json.dumps(content, indent=1) + "\n")

    def read(self, fold: int) -> LabelLikelihood | None:
        """None, if the fold is not finished.

        Raises:
            ValueError: if the file is damaged, or of other data or settings.
        """
        path = self._file(fold)
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"expected the format {FORMAT}")
            if content["data"] != self.digest:
                raise ValueError("it is of other data, folds, settings or functions")
            return LabelLikelihood.from_json(content["evidence"])
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{path}: cannot go on from this fold: {error}; remove it or pass another folder"
            ) from error
